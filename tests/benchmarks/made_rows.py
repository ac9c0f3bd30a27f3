"""Tables as a run would write them, with times that are known."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.rows import PEAK, TIME, Row

ROW = Row(
    "gated_fusion",
    "",
    "forward",
    TIME,
    "8x96x56x56 K=1",
    device="a machine",
    threads=2,
    bti_fast="0.1.0",
    torch="2.10",
    commit="abc",
    date="2026-01-02T03:04:05+00:00",
    run="first",
)


def timed(provider: str, ms: float, spread: float = 0.05, **changes) -> Row:
    """A row of one provider whose median is ``ms``."""
    values = {"p20": ms * (1 - spread), "p50": ms, "p80": ms * (1 + spread), **changes}
    return replace(ROW, provider=provider, **values)


def table(ours: float, machine: float = 1.0, run: str = "first", size: str = ROW.size, mb: float = 20.0):
    """Eager 10 ms, torch.compile 4 ms and this package ``ours`` ms on a machine ``machine`` times slower."""
    rows = [timed("eager", 10 * machine), timed("compile", 4 * machine), timed("bti_fast", ours * machine)]
    rows.append(replace(rows[-1], metric=PEAK, p20=mb, p50=mb, p80=mb))
    return [replace(row, run=run, size=size) for row in rows]
