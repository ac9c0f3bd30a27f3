"""Temperature scaling of both heads: fitted on validation, judged on test, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bti_fast import metrics
from bti_fast.data import Case, read_image, resize_mask
from bti_fast.engine import figures, inference, report, run_folder
from bti_fast.engine.files import write_json
from bti_fast.engine.run_config import CalibrateConfig
from bti_fast.engine.subject import Subject, open_subject
from bti_fast.engine.truth import true_mask
from bti_fast.errors import UserError

RESULT = "calibration.json"
HEADS = {"class": "Class", "mask": "Mask (pixels)"}
# At most this many pixels a split: enough for a single number, whatever the size of the data set.
MAX_PIXELS = 4_000_000


@dataclass(frozen=True)
class Calibration:
    """Where the results lie, the temperature of each head, and before and after by split and head."""

    folder: Path
    temperature: dict[str, float]
    found: dict[str, dict[str, Any]]


def calibrate(
    config: CalibrateConfig, *, encoder: torch.nn.Module | None = None, console: Console | None = None
) -> Calibration:
    """Fits one temperature a head on the validation cases and stores both in the checkpoint's metadata, from
    where every later prediction takes them; masks and classes stay, confidences change.

    Reports ECE and likelihood before and after, on validation and on test cases: calibration.json,
    figures/*.png, report.html. A threshold for referring cases that the checkpoint had is dropped, as it was
    chosen for other confidences. UserError for bad input and where validation has neither mask nor class.
    """
    console = console or Console(stderr=True)
    subject, folder = open_subject(config, "calibration", RESULT, encoder, console, stores=True)
    if subject.model.config["seg_classes"] != 1:
        raise UserError(f"{subject.weights}: has several mask classes; calibration knows lesion or not")
    stale = dict(subject.model.metadata)
    subject.model.metadata = {
        k: v for k, v in stale.items() if k not in (inference.TEMPERATURE, inference.REFERRAL)
    }
    heads = {"val": _logits(subject, subject.cases("val"), config.batch_size)}
    try:
        temperature = {
            head: metrics.fit_temperature(*known) for head, known in heads["val"].items() if len(known[1])
        }
    except ValueError as cause:  # a network that has diverged
        raise UserError(f"{subject.weights}: cannot be calibrated ({cause})") from cause
    if not temperature:
        raise UserError(f"{subject.index.root}: no validation case has a mask or a class to calibrate by")
    if subject.splits.get("test") or any(case.split == "test" for case in subject.index.cases):
        heads["test"] = _logits(subject, subject.cases("test"), config.batch_size)
    found = {
        split: {head: _judge(*by_head[head], t) for head, t in temperature.items() if len(by_head[head][1])}
        for split, by_head in heads.items()
    }
    for head, value in temperature.items():
        if value > 0.99 * metrics.HIGHEST_TEMPERATURE:
            text = (
                f"the {head} head's temperature is at its limit, {value:.0f}: its confidences say nothing yet"
            )
            console.print(f"warning: {text}; train longer", markup=False, highlight=False, soft_wrap=True)
    metadata = {**subject.model.metadata, inference.TEMPERATURE: temperature}
    run_folder.save_weights(subject.weights, subject.model, metadata)
    if inference.REFERRAL in stale:
        text = "the threshold for referring cases was chosen before and is dropped; run failures again"
        console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)
    write_json(
        folder / RESULT,
        {"model": str(subject.weights), "temperature": temperature, "splits": _without_bins(found)},
    )
    _report(folder, subject, temperature, found)
    console.print(_table(temperature, found))
    console.print(f"report: {folder / run_folder.REPORT}", markup=False, highlight=False, soft_wrap=True)
    return Calibration(folder, temperature, found)


def _logits(
    subject: Subject, cases: Sequence[Case], batch_size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(logits (N, L), labels (N,)) of each head over the cases that have its truth; for the mask, pixels at
    the network's size as [0, z] of a yes-or-no head."""
    rows: list[np.ndarray] = []
    labels: list[int] = []
    pixels, truths = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    rng = np.random.default_rng(0)
    known = [case for case in cases if case.mask_known or case.label is not None]
    for start in range(0, len(known), batch_size):
        batch = known[start : start + batch_size]
        channels = subject.model.config["in_channels"]
        images = [read_image(case.image, channels) for case in batch]
        inputs = inference.network_input(subject.model.to(subject.device), images, subject.device)
        with torch.inference_mode():
            seg, cls = inference.scaled_logits(subject.model, subject.model(inputs))
        for case, image, z, row in zip(
            batch, images, seg[:, 0].double().cpu(), cls.double().cpu(), strict=True
        ):
            label = subject.label(case)
            if label is not None:
                rows.append(row.numpy())
                labels.append(label)
            if case.mask_known:
                mask = resize_mask(true_mask(case, image.shape[1:]), tuple(z.shape)).ravel()
                share = min(mask.size, max(1, MAX_PIXELS // len(known)))
                chosen = rng.choice(mask.size, share, replace=False) if share < mask.size else slice(None)
                pixels.append(z.numpy().ravel()[chosen])
                truths.append(mask[chosen].astype(np.int64))
    flat = np.concatenate(pixels)
    return {
        "class": (np.array(rows).reshape(len(rows), len(subject.names)), np.array(labels, dtype=np.int64)),
        "mask": (np.stack([np.zeros_like(flat), flat], axis=1), np.concatenate(truths)),
    }


def _judge(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """ECE, likelihood and reliability before and after, and over how many cases or pixels."""
    found: dict[str, Any] = {"count": len(labels)}
    for name, t in (("before", 1.0), ("after", temperature)):
        probs = metrics.scaled_probabilities(logits, t)
        found[name] = {
            "ece": metrics.expected_calibration_error(labels, probs),
            "nll": metrics.negative_log_likelihood(logits / t, labels),
            "bins": metrics.reliability_bins(labels, probs),
        }
    return found


def _without_bins(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def plain(judged: dict[str, Any]) -> dict[str, Any]:
        return {
            "count": judged["count"],
            **{name: {k: judged[name][k] for k in ("ece", "nll")} for name in ("before", "after")},
        }

    return {split: {head: plain(judged) for head, judged in heads.items()} for split, heads in found.items()}


def _rows(temperature: dict[str, float], found: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for split, heads in found.items():
        for head, judged in heads.items():
            values = [f"{judged[when][key]:.4f}" for key in ("ece", "nll") for when in ("before", "after")]
            rows.append([HEADS[head], split, f"{temperature[head]:.3f}", *values, str(judged["count"])])
    return rows


COLUMNS = ("Head", "Split", "Temperature", "ECE before", "ECE after", "NLL before", "NLL after", "Over")


def _table(temperature: dict[str, float], found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Calibration: temperatures fitted on validation")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("Head", "Split") else "right")
    for row in _rows(temperature, found):
        table.add_row(*row)
    return table


def _report(
    folder: Path, subject: Subject, temperature: dict[str, float], found: dict[str, dict[str, Any]]
) -> None:
    (folder / "figures").mkdir(exist_ok=True)
    drawings = {}
    for split, heads in found.items():
        for head, judged in heads.items():
            for when in ("before", "after"):
                title = f"{HEADS[head]}, {split}, {when} scaling"
                drawing = figures.reliability(judged[when]["bins"], judged[when]["ece"], title)
                drawings[f"{split}_{head}_{when}"] = drawing
                figures.write_png(drawing, folder / "figures" / f"{split}_{head}_{when}.png")
    note = (
        "Temperatures are fitted on the validation cases, so believe the test rows. Pixels of "
        "an image are not independent, and most are background: their ECE is small whatever the outline is."
    )
    sections = {
        "Before and after": report.table(COLUMNS, _rows(temperature, found)) + report.note(note),
        "Reliability": report.figures(figures.svg(drawing) for drawing in drawings.values()),
    }
    title = f"Calibration of {subject.weights.parent.name}"
    report.write_page(folder / run_folder.REPORT, title, f"weights {subject.weights.name}", sections)
