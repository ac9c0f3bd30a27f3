"""From a failure signal to a decision: which cases a person should look at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bti_fast.metrics.failure import selective_risk


class Referral(NamedTuple):
    """Cases with a signal above `threshold` are referred.

    threshold is None where even the best cases fail more often than asked for: then every case is. coverage
    is the share kept, failure_rate that of the failures among them (None if none are kept).
    """

    threshold: float | None
    coverage: float
    failure_rate: float | None


def choose_threshold(values: np.ndarray, failures: np.ndarray, target: float) -> Referral:
    """The threshold that keeps most cases with at most a share `target` (0 to 1) of failures among them.

    values (N,) higher = failure more likely, failures bool (N,). Cases of one value are kept or referred
    together. The rate is that of these cases: on new ones it is an estimate. ValueError without cases.
    """
    if not len(values):
        raise ValueError("values: got none, needs at least one case")
    order = np.sort(values)
    risk = selective_risk(values, failures)
    ends = np.append(order[1:] > order[:-1], True)
    good = np.flatnonzero(ends & (risk <= target + 1e-12))
    if not len(good):
        return Referral(None, 0.0, None)
    return Referral(float(order[good[-1]]), float((good[-1] + 1) / len(values)), float(risk[good[-1]]))


def judge_threshold(values: np.ndarray, failures: np.ndarray, threshold: float | None) -> Referral:
    """What a threshold chosen elsewhere does to these cases."""
    kept = values <= threshold if threshold is not None else np.zeros(len(values), dtype=bool)
    rate = float(failures[kept].mean()) if kept.any() else None
    return Referral(threshold, float(kept.mean()) if len(kept) else 0.0, rate)
