"""The report page of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bti_fast.data import Case, read_image
from bti_fast.engine import figures, report, run_folder
from bti_fast.engine.config import TrainConfig
from bti_fast.engine.inference import MASK_THRESHOLD, class_names, predict_images
from bti_fast.engine.options import flag
from bti_fast.engine.pictures import data_uri, overlay
from bti_fast.engine.truth import true_mask
from bti_fast.metrics import case_metrics

PICTURES = 6


def write_train_report(
    folder: Path,
    config: TrainConfig,
    history: Sequence[Mapping[str, Any]],
    best: str,
    counts: Mapping[str, Mapping[str, int]],
    val: Sequence[Case],
    model: Any,
    device: torch.device,
) -> None:
    """Writes report.html: curves, best epochs, cases per split and class, validation pictures, settings."""
    first = [row for row in history if row["stage"] == 1]
    second = [row for row in history if row["stage"] == 2]
    drawings = [
        figures.curves(first, {"train_loss": "training", "val_loss": "validation"}, "loss", "Stage 1: loss"),
        figures.curves(
            first,
            {"val_score": "0.7 IoU + 0.3 accuracy", "val_iou": "IoU", "val_accuracy": "accuracy"},
            "validation",
            "Stage 1: validation",
        ),
        figures.curves(first, {"learning_rate": "step size"}, "step size", "Stage 1: step size"),
    ]
    if second:
        names = {"train_loss": "training", "val_loss": "validation"}
        drawings.append(figures.curves(second, names, "gate loss", "Stage 2: gates"))
    chosen = max(first, key=lambda row: row["val_score"])
    rows = [
        (name, f"{chosen[name]:.4g}")
        for name in chosen
        if isinstance(chosen[name], float) and name != "seconds"
    ]
    sections = {
        "Progress": report.figures(figures.svg(drawing) for drawing in drawings),
        f"Best epoch of stage 1: {chosen['epoch']} of {len(first)}": report.table(("", "value"), rows)
        + report.note(
            "Validation values are at the network's size; bti-fast evaluate works at the images' own."
        ),
        "Validation cases": _pictures(val, model, device),
        "Cases": report.table(
            ("split", *next(iter(counts.values())), "all"),
            [(name, *by_class.values(), sum(by_class.values())) for name, by_class in counts.items()],
        ),
        "Settings": report.table(
            ("setting", "value"), [(flag(name), value) for name, value in dataclasses.asdict(config).items()]
        ),
    }
    seconds = sum(row["seconds"] for row in history)
    subtitle = (
        f"{config.encoder}, interaction {config.interaction}, {config.size} px, {len(history)} epochs in "
        f"{seconds / 60:.1f} min; weights: {best.removesuffix('.safetensors')}"
    )
    report.write_page(folder / run_folder.REPORT, f"Training of {folder.name}", subtitle, sections)


def _pictures(cases: Sequence[Case], model: Any, device: torch.device) -> str:
    """A few validation cases spread over the list, with what the best weights make of them."""
    step = max(1, len(cases) // PICTURES)
    chosen = list(cases[::step])[:PICTURES]
    images = {case.id: read_image(case.image, model.config["in_channels"]) for case in chosen}
    names, items = class_names(model), []
    for case, found in zip(chosen, predict_images(model, images.items(), device=device), strict=True):
        mask, truth = found.mask_prob > MASK_THRESHOLD, true_mask(case, found.mask_prob.shape)
        iou = "" if truth is None else f", IoU {case_metrics(mask, truth)['iou']:.2f}"
        likely = max(range(len(names)), key=found.class_prob.__getitem__)
        caption = (
            f"{case.id}: {names[likely]} {found.class_prob[likely]:.2f} (true: {case.label or '?'}){iou}"
        )
        items.append((data_uri(overlay(images[case.id], mask, truth)), caption))
    return report.pictures(items) + report.note("Orange: predicted mask. Blue: outline of the true one.")
