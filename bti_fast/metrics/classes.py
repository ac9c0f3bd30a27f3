"""Metrics of the diagnosis over the cases whose class is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from bti_fast.metrics.rows import check_probabilities

ECE_BINS = 15


def labelled(rows: Iterable[Mapping], classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and class probabilities (n, L) of the rows whose class is known.

    ValueError, naming the case, for a label out of range or probabilities that are not L finite numbers.
    """
    labels, probs = [], []
    for row in rows:
        if row["label"] is None:
            continue
        if not 0 <= row["label"] < len(classes):
            raise ValueError(f"case {row['id']}: label is {row['label']}, needs 0..{len(classes) - 1}")
        labels.append(int(row["label"]))
        probs.append(check_probabilities(row, len(classes)))
    return np.array(labels, dtype=np.int64), np.array(probs, dtype=np.float64).reshape(-1, len(classes))


def class_f1(labels: np.ndarray, probs: np.ndarray) -> list[float | None]:
    """F1 of each class; None for a class that is neither true nor predicted anywhere."""
    if not len(labels):
        return [None] * probs.shape[1]
    every = list(range(probs.shape[1]))
    scores = f1_score(labels, probs.argmax(1), labels=every, average=None, zero_division=np.nan)
    return [None if np.isnan(score) else float(score) for score in scores]


def class_auc(labels: np.ndarray, probs: np.ndarray) -> list[float | None]:
    """One-against-the-rest AUC of each class; None for a class that no case or every case has."""
    return [
        float(roc_auc_score(labels == k, probs[:, k])) if _two_kinds(labels == k) else None
        for k in range(probs.shape[1])
    ]


def _two_kinds(truth: np.ndarray) -> bool:
    return bool(truth.any()) and not bool(truth.all())


def reliability_bins(labels: np.ndarray, probs: np.ndarray, bins: int = ECE_BINS) -> dict[str, list]:
    """Cases binned by the confidence of the predicted class, in equal bins [i/n, (i+1)/n), the last one
    closed.

    Lists of length bins: lower and upper edge, count, mean confidence and accuracy (None in an empty bin).
    """
    confidence = probs.max(1, initial=0)
    correct = probs.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    found: dict[str, list] = {"lower": edges[:-1].tolist(), "upper": edges[1:].tolist()}
    members = [index == i for i in range(bins)]
    found["count"] = [int(m.sum()) for m in members]
    found["confidence"] = [float(confidence[m].mean()) if m.any() else None for m in members]
    found["accuracy"] = [float(correct[m].mean()) if m.any() else None for m in members]
    return found


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray, bins: int = ECE_BINS) -> float | None:
    """Mean over the cases of |accuracy - confidence| of their bin (see reliability_bins); None without
    cases."""
    if not len(labels):
        return None
    found = reliability_bins(labels, probs, bins)
    gaps = [
        n * abs(a - c)
        for n, a, c in zip(found["count"], found["accuracy"], found["confidence"], strict=True)
        if n
    ]
    return float(sum(gaps) / len(labels))


def reliability_curve(rows: Iterable[Mapping], bins: int = ECE_BINS) -> dict[str, list]:
    """reliability_bins of the rows whose class is known; the data of a reliability diagram."""
    rows = list(rows)
    width = max((len(row["class_prob"]) for row in rows), default=1)
    return reliability_bins(*labelled(rows, [""] * width), bins)


def roc_curves(rows: Iterable[Mapping], classes: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """One-against-the-rest ROC curve of each class: {"fpr", "tpr", "auc"}, or None where it is not
    defined."""
    labels, probs = labelled(rows, classes)
    curves: dict[str, dict[str, Any] | None] = {}
    for k, (name, auc) in enumerate(zip(classes, class_auc(labels, probs), strict=True)):
        if auc is None:
            curves[name] = None
            continue
        fpr, tpr, _ = roc_curve(labels == k, probs[:, k])
        curves[name] = {"fpr": fpr.tolist(), "tpr": tpr.tolist(), "auc": auc}
    return curves
