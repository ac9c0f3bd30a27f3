"""Every metric of SPEC §7 for a trained network on a split, as a table, JSON, figures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bti_fast import metrics
from bti_fast.data import Case, read_image, read_mask
from bti_fast.engine import run_folder
from bti_fast.engine.files import write_csv, write_json
from bti_fast.engine.inference import FAILURE_SCORE
from bti_fast.engine.run_config import EvaluateConfig
from bti_fast.engine.subject import OVERLAP, open_subject
from bti_fast.engine.truth import true_mask

RESULT = "metrics.json"
CASES = "cases.csv"


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
    subject, folder = open_subject(config, f"evaluate-{config.split}", RESULT, encoder, console)
    model, names, index, device = subject.model, subject.names, subject.index, subject.device
    cases = subject.cases(config.split)
    labels = [subject.label(case) for case in cases]
    rows = subject.rows(cases, config.batch_size)
    summary = metrics.summarise(rows, names)
    summary["failure"]["signals"][FAILURE_SCORE] = _failure_score_metrics(rows)
    baselines = _baselines(subject.splits.get("train", []), cases, labels, names)

    from bti_fast.engine.evaluate_report import print_tables, write_evaluate_report, write_worst

    worst = write_worst(folder, cases, rows, model, names, config.worst, device)
    write_evaluate_report(folder, config, subject.weights, index, rows, summary, baselines, names, worst)
    write_csv(folder / CASES, [_flat(row, names) for row in rows])
    write_json(
        folder / RESULT,
        {
            "model": str(subject.weights),
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
