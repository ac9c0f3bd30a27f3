"""The figures of the report page: bars of times and memory, rooflines, cost as the work grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from bti_fast.engine.figures import COLOURS, INK, new_figure

from .rows import TIME, Row
from .scaling import Fit

OURS = COLOURS[0]
PEERS = {
    "eager": "#9a9a9a",
    "reference": "#9a9a9a",
    "compile": COLOURS[1],
    "compile max-autotune": COLOURS[4],
    "sdpa": COLOURS[3],
    "sdpa flash": COLOURS[6],
    "sdpa efficient": COLOURS[4],
    "sdpa cudnn": "#a6761d",
    "sdpa math": "#5c4a3d",
    "bti_fast": OURS,
    "bti_fast:folded": COLOURS[2],
    "bti_fast:avx2": COLOURS[2],
    "bti_fast:portable": COLOURS[5],
    "bti_fast:avx512": COLOURS[6],
}
MARKERS = "osD^vP*X"


def bars(rows: Sequence[Row], title: str, label: Callable[[Row], str] = lambda row: row.size) -> Figure:
    """Medians of every provider in every case, on a logarithmic scale; whiskers from p20 to p80."""
    sizes = list(dict.fromkeys(label(row) for row in rows))
    names = [name for name in PEERS if any(row.provider == name for row in rows)]
    figure, axes = new_figure(max(5.2, 0.24 * len(sizes) * (len(names) + 1) + 1.2), 3.6)
    width = 0.85 / max(len(names), 1)
    for i, name in enumerate(names):
        found = {label(row): row for row in rows if row.provider == name}
        places = [
            (k + (i - (len(names) - 1) / 2) * width, found[s]) for k, s in enumerate(sizes) if s in found
        ]
        x = [place for place, _ in places]
        y = [row.p50 for _, row in places]
        spread = [[r.p50 - r.p20 for _, r in places], [r.p80 - r.p50 for _, r in places]]
        axes.bar(x, y, width, color=PEERS[name], label=name)
        axes.errorbar(x, y, spread, fmt="none", ecolor=INK, elinewidth=0.7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), [size.replace(" ", "\n") for size in sizes], fontsize="small")
    axes.set(ylabel=rows[0].metric, title=title)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(0, -0.22))
    return figure


def roofline(rows: Sequence[Row], machine: Sequence[Row], title: str) -> Figure:
    """Work done a second over work for each byte, below the ceilings measured in the same run.

    Ours are filled, eager PyTorch and torch.compile hollow.
    """
    figure, axes = new_figure(5.2, 4.0)
    shown = [row for row in rows if row.metric == TIME and row.flop_per_byte and row.provider in PEERS]
    copies = [row.p50 for row in machine if row.metric == "GB/s"]
    matrix = max(row.p50 for row in machine if row.metric == "GFLOP/s")
    kernels = list(dict.fromkeys(row.kernel for row in shown))
    for kernel, marker in zip(kernels, MARKERS, strict=False):
        for name, face in (("eager", "none"), ("compile", "none"), ("bti_fast", OURS)):
            points = [row for row in shown if row.kernel == kernel and row.provider == name]
            axes.scatter(
                [row.flop_per_byte for row in points],
                [row.gb_per_s * row.flop_per_byte for row in points],
                marker=marker,
                s=30,
                facecolors=face,
                edgecolors=PEERS[name],
                linewidths=1.1,
                label=f"{kernel}" if name == "bti_fast" else None,
            )
    low = min((row.flop_per_byte for row in shown), default=0.1) / 2
    high = max(2 * max((row.flop_per_byte for row in shown), default=10), 2 * matrix / min(copies))
    for rate, style in zip((max(copies), min(copies)), (":", "-"), strict=True):
        ridge = matrix / rate
        axes.plot([low, ridge, high], [rate * low, matrix, matrix], color=INK, linewidth=0.9, linestyle=style)
    axes.set(xscale="log", yscale="log", xlabel="flop / byte, least of both", ylabel="GFLOP/s", title=title)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def scaling(fits: Sequence[Fit], title: str, unit: str) -> Figure:
    """Log-log curves with the fitted exponents in the legend; the dotted line is linear growth."""
    figure, axes = new_figure(5.2, 3.8)
    for fit, marker in zip(fits, MARKERS * 3, strict=False):
        x, y = zip(*fit.points, strict=True)
        style = "-" if fit.provider == "bti_fast" else "--"
        kernels = list(dict.fromkeys(f.kernel for f in fits))
        axes.plot(
            x,
            y,
            style,
            marker=marker,
            markersize=4,
            linewidth=1.3,
            color=COLOURS[kernels.index(fit.kernel) % len(COLOURS)],
            label=f"{fit.kernel}, {fit.provider}: {fit.exponent:.2f}",
        )
    ours = [fit for fit in fits if fit.provider == "bti_fast"] or list(fits)
    (x0, y0), x1 = ours[0].points[0], ours[0].points[-1][0]
    axes.plot([x0, x1], [y0, y0 * x1 / x0], color=INK, linewidth=0.8, linestyle=":", label="linear")
    axes.set(
        xscale="log", yscale="log", xlabel=fits[0].group.removeprefix("sweep "), ylabel=unit, title=title
    )
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def gain_bars(means: dict[str, dict[str, float]], title: str) -> Figure:
    """Times faster than each peer, by kernel and mode; left of the line at 1 the peer wins."""
    names = list(means)
    peers = list(dict.fromkeys(peer for by_peer in means.values() for peer in by_peer))
    figure, axes = new_figure(5.2, 1.2 + 0.12 * len(names) * (len(peers) + 1))
    height = 0.85 / max(len(peers), 1)
    for i, peer in enumerate(peers):
        places = [
            (k + (i - (len(peers) - 1) / 2) * height, means[n][peer])
            for k, n in enumerate(names)
            if peer in means[n]
        ]
        colour = PEERS.get(peer, COLOURS[3])
        y, x = [place for place, _ in places], [value for _, value in places]
        axes.barh(y, [value - 1 for value in x], height, left=1, color=colour, label=peer)
        for place, value in places:
            side = "left" if value >= 1 else "right"
            axes.annotate(
                f"{value:.1f}" if value >= 1 else f"{value:.2f}",
                (value, place),
                xytext=(3 if value >= 1 else -3, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=7,
                color=INK,
            )
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.6, len(names) - 0.4)
    values = [value for by_peer in means.values() for value in by_peer.values()]
    axes.set_xlim(0.55 * min(1, *values), 1.6 * max(1, *values))
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(title=title, xlabel="times faster than the peer (below 1: slower)")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
    return figure
