"""The report page stands alone and shows losses; the README is in step with the committed tables."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.rows import EXTRA, MACHINE, PEAK, SKIPPED, read, save
from bti_fast.errors import UserError

from .made_rows import ROW, table, timed


def rows():
    made = table(5.0) + [replace(row, level=3) for row in table(3.0, size="8x48x112x112 K=1")]
    made = [
        replace(r, gb_per_s=4.0, roofline=0.5, flop_per_byte=0.5) if r.metric == "ms" else r for r in made
    ]
    made += [replace(row, metric=EXTRA) for row in made if row.metric == "ms" and row.provider == "bti_fast"]
    made += [timed("bti_fast", x, group="sweep batch", x=x, size=f"{x}x") for x in (1.0, 2.0, 4.0)]
    ceiling = replace(ROW, kernel=MACHINE, provider="copy", mode="before", metric="GB/s", group=MACHINE)
    made.append(replace(ceiling, p20=20.0, p50=20.0, p80=20.0, size="copy of 128 MiB"))
    matrix = replace(ceiling, provider="matrix product", metric="GFLOP/s", p50=100.0, size="float32")
    made.append(matrix)
    made.append(replace(ROW, provider="sdpa <cudnn>", metric=SKIPPED, note="CUDA tensors only"))
    return made


def test_the_page_stands_alone(tmp_path, capsys):
    save(tmp_path / "rows.csv", rows())
    page = tmp_path / "page.html"
    assert main(["--load", str(tmp_path / "rows.csv"), "--report", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text.replace('xlink:href="#', 'href="#'))
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert text.count("<svg") == 4  # gains, times, roofline, scaling
    identifiers = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    losses = text.split("Where a peer is faster")[1].split("</table>")[0]
    assert "0.80x" in losses and "gated_fusion" in losses
    assert "sdpa &lt;cudnn&gt;" in text and "CUDA tensors only" in text
    out = capsys.readouterr().out
    assert "~ batch^1.00" in out and "compile 4.000 ms, bti_fast 5.000 ms: 0.80x" in out


def test_tables_are_gathered_into_one(tmp_path):
    first, second, into = (tmp_path / name for name in ("first.csv", "second.csv", "into.csv"))
    save(first, [timed("bti_fast", 1.0, size="a"), timed("bti_fast", 2.0, size="b")])
    save(second, [timed("bti_fast", 3.0, size="c")])
    save(
        into,
        [timed("bti_fast", 9.0, size="a"), timed("eager", 9.0, size="a"), timed("bti_fast", 4.0, size="d")],
    )
    assert main(["--load", str(first), str(second), "--save", str(into)]) == 0
    found = {(row.size, row.provider): row.p50 for row in read(into)}
    own = {("a", "bti_fast"): 1.0, ("b", "bti_fast"): 2.0, ("c", "bti_fast"): 3.0, ("d", "bti_fast"): 4.0}
    assert found == own  # and nothing of the older measurement of a


def test_nothing_measured_is_one_line(tmp_path, capsys):
    save(tmp_path / "rows.csv", [replace(ROW, provider="peer", metric=SKIPPED, note="why")])
    assert main(["--load", str(tmp_path / "rows.csv"), "--report", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == "bti-fast benchmark: --report: nothing was measured\n"


def test_readme_is_in_step_with_the_tables():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_section(text, readme.section()) == text, "run: bti-fast benchmark --readme"


def test_readme_section_from_a_table(tmp_path):
    save(tmp_path / "a-machine.csv", rows())
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.update(tmp_path / "README.md", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| `gated_fusion` | forward |  |  | 1.3 / 3.3 |  |" in text
    assert "`gated_fusion` against compile in 1 (0.80 at 8x96x56x56 K=1, forward)" in text
    assert "| `gated_fusion`, batch | 1, 4 | 1.00 |" in text
    assert "already" in readme.update(tmp_path / "README.md", tmp_path)
    with pytest.raises(UserError, match="markers"):
        readme.with_section("no markers", "")


def test_readme_shows_the_network_with_its_memory(tmp_path):
    def measured(provider: str, interaction: str, seconds: float, gb: float) -> list:
        row = timed(
            provider, 1e3 * seconds, kernel="BTINet", mode="training step", size=f"b4 8x3x9x9 {interaction}"
        )
        return [row, replace(row, metric=PEAK, p20=1e3 * gb, p50=1e3 * gb, p80=1e3 * gb)]

    rows = [
        *measured("reference", "proxy", 12.0, 5.0),
        *measured("bti_fast", "proxy", 8.0, 4.0),
        *measured("bti_fast", "none", 7.6, 3.9),
    ]
    save(tmp_path / "a.csv", rows)
    made = readme.section(tmp_path)
    assert "| b4, 8x3x9x9 | none | bti_fast |  |  | 7.60 | 3.9 |\n| b4, 8x3x9x9 | proxy | operators" in made
    assert "the allocator as it comes |  |  | 12.00 | 5.0 |" in made
    assert "| b4, 8x3x9x9 | proxy | bti_fast |  |  | 8.00 (1.50 times faster) | 4.0 |" in made
    assert "proxy +5.0% (training step)" in made
