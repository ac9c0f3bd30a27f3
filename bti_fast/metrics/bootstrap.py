"""Intervals for metrics of few cases, by resampling the cases."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def auroc_interval(
    values: np.ndarray, failures: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of failure_auroc, resampling failures and successes each among themselves.

    None unless some cases fail and some do not.
    """
    values, failures = np.asarray(values), np.asarray(failures, dtype=bool)
    failed, fine = values[failures], values[~failures]
    if not len(failed) or not len(fine):
        return None
    above = (failed[:, None] > fine[None, :]) + 0.5 * (failed[:, None] == fine[None, :])
    rng = np.random.default_rng(seed)
    rows, columns = (_counts(rng, len(group), resamples) for group in (failed, fine))
    found = ((rows @ above) * columns).sum(1) / (len(failed) * len(fine))
    return _percentiles(found)


def paired_interval(
    differences: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences (seeds, cases), resampling both.

    Cases are drawn alike for all seeds, as they are the same cases. ValueError for an empty or NaN array.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 2 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(
            f"differences: got shape {differences.shape}, needs finite numbers (seeds, cases), at least 1 x 1"
        )
    seeds, cases = differences.shape
    rng = np.random.default_rng(seed)
    rows, columns = _counts(rng, seeds, resamples), _counts(rng, cases, resamples)
    return _percentiles(((rows @ differences) * columns).sum(1) / (seeds * cases))


def _counts(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """How often each of `size` members is drawn in each resample, (resamples, size)."""
    return rng.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def _percentiles(found: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
