"""The report page of a benchmark: one self-contained HTML file, losses shown as plainly as gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bti_fast.engine import report
from bti_fast.engine.figures import svg
from bti_fast.engine.files import output_folder
from bti_fast.errors import UserError

from . import plots, table
from .rows import EXTRA, MACHINE, PEAK, SKIPPED, TIME, Row, gains, losses, together
from .scaling import fits
from .whole_network import shares

SINGLE = "3D", "layout", "dtype"  # groups with one size of each operator
METHOD = (
    "Every provider of a case is run once and checked against the reference in float64 (ours in memory full "
    "of NaN), then all are timed in turns; the figures are medians with the 20th and 80th percentile. "
    "The least traffic counts every tensor that has to be read or written once. The roofline is the larger "
    "of traffic over the bandwidth of a copy of the largest input, taken in the same turns, and work over "
    "the rate of a float32 matrix product, measured beside the case. Peak memory is what a call allocates "
    "through torch above its inputs; of BTINet, the resident memory of a fresh process."
)


def write_report(path: Path, rows: Iterable[Row]) -> None:
    """Writes the page. UserError where there is nothing to show or the page cannot be written."""
    rows = list(rows)
    measured = [row for row in rows if row.kernel != MACHINE and row.metric != SKIPPED]
    if not measured:
        raise UserError("--report: nothing was measured")
    devices = ", ".join(dict.fromkeys(row.device for row in measured))
    versions = ", ".join(
        dict.fromkeys(f"bti_fast {r.bti_fast} ({r.commit}), torch {r.torch}" for r in measured)
    )
    dates = sorted(row.date for row in measured)
    sections = {
        "Busy machine": "".join(report.note(line) for line in table.busy(rows)),
        "Summary": _summary(rows),
        "Where a peer is faster": _losses(rows),
        "Times": report.figures(_bars(measured, TIME)),
        "Roofline": _rooflines(rows),
        "Peak memory": report.figures(_bars(measured, PEAK)) + _extra(rows),
        "Cost as the work grows": _scaling(rows),
        "Share of the interaction in BTINet": _shares(rows),
        "Not measured": _skipped(rows),
        "The machine": _machine(rows),
        "Method": report.note(METHOD),
        "All rows": _all(measured),
    }
    output_folder(path.parent)
    report.write_page(path, "Benchmarks", f"{devices}; {versions}; {dates[0]} to {dates[-1]}", sections)


def _summary(rows: Sequence[Row]) -> str:
    found = [gain for gain in gains(rows) if gain.provider == "bti_fast"]
    cells = [
        (g.kernel, g.group, g.mode, g.peer, f"{g.mean:.2f}x", f"{g.worst:.2f}x at {g.worst_size}", g.cases)
        for g in found
    ]
    means = defaultdict(lambda: defaultdict(dict))
    for gain in found:
        if gain.peer != "compile max-autotune":
            group = "" if gain.group in ("levels", "module", "network") else f" {gain.group}"
            means[gain.mode][gain.kernel + group][gain.peer] = gain.mean
    drawings = [
        svg(plots.gain_bars(by_kernel, f"Geometric means, {mode}")) for mode, by_kernel in means.items()
    ]
    columns = ("kernel", "group", "mode", "peer", "times faster, geometric mean", "worst case", "cases")
    return report.figures(drawings) + report.table(columns, cells)


def _losses(rows: Sequence[Row]) -> str:
    cells = [
        (
            loss.row.kernel,
            f"{loss.row.size} {loss.row.dtype} {loss.row.layout}",
            loss.row.mode,
            loss.row.provider,
            f"{loss.row.p50:.3f}",
            loss.peer.provider,
            f"{loss.peer.p50:.3f}",
            f"{loss.ratio:.2f}x",
            "yes" if loss.within_spread else "",
        )
        for loss in losses(rows)
    ]
    if not cells:
        return report.note("Nowhere in these rows.")
    columns = ("kernel", "size", "mode", "ours", "ms", "peer", "ms", "peer / ours", "spreads overlap")
    return report.table(columns, cells)


def _bars(rows: Sequence[Row], metric: str) -> list[str]:
    """A figure for each kernel, mode and group; groups of single sizes have one for all kernels."""
    groups = defaultdict(list)
    for row in rows:
        if row.metric != metric or row.group.startswith("sweep"):
            continue
        if metric == PEAK and (row.mode == "forward" or row.group in SINGLE):
            continue  # memory with backward is larger, and decides whether something fits
        kernel = "All operators" if row.group in SINGLE else row.kernel
        groups[kernel, row.mode, row.group].append(row)
    drawings = []
    for (kernel, mode, group), found in groups.items():
        title = f"{kernel}, {mode}" + ("" if group in ("levels", "module", "network") else f", {group}")
        label = _case if group in SINGLE else (lambda row: row.size)
        drawings.append(svg(plots.bars(found, title, label)))
    return drawings


def _case(row: Row) -> str:
    return f"{row.kernel} {row.layout if row.group == 'layout' else row.dtype}"


def _rooflines(rows: Sequence[Row]) -> str:
    machine = [row for row in rows if row.kernel == MACHINE]
    drawings = []
    for mode in ("forward", "forward+backward"):
        found = [row for row in rows if row.mode == mode and row.group == "levels" and row.flop_per_byte]
        if found and machine:
            drawings.append(svg(plots.roofline(found, machine, mode)))
    note = report.note(
        "Filled: bti_fast; hollow grey: eager; hollow orange: torch.compile. Solid line: copying beyond the "
        "caches; dotted: copying 2 MiB, which the caches hold."
    )
    return report.figures(drawings) + note if drawings else ""


def _scaling(rows: Sequence[Row]) -> str:
    groups = defaultdict(list)
    for fit in fits(rows):
        groups[fit.group, fit.mode, fit.metric].append(fit)
    drawings = [
        svg(plots.scaling(found, f"{group}, {mode}", metric))
        for (group, mode, metric), found in groups.items()
    ]
    if not drawings:
        return ""
    return report.figures(drawings) + report.note(
        "Behind the names: the fitted exponent; 1 is linear growth."
    )


def _extra(rows: Sequence[Row]) -> str:
    """Scratch memory of ours and of the peers: what is above inputs and results."""
    cells = []
    for row, peers in together(rows, EXTRA):
        if row.mode != "forward" and row.group == "levels":
            rest = (peers.get(name) for name in ("eager", "compile"))
            cells.append(
                (row.kernel, row.size, row.provider, *(f"{r.p50:.2f}" if r else "" for r in (row, *rest)))
            )
    columns = ("kernel", "size", "ours", "MB above inputs and results", "eager", "torch.compile")
    return report.table(columns, cells) if cells else ""


def _shares(rows: Sequence[Row]) -> str:
    cells = [
        (row.size, row.mode, row.provider, f"{row.p50 / 1e3:.2f} s", f"{share:.1%}")
        for row, share in shares(rows)
    ]
    return report.table(("network", "mode", "provider", "median", "share"), cells) if cells else ""


def _skipped(rows: Sequence[Row]) -> str:
    lines = [line.split(": ", 1) for line in table.skipped(rows)]
    return report.table(("provider", "reason"), lines) if lines else ""


def _machine(rows: Sequence[Row]) -> str:
    cells = [
        (row.provider, row.size, row.mode, f"{row.p50:.1f} {row.metric}", row.date)
        for row in rows
        if row.kernel == MACHINE
    ]
    return report.table(("ceiling", "size", "cases", "found", "run of"), cells) if cells else ""


def _all(rows: Sequence[Row]) -> str:
    cells = [
        (
            row.kernel,
            f"{row.size} {row.dtype} {row.layout}",
            row.group,
            row.mode,
            row.provider,
            *(f"{value:.3f}" for value in (row.p20, row.p50, row.p80)),
            row.metric,
            "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
            "" if row.roofline is None else f"{row.roofline:.0%}",
        )
        for row in rows
        if row.metric in (TIME, PEAK)
    ]
    columns = ("kernel", "case", "group", "mode", "provider", "p20", "p50", "p80", "unit", "GB/s", "roofline")
    return report.table(columns, cells)
