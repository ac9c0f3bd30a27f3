"""Every metric of SPEC §7 for a trained network on a split, as a table, JSON, figures and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bti_fast import metrics
from bti_fast.data import Case, DatasetIndex, read_dataset, read_image, read_mask
from bti_fast.engine import run_folder
from bti_fast.engine.config import EvaluateConfig
from bti_fast.engine.device import choose_device, set_threads
from bti_fast.engine.files import output_folder, write_csv, write_json
from bti_fast.engine.inference import (
    FAILURE_SCORE,
    MASK_THRESHOLD,
    Prediction,
    class_names,
    predict_images,
)
from bti_fast.engine.loaders import read_split
from bti_fast.engine.truth import true_mask
from bti_fast.errors import UserError

RESULT = "metrics.json"
CASES = "cases.csv"
OVERLAP = ("iou", "dice", "sensitivity", "hd95")


@dataclass(frozen=True)
class Evaluation:
    """Where the results lie, and the numbers: metrics.summarise's dict for the network and for each
    baseline."""

    folder: Path
    summary: dict[str, Any]
    baselines: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]


def evaluate(
    config: EvaluateConfig, *, encoder: torch.nn.Module | None = None, console: Console | None = None
) -> Evaluation:
    """Evaluates a run folder or a model.safetensors at the images' own size; writes metrics.json, cases.csv,
    figures/*.png, worst/*.png and report.html to config.out.

    The run's own division into splits is used again. encoder is needed where the network was trained with
    one of its own. UserError for bad input, before anything is computed or written.
    """
    console = console or Console(stderr=True)
    config = config.checked()
    weights, run = run_folder.find_model(config.model)
    if config.out is None and run is None:
        raise UserError(f"{weights}: lies in no run folder, so say where the results go with --out DIR")
    target = Path(config.out) if config.out is not None else run / f"evaluate-{config.split}"
    if config.data is None and run is None:
        raise UserError(f"{weights}: lies in no run folder, so name the images with --data PATH")
    folder = output_folder(target, marker=RESULT, overwrite=config.overwrite)
    device = choose_device(config.device)
    set_threads(config.threads)
    model = run_folder.load_model(weights, encoder)
    names = class_names(model)
    index = _read(config, run, console)
    splits = read_split(run, index) if run is not None and config.split != "all" else {}
    cases = _chosen(config, index, splits, weights)
    labels = [_label(case, names, weights) for case in cases]

    rows = []
    found = predict_images(model, _images(cases, model), batch_size=config.batch_size, device=device)
    for case, label, prediction in zip(cases, labels, found, strict=True):
        rows.append(case_row(case, label, prediction))
    summary = metrics.summarise(rows, names)
    summary["failure"]["signals"][FAILURE_SCORE] = _failure_score_metrics(rows)
    baselines = _baselines(splits.get("train", []), cases, labels, names)

    from bti_fast.engine.evaluate_report import print_tables, write_evaluate_report, write_worst

    worst = write_worst(folder, cases, rows, model, names, config.worst, device)
    write_evaluate_report(folder, config, weights, index, rows, summary, baselines, names, worst)
    write_csv(folder / CASES, [_flat(row, names) for row in rows])
    write_json(
        folder / RESULT,
        {
            "model": str(weights),
            "data": str(index.root),
            "split": config.split,
            "summary": summary,
            "baselines": baselines,
            "problems": [problem.message for problem in index.problems],
        },
    )
    print_tables(console, summary, baselines)
    console.print(f"report: {folder / run_folder.REPORT}", markup=False, highlight=False, soft_wrap=True)
    return Evaluation(folder, summary, baselines, rows)


def case_row(case: Case, label: int | None, prediction: Prediction) -> dict[str, Any]:
    """One case as metrics.CaseRow: overlap at the image's own size, class probabilities, failure signals."""
    truth = true_mask(case, prediction.mask_prob.shape)
    overlap: Mapping[str, float | None] = dict.fromkeys(OVERLAP)
    if truth is not None:
        overlap = metrics.case_metrics(prediction.mask_prob > MASK_THRESHOLD, truth)
    return {
        "id": case.id,
        **overlap,
        "label": label,
        "class_prob": prediction.class_prob,
        "failure_signals": prediction.failure_signals(),
    }


def _read(config: EvaluateConfig, run: Path | None, console: Console) -> DatasetIndex:
    stored = run_folder.read_config(run) if run is not None else None
    if config.data is not None:
        index = read_dataset(config.data, config.layout)
    else:
        if not Path(stored.data).exists():
            raise UserError(
                f"{stored.data}: the run's data are not there any more; name them with --data PATH"
            )
        index = read_dataset(stored.data, stored.layout)
    for problem in index.problems:
        console.print(f"warning: {problem.message}", markup=False, highlight=False, soft_wrap=True)
    return index


def _chosen(
    config: EvaluateConfig, index: DatasetIndex, splits: dict[str, list[Case]], weights: Path
) -> Sequence[Case]:
    """The cases to evaluate; UserError where there are none."""
    if config.split == "all":
        return index.cases
    if splits:
        cases: Sequence[Case] = splits[config.split]
        why = "the run was trained with a split of that size"
    else:
        cases = [case for case in index.cases if case.split == config.split]
        why = (
            f"{weights} does not say what it was trained on, the data declare no such split; give --split all"
        )
    if not cases:
        raise UserError(f"{index.root}: no {config.split} cases ({why})")
    return cases


def _label(case: Case, names: Sequence[str], weights: Path) -> int | None:
    if case.label is None:
        return None
    if case.label not in names:
        raise UserError(
            f"{case.image}: class {case.label!r} is unknown to {weights}, which has {', '.join(names)}"
        )
    return names.index(case.label)


def _images(cases: Sequence[Case], model: Any) -> Iterator[tuple[str, np.ndarray]]:
    for case in cases:
        yield case.id, read_image(case.image, model.config["in_channels"])


def _failure_score_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AUROC and AURC of the failure score, in the shape summarise gives for its own signals."""
    pairs = [(row["failure_signals"][FAILURE_SCORE], metrics.is_failure(row)) for row in rows]
    known = [(value, failed) for value, failed in pairs if failed is not None]
    values, failures = np.array([v for v, _ in known]), np.array([f for _, f in known], dtype=bool)
    frame = {"count": len(known), "left_out": len(pairs) - len(known), "of": "cases"}
    return {
        "auroc": {"value": metrics.failure_auroc(values, failures), **frame},
        "aurc": {"value": metrics.failure_aurc(values, failures), **frame},
    }


def _baselines(
    train: Sequence[Case], cases: Sequence[Case], labels: Sequence[int | None], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Summaries of the predictors that never look at an image; only those that the training cases allow."""
    found = {}
    known = [names.index(case.label) for case in train if case.label in names]
    if known:
        rows = metrics.majority_class_baseline(known, labels, len(names))
        found["majority class"] = metrics.summarise(rows, names)
    truths = [mask for case in cases if (mask := _own_size_mask(case)) is not None]
    trained = [mask for case in train if (mask := _own_size_mask(case)) is not None]
    if trained and truths:
        found["mean mask"] = metrics.summarise(metrics.mean_mask_baseline(trained, truths), names)
    return found


def _own_size_mask(case: Case) -> np.ndarray | None:
    if not case.mask_known:
        return None
    size = read_mask(case.masks[0]).shape if case.masks else read_image(case.image, 1).shape[1:]
    return true_mask(case, size)


def _flat(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A row of cases.csv."""
    failed = metrics.is_failure(row)
    return {
        "id": row["id"],
        **{name: row[name] for name in OVERLAP},
        "class": None if row["label"] is None else names[row["label"]],
        "predicted": names[metrics.predicted_class(row)],
        **{f"prob_{name}": value for name, value in zip(names, row["class_prob"], strict=True)},
        **row["failure_signals"],
        "failed": None if failed is None else int(failed),
    }
