"""How a check report looks on a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bti_fast.data.check import CheckReport

_ROWS = 12


def render(report: CheckReport, console: Console | None = None) -> None:
    """Print a check report: counts, findings, and at most a dozen lines of each list."""
    console = console or Console()
    console.print(Text(f"{report.root}  (layout: {report.layout})", style="bold"))
    console.print(_counts(report))
    console.print(_findings(report))
    _listing(console, "Problems", [problem.message for problem in report.problems])
    across = [
        f"{pair.a}  and  {pair.b}  ({'same pixels' if pair.exact else f'{pair.similarity:.4f}'})"
        for pair in report.cross_class
    ]
    _listing(console, "Near-duplicates under two classes", across)
    _listing(console, "Leaks between splits", [",  ".join(group) for group in report.leaks])
    if report.ok:
        console.print(Text("OK: every listed image can be used, and no split leaks.", style="green"))
    else:
        text = (
            f"NOT OK: {len(report.errors)} unusable files or rows, {len(report.leaks)} leaks between splits."
        )
        console.print(Text(text, style="red"))


def _counts(report: CheckReport) -> Table:
    splits = list(next(iter(report.counts.values()), {}))
    table = Table("class", *(name or "no split" for name in splits), box=box.SIMPLE_HEAD)
    if len(splits) > 1:
        table.add_column("all")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(label or "(no class)", list(parts.values())) for label, parts in report.counts.items()]
    rows.append(("all", [sum(column) for column in zip(*(values for _, values in rows), strict=True)]))
    for name, values in rows:
        total = [str(sum(values))] if len(splits) > 1 else []
        table.add_row(Text(name), *map(str, values), *total)
    return table


def _findings(report: CheckReport) -> Table:
    table = Table("finding", "count", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, count in report.masks.items():
        table.add_row({"lesion": "images with a lesion mask", "empty": "images with a known empty mask"}.get(
            name, "images with an unknown mask"), str(count))  # fmt: skip
    for kind, count in sorted(Counter(problem.kind for problem in report.problems).items()):
        table.add_row(kind.replace("-", " "), str(count))
    exact = sum(pair.exact for pair in report.pairs)
    table.add_row(f"near-duplicate pairs (correlation > {report.threshold:g})", str(len(report.pairs)))
    table.add_row("  of these with equal pixels", str(exact))
    table.add_row("  of these under two classes", str(len(report.cross_class)))
    table.add_row("images in near-duplicate pairs", str(report.duplicate_images))
    table.add_row("groups that leak between splits", str(len(report.leaks)))
    for name, (height, width) in report.sizes.items():
        table.add_row(f"{name} image (width x height)", f"{width} x {height}")
    return table


def _listing(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(Text(f"{title} ({len(lines)})", style="bold"))
    for line in lines[:_ROWS]:
        console.print(Text("  " + line), soft_wrap=True)
    if len(lines) > _ROWS:
        console.print(Text(f"  ... and {len(lines) - _ROWS} more; the JSON lists all"))
