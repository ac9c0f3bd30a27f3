"""Self-contained HTML pages: tables, figures and pictures in one file, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bti_fast import __version__
from bti_fast.engine.files import write_text

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #5b6470; --paper: #ffffff; --line: #d7dce2; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b0; --paper: #14171b; --line: #333a43; --tint: #1d2127; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p.note, figcaption, footer { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.25rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg, figure img { width: 100%; height: auto; display: block; }
figure img { background: #000; border-radius: 4px; }
.figures figure { background: var(--tint); border-radius: 6px; padding: .75rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .75rem; }
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; the first column is text, the others are right-aligned."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(drawings: Iterable[str]) -> str:
    """A grid of inline SVG drawings."""
    return '<div class="figures">' + "".join(f"<figure>{drawing}</figure>" for drawing in drawings) + "</div>"


def pictures(items: Iterable[tuple[str, str]]) -> str:
    """A grid of (data address, caption) pictures."""
    cells = "".join(
        f'<figure><img src="{address}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for address, text in ((address, escape(caption)) for address, caption in items)
    )
    return f'<div class="pictures">{cells}</div>'


def note(text: str) -> str:
    """A quiet paragraph."""
    return f'<p class="note">{escape(text)}</p>'


def write_page(path: Path, title: str, subtitle: str, sections: Mapping[str, str]) -> None:
    """Writes one page in one step; sections maps headings to HTML."""
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{html}</section>" for name, html in sections.items() if html
    )
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><header><h1>{escape(title)}</h1>{note(subtitle)}</header>{body}"
        f"<footer>bti_fast {__version__}. Not a medical device.</footer></main></body></html>\n",
    )
