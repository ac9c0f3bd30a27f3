"""The figures of the reports, drawn without a display: curves over epochs, ROC, reliability,
risk-coverage."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from bti_fast.engine.files import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
# Drawn in this colour, and turned into the page's own text colour where the figure stands in a page.
INK = "#13579b"
_numbers = itertools.count()


def line_styles() -> Iterator[dict[str, str]]:
    """Colour and dashes of one line after the other without end: all colours solid, then dashed and so on."""
    for dashes in itertools.cycle(("-", "--", ":", "-.")):
        for colour in COLOURS:
            yield {"color": colour, "linestyle": dashes}


def new_figure(width: float = 5.2, height: float = 3.6) -> tuple[Figure, Any]:
    """An empty figure with one set of axes, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(history: Sequence[Mapping[str, Any]], names: Mapping[str, str], ylabel: str, title: str) -> Figure:
    """Columns of the history over the epochs; names maps column to legend. One point is shown as a point."""
    figure, axes = new_figure()
    for (column, label), style in zip(names.items(), line_styles(), strict=False):
        points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, **style, label=label, linewidth=1.6, marker="o" if len(x) < 3 else None)
    axes.set(xlabel="epoch", ylabel=ylabel, title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return figure


def roc(found: Mapping[str, Mapping[str, Any] | None]) -> Figure:
    """One-against-the-rest ROC curves, as metrics.roc_curves gives them."""
    figure, axes = new_figure(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for (name, curve), style in zip(found.items(), line_styles(), strict=False):
        if curve is None:
            axes.plot([], [], **style, label=f"{name}: n/a")
        else:
            axes.plot(curve["fpr"], curve["tpr"], **style, linewidth=1.6, label=f"{name}: {curve['auc']:.3f}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC, each class against the rest")
    axes.legend(frameon=False, title="AUC", loc="lower right")
    return figure


def reliability(found: Mapping[str, Sequence[Any]], ece: float | None, title: str = "Reliability") -> Figure:
    """Accuracy over confidence, as metrics.reliability_curve gives it; the area of a dot is its share of the
    cases."""
    figure, axes = new_figure(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    cells = zip(found["confidence"], found["accuracy"], found["count"], strict=True)
    points = [cell for cell in cells if cell[2]]
    if points:
        x, y, count = zip(*points, strict=True)
        axes.plot(x, y, color=COLOURS[0], linewidth=1.2)
        axes.scatter(x, y, s=[20 + 300 * n / sum(count) for n in count], color=COLOURS[0], alpha=0.7)
    title += "" if ece is None else f", ECE {ece:.3f}"
    axes.set(xlabel="confidence", ylabel="accuracy", title=title, xlim=(0, 1.02), ylim=(0, 1.02))
    return figure


def risk_coverage(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Failure rate among the accepted cases, as metrics.risk_coverage gives it for each signal."""
    figure, axes = new_figure(4.8, 5.0)
    for (name, curve), style in zip(found.items(), line_styles(), strict=False):
        if curve["coverage"]:
            aurc = "n/a" if curve["aurc"] is None else f"{curve['aurc']:.3f}"
            label = f"{name.replace('_', ' ')}: {aurc}"
            wide = 2.4 if name == "failure_score" else 1.2
            axes.plot(curve["coverage"], curve["risk"], **style, linewidth=wide, label=label)
    axes.set(
        xlabel="share of cases kept, least doubtful first", ylabel="failure rate", title="Risk and coverage"
    )
    axes.set(xlim=(0, 1.02), ylim=(-0.02, None))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    axes.legend(frameon=False, title="AURC", fontsize="small", **below)
    return figure


def seeds_by_row(found: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Figure:
    """One panel a metric: each seed of a row as a dot, their mean as a line."""
    figure = Figure(figsize=(3.6 * len(found), 3.2), layout="constrained")
    for number, (title, rows) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        axes.spines[["top", "right"]].set_visible(False)
        for position, (values, colour) in enumerate(
            zip(rows.values(), itertools.cycle(COLOURS), strict=False)
        ):
            known = [value for value in values if value is not None]
            if known:
                axes.scatter([position] * len(known), known, color=colour, alpha=0.7, s=28)
                mean = sum(known) / len(known)
                axes.plot([position - 0.25, position + 0.25], [mean, mean], color=colour, linewidth=2.4)
        axes.set_xticks(range(len(rows)), list(rows), rotation=20, ha="right", rotation_mode="anchor")
        axes.set(title=title)
    return figure


def token_attention(image: np.ndarray, levels: Sequence[np.ndarray]) -> Figure:
    """Where each class-side token looks: a row per level, coarsest first, a column per token.

    image (C, H, W) in 0..1; levels (M, h, w) whose maps each sum to 1. Colours show a weight as a multiple of
    what looking everywhere alike would give, on one scale per level.
    """
    height, width = image.shape[1:]
    grey = image.mean(0)
    tokens = max(len(maps) for maps in levels)
    figure = Figure(
        figsize=(1.5 * tokens + 1.2, 1.5 * len(levels) * height / width + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(levels), tokens, squeeze=False)
    for number, (row, maps) in enumerate(zip(grid, levels, strict=True), start=1):
        relative = maps * maps[0].size
        drawn = None
        for token, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
            if token < len(maps):
                drawn = axes.imshow(
                    relative[token],
                    cmap="magma",
                    alpha=0.6,
                    vmin=0,
                    vmax=max(2.0, float(np.quantile(relative, 0.995))),  # a single pixel may hold most
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )
            if number == 1:
                axes.set_title(f"token {token + 1}", fontsize="small")
        row[0].set_ylabel(f"level {number}, {maps.shape[2]}x{maps.shape[1]}", fontsize="small")
        figure.colorbar(drawn, ax=row[-1], label="times uniform")
    return figure


def _inked(figure: Figure) -> None:
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        for part in (*axes.spines.values(),):
            part.set_edgecolor(INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        legend = axes.get_legend()
        if legend is not None:
            for text in (*legend.get_texts(), legend.get_title()):
                text.set_color(INK)


def svg(figure: Figure) -> str:
    """The figure as an inline SVG without background whose text and axes take the page's text colour."""
    _inked(figure)
    buffer = io.StringIO()
    # A salt of its own keeps the identifiers of two figures on one page apart, and the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"figure {next(_numbers)}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return text.replace(INK, "currentColor")


def write_png(figure: Figure, path: Path) -> None:
    """The figure as a PNG on white, in one step."""
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_color() == INK:
                line.set_color("#444444")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, facecolor="white"))
