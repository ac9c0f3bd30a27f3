"""The tables in the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from .rows import EXTRA, MACHINE, PEAK, SKIPPED, TIME, Gain, Loss, Row, gains, losses
from .scaling import Fit, fits
from .whole_network import shares

HEADER = (
    f"{'size':30} {'mode':17} {'provider':20} {'ms':>9} {'p20-p80':>19} {'vs eager':>8} {'GB/s':>6} "
    f"{'roofline':>8} {'peak MB':>8}"
)


def title(rows: list[Row]) -> str:
    """The kernel whose rows follow, with what they have in common."""
    row = rows[0]
    return f"\n{row.kernel}, {row.dtype}, {row.layout}, {row.group}"


def lines(rows: list[Row]) -> list[str]:
    """The measured rows of one case and mode, one line for each provider."""
    times = {row.provider: row for row in rows if row.metric == TIME}
    peaks = {row.provider: row.p50 for row in rows if row.metric == PEAK}
    base = times.get("eager") or times.get("reference")
    made = []
    for name, row in times.items():
        span = f"{row.p20:.3f}-{row.p80:.3f}"
        ratio = f"{base.p50 / row.p50:7.2f}x" if base else ""
        rate = "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}"
        share = "" if row.roofline is None else f"{row.roofline:.0%}"
        peak = f"{peaks[name]:.1f}" if name in peaks else ""
        made.append(
            f"{row.size:30} {row.mode:17} {name:20} {row.p50:9.3f} {span:>19} {ratio:>8} {rate:>6} "
            f"{share:>8} {peak:>8}"
        )
    return made


def summary(rows: Iterable[Row]) -> list[str]:
    """What stands below the rows: machine, what is missing, shares, exponents, losses, geometric means."""
    rows = list(rows)
    parts = [
        ("Ceilings", _machine(rows)),
        ("Busy machine", busy(rows)),
        ("Not measured", skipped(rows)),
        ("Memory above inputs and results, of ours", _extra(rows)),
        ("Share of the interaction in BTINet", [share_line(row, share) for row, share in shares(rows)]),
        ("Cost as the work grows, time or memory ~ size^exponent", [fit_line(fit) for fit in fits(rows)]),
        ("Where a peer is faster", [loss_line(loss) for loss in losses(rows)] or ["nowhere in this run"]),
        (
            "Times faster than the peer, geometric mean and worst case",
            [gain_line(gain) for gain in gains(rows)],
        ),
    ]
    return [line for name, found in parts if found for line in ("", name, *(f"  {text}" for text in found))]


def gain_line(gain: Gain) -> str:
    """One geometric mean."""
    return (
        f"{gain.kernel:26} {gain.group:9} {gain.mode:17} {gain.provider:17} vs {gain.peer:20} "
        f"{gain.mean:6.2f}x over "
        f"{gain.cases}, worst {gain.worst:.2f}x at {gain.worst_size}"
    )


def loss_line(loss: Loss) -> str:
    """One case that a peer wins."""
    row = loss.row
    doubt = " (spreads overlap)" if loss.within_spread else ""
    return (
        f"{row.kernel} {row.size} {row.dtype} {row.layout} {row.mode}: {loss.peer.provider} "
        f"{loss.peer.p50:.3f} ms, {row.provider} {row.p50:.3f} ms: {loss.ratio:.2f}x{doubt}"
    )


def share_line(row: Row, share: float) -> str:
    """One interaction's share of the network's time."""
    return f"{row.size}, {row.mode}, {row.provider}: {share:.1%} of {row.p50 / 1e3:.2f} s"


def fit_line(fit: Fit) -> str:
    """One exponent."""
    name = fit.group.removeprefix("sweep ")
    return f"{fit.kernel:20} {fit.mode:17} {fit.provider:10} {fit.metric:8} ~ {name}^{fit.exponent:.2f}"


def skipped(rows: Iterable[Row]) -> list[str]:
    """Who is not measured where, by reason."""
    by_reason = defaultdict(set)
    for row in rows:
        if row.metric == SKIPPED:
            by_reason[row.provider, row.note].add(row.kernel)
    return [
        f"{provider} ({', '.join(sorted(kernels))}): {reason}"
        for (provider, reason), kernels in by_reason.items()
    ]


def _machine(rows: list[Row]) -> list[str]:
    found = defaultdict(dict)
    for row in rows:
        if row.kernel == MACHINE:
            found[row.provider, row.size, row.metric][row.mode] = row.p50
    return [
        f"{provider}, {size}: " + ", ".join(f"{value:.1f} {unit} {when}" for when, value in values.items())
        for (provider, size, unit), values in found.items()
    ]


def busy(rows: list[Row]) -> list[str]:
    """A warning where cases were timed on a busy machine."""
    times = [row for row in rows if row.metric == TIME]
    found = {row.case for row in times if row.busy}
    if not found:
        return []
    every = len({row.case for row in times})
    return [f"{len(found)} of {every} cases were timed while others used the processors: run them again"]


def _extra(rows: list[Row]) -> list[str]:
    return [
        f"{row.kernel} {row.size} {row.mode}: {row.p50:.3g} MB"
        for row in rows
        if row.metric == EXTRA and row.provider == "bti_fast" and row.group == "levels"
    ]
