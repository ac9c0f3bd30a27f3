"""All metrics of SPEC §7 over the cases of an evaluation, as JSON-able numbers and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bti_fast.metrics.classes import ECE_BINS, class_auc, class_f1, expected_calibration_error, labelled
from bti_fast.metrics.failure import failure_aurc, failure_auroc, signals_and_failures
from bti_fast.metrics.rows import SIGNALS, is_failure

if TYPE_CHECKING:
    from rich.console import RenderableType

MASK_METRICS = {"iou": "IoU", "dice": "Dice", "sensitivity": "Sensitivity", "hd95": "HD95 (pixels)"}
CLASS_METRICS = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "macro_auc": "Macro AUC",
    "ece": f"ECE ({ECE_BINS} bins)",
}


def summarise(rows: Iterable[Mapping], classes: Sequence[str]) -> dict[str, Any]:
    """Every metric of SPEC §7 over rows (CaseRow), fit for JSON.

    {"cases": n, "classes": [...], "mask": {iou, dice, sensitivity, hd95}, "class": {accuracy, macro_f1,
    macro_auc, ece}, "per_class": {name: {cases, f1, auc}}, "failure": {"rate": ..., "signals": {name: {auroc,
    aurc}}}}. Each metric is {"value": float | None, "count": what it is over, "left_out": what it is not
    defined or known for, "of": "cases" | "classes"}; a value of None means not defined and reads "n/a".
    ValueError naming the case for a label or probabilities that do not fit classes.
    """
    rows = list(rows)
    labels, probs = labelled(rows, classes)
    unlabelled = len(rows) - len(labels)
    f1, auc = class_f1(labels, probs), class_auc(labels, probs)
    accuracy = float((probs.argmax(1) == labels).mean()) if len(labels) else None
    failed = [is_failure(row) for row in rows]
    names = [name for name in SIGNALS if any(name in row["failure_signals"] for row in rows)]
    return {
        "cases": len(rows),
        "classes": list(classes),
        "mask": {name: mean_of([row[name] for row in rows], "cases") for name in MASK_METRICS},
        "class": {
            "accuracy": _metric(accuracy, len(labels), unlabelled, "cases"),
            "macro_f1": mean_of(f1, "classes"),
            "macro_auc": mean_of(auc, "classes"),
            "ece": _metric(expected_calibration_error(labels, probs), len(labels), unlabelled, "cases"),
        },
        "per_class": {
            name: {"cases": int((labels == k).sum()), "f1": f1[k], "auc": auc[k]}
            for k, name in enumerate(classes)
        },
        "failure": {
            "rate": mean_of(failed, "cases"),
            "signals": {name: _signal(rows, name) for name in names},
        },
    }


def mean_of(values: Sequence[float | None], of: str) -> dict[str, Any]:
    """Mean of the values that are defined, with the count of those left out."""
    defined = [float(value) for value in values if value is not None]
    mean = sum(defined) / len(defined) if defined else None
    return _metric(mean, len(defined), len(values) - len(defined), of)


def _signal(rows: Sequence[Mapping], name: str) -> dict[str, Any]:
    values, failures, left_out = signals_and_failures(rows, name)
    scores = {"auroc": failure_auroc(values, failures), "aurc": failure_aurc(values, failures)}
    return {key: _metric(score, len(values), left_out, "cases") for key, score in scores.items()}


def _metric(value: float | None, count: int, left_out: int, of: str) -> dict[str, Any]:
    return {"value": value, "count": count, "left_out": left_out, "of": of}


def format_value(value: float | None) -> str:
    """A metric's value as text, three decimals, "n/a" for None."""
    return "n/a" if value is None else f"{value:.3f}"


def render_summary(summary: Mapping[str, Any]) -> RenderableType:
    """The summary as rich tables: metrics, classes, failure signals."""
    from rich.console import Group
    from rich.table import Table

    def row_of(metric: Mapping[str, Any]) -> list[str]:
        return [format_value(metric["value"]), f"{metric['count']} {metric['of']}", str(metric["left_out"])]

    metrics = Table(title=f"Metrics over {summary['cases']} cases")
    for column in ("Metric", "Value", "Over", "Left out"):
        metrics.add_column(column, justify="left" if column == "Metric" else "right")
    for group, names in (("mask", MASK_METRICS), ("class", CLASS_METRICS)):
        for name, title in names.items():
            metrics.add_row(title, *row_of(summary[group][name]), end_section=name == "hd95")
    metrics.add_section()
    metrics.add_row("Failures (IoU < 0.5 or wrong class)", *row_of(summary["failure"]["rate"]))

    per_class = Table(title="Classes")
    for column in ("Class", "Cases", "F1", "AUC"):
        per_class.add_column(column, justify="left" if column == "Class" else "right")
    for name, found in summary["per_class"].items():
        per_class.add_row(name, str(found["cases"]), format_value(found["f1"]), format_value(found["auc"]))

    signals = Table(title="How well each signal foretells a failure")
    for column in ("Signal", "AUROC", "AURC", "Over", "Left out"):
        signals.add_column(column, justify="left" if column == "Signal" else "right")
    for name, found in summary["failure"]["signals"].items():
        signals.add_row(name, format_value(found["auroc"]["value"]), *row_of(found["aurc"]))
    return Group(metrics, per_class, *([signals] if summary["failure"]["signals"] else []))
