"""How well a signal foretells that a case fails: AUROC, and the area under the risk-coverage curve (AURC)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from bti_fast.metrics.rows import is_failure


def signals_and_failures(rows: Iterable[Mapping], signal: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Signal values (n,), failures bool (n,), and how many rows lack a finite signal or any truth."""
    values, failures, left_out = [], [], 0
    for row in rows:
        value, failed = row["failure_signals"].get(signal), is_failure(row)
        if failed is None or value is None or not math.isfinite(value):
            left_out += 1
            continue
        values.append(value)
        failures.append(failed)
    return np.array(values, dtype=np.float64), np.array(failures, dtype=bool), left_out


def failure_auroc(values: np.ndarray, failures: np.ndarray) -> float | None:
    """AUROC of "this case fails" (higher value = failure more likely); None unless some fail and some do
    not."""
    return float(roc_auc_score(failures, values)) if _ranks(failures) else None


def failure_aurc(values: np.ndarray, failures: np.ndarray) -> float | None:
    """Mean over n = 1..N of the failure rate among the n cases of lowest value; lower is better.

    Equal values count as in random order (the expectation over their orders). None unless some cases fail
    and some do not: without a failure every signal would look perfect.
    """
    return float(selective_risk(values, failures).mean()) if _ranks(failures) else None


def selective_risk(values: np.ndarray, failures: np.ndarray) -> np.ndarray:
    """Failure rate among the n cases of lowest value for n = 1..N, (N,), ties in expectation."""
    if not len(values):
        return np.zeros(0)
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    rate = np.bincount(group, weights=failures) / size
    return np.cumsum(np.repeat(rate, size)) / np.arange(1, len(values) + 1)


def risk_coverage(rows: Iterable[Mapping], signal: str) -> dict[str, Any]:
    """The risk-coverage curve of a signal (named as in SIGNALS): {"coverage", "risk", "aurc", "left_out"}.

    Coverage n/N accepts the n cases of lowest signal, risk is the failure rate among them; empty lists
    where no row has the signal and a truth.
    """
    values, failures, left_out = signals_and_failures(rows, signal)
    count = len(values)
    return {
        "coverage": (np.arange(1, count + 1) / max(count, 1)).tolist(),
        "risk": selective_risk(values, failures).tolist(),
        "aurc": failure_aurc(values, failures),
        "left_out": left_out,
    }


def _ranks(failures: np.ndarray) -> bool:
    return bool(failures.any()) and not bool(failures.all())
