"""Tables, figures and the page of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bti_fast import metrics
from bti_fast.data import Case, DatasetIndex, read_image
from bti_fast.engine import figures, report, run_folder
from bti_fast.engine.inference import FAILURE_SCORE, MASK_THRESHOLD, predict_images
from bti_fast.engine.pictures import data_uri, overlay, write_picture
from bti_fast.engine.run_config import EvaluateConfig
from bti_fast.engine.truth import true_mask

COMPARED = {
    ("mask", "iou"): "IoU",
    ("mask", "dice"): "Dice",
    ("mask", "sensitivity"): "Sensitivity",
    ("mask", "hd95"): "HD95 (pixels)",
    ("class", "accuracy"): "Accuracy",
    ("class", "macro_f1"): "Macro F1",
    ("class", "macro_auc"): "Macro AUC",
    ("class", "ece"): "ECE",
}


def compared_rows(summary: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row a metric: its name, the network's value, each baseline's, what it is over and what is left
    out."""
    rows = []
    for (group, name), title in COMPARED.items():
        own = summary[group][name]
        others = [metrics.format_value(other[group][name]["value"]) for other in baselines.values()]
        over = f"{own['count']} {own['of']}"
        rows.append([title, metrics.format_value(own["value"]), *others, over, str(own["left_out"])])
    return rows


def print_tables(
    console: Console, summary: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]
) -> None:
    """The summary, and the network beside the predictors that never look at an image."""
    console.print(metrics.render_summary(summary))
    if baselines:
        table = Table(title="Beside predictors that never look at the image")
        for column in ("Metric", "BTI-Net", *baselines):
            table.add_column(column, justify="left" if column == "Metric" else "right")
        for row in compared_rows(summary, baselines):
            table.add_row(*row[:-2])
        console.print(table)


def write_worst(
    folder: Path,
    cases: Sequence[Case],
    rows: Sequence[Mapping[str, Any]],
    model: Any,
    names: Sequence[str],
    count: int,
    device: torch.device,
) -> list[tuple[str, str]]:
    """Draws the `count` worst cases into folder/worst and returns (data address, caption) of each.

    Worst means the lowest IoU; among equals, a wrong class comes first. Cases without any truth are left out.
    """
    judged = [i for i, row in enumerate(rows) if metrics.is_failure(row) is not None]
    chosen = sorted(judged, key=lambda i: _badness(rows[i]))[:count]
    images = [(cases[i].id, read_image(cases[i].image, model.config["in_channels"])) for i in chosen]
    (folder / "worst").mkdir(exist_ok=True)
    items = []
    for rank, (i, (_, image), found) in enumerate(
        zip(chosen, images, predict_images(model, images, device=device), strict=True), start=1
    ):
        row = rows[i]
        truth = true_mask(cases[i], found.mask_prob.shape)
        picture = overlay(image, found.mask_prob > MASK_THRESHOLD, truth)
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(cases[i].id).stem)
        write_picture(folder / "worst" / f"{rank:02d}_{stem}.png", picture)
        likely = metrics.predicted_class(row)
        true = "?" if row["label"] is None else names[row["label"]]
        iou = "IoU n/a" if row["iou"] is None else f"IoU {row['iou']:.2f}"
        caption = f"{cases[i].id}: {iou}, {names[likely]} {row['class_prob'][likely]:.2f} (true: {true})"
        items.append((data_uri(picture), caption))
    return items


def _badness(row: Mapping[str, Any]) -> tuple[float, bool, str]:
    iou = 1.0 if row["iou"] is None else row["iou"]
    return iou, row["label"] is None or metrics.predicted_class(row) == row["label"], row["id"]


def write_evaluate_report(
    folder: Path,
    config: EvaluateConfig,
    weights: Path,
    index: DatasetIndex,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    worst: Sequence[tuple[str, str]],
) -> None:
    """Writes figures/*.png and report.html."""
    signals = summary["failure"]["signals"]
    drawings = {
        "roc": figures.roc(metrics.roc_curves(rows, names)),
        "reliability": figures.reliability(metrics.reliability_curve(rows), summary["class"]["ece"]["value"]),
        "risk_coverage": figures.risk_coverage({name: metrics.risk_coverage(rows, name) for name in signals}),
    }
    (folder / "figures").mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        figures.write_png(drawing, folder / "figures" / f"{name}.png")
    failure = summary["failure"]["rate"]
    sections = {
        "Metrics": report.table(
            ("", "BTI-Net", *baselines, "over", "left out"), compared_rows(summary, baselines)
        )
        + report.note(
            "At the images' own size. n/a: not defined; such cases are left out of the mean and counted. "
            "The other columns are predictors that never look at the image."
        ),
        "Classes": report.table(
            ("class", "cases", "F1", "AUC"),
            [
                (name, found["cases"], metrics.format_value(found["f1"]), metrics.format_value(found["auc"]))
                for name, found in summary["per_class"].items()
            ],
        ),
        "Figures": report.figures(figures.svg(drawing) for drawing in drawings.values()),
        "How well each signal foretells a failure": report.table(
            ("signal", "AUROC", "AURC", "over"),
            [
                (
                    name.replace("_", " "),
                    metrics.format_value(found["auroc"]["value"]),
                    metrics.format_value(found["aurc"]["value"]),
                    found["auroc"]["count"],
                )
                for name, found in signals.items()
            ],
        )
        + report.note(
            f"A failure is an IoU below 0.5 or a wrong class: {metrics.format_value(failure['value'])} of "
            f"{failure['count']} cases. AUROC: higher is better; AURC: lower is better."
            + (" failure score is bti-fast predict's." if FAILURE_SCORE in signals else "")
        ),
        "Worst cases": report.pictures(worst)
        + report.note("Orange: predicted mask. Blue: outline of the true one. Lowest IoU first."),
        "Files left out": report.table(("problem",), [(problem.message,) for problem in index.problems])
        if index.problems
        else "",
    }
    subtitle = f"{summary['cases']} cases ({config.split}) of {index.root.name}; weights {weights.name}"
    report.write_page(folder / run_folder.REPORT, f"Evaluation of {weights.parent.name}", subtitle, sections)
