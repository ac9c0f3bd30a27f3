"""Thresholds for referring cases, and intervals by resampling, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from bti_fast.metrics import (
    auroc_interval,
    choose_threshold,
    failure_auroc,
    judge_threshold,
    paired_interval,
)


def test_by_hand():
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    failures = np.array([False, False, True, False, True])
    assert choose_threshold(values, failures, 0.25) == (0.4, 0.8, 0.25)
    assert choose_threshold(values, failures, 0.2) == (0.2, 0.4, 0.0)
    assert choose_threshold(values, failures, 0.4) == (0.5, 1.0, 0.4)
    assert choose_threshold(values, np.ones(5, bool), 0.5) == (None, 0.0, None)
    assert judge_threshold(values, failures, 0.3) == (0.3, 0.6, pytest.approx(1 / 3))
    assert judge_threshold(values, failures, None) == (None, 0.0, None)
    with pytest.raises(ValueError, match="at least one case"):
        choose_threshold(np.zeros(0), np.zeros(0, bool), 0.1)


def test_cases_of_one_value_are_not_parted():
    values = np.array([0.1, 0.5, 0.5, 0.5, 0.9])
    failures = np.array([False, False, False, True, True])
    assert choose_threshold(values, failures, 0.1) == (0.1, 0.2, 0.0)
    assert choose_threshold(values, failures, 0.25) == (0.5, 0.8, 0.25)


def test_against_every_threshold_there_is():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, 12, 30) / 10
        failures = rng.random(30) < values / 2
        found = choose_threshold(values, failures, 0.15)
        allowed = [t for t in values if failures[values <= t].mean() <= 0.15]
        assert found.threshold == (max(allowed) if allowed else None)
        judged = judge_threshold(values, failures, found.threshold)
        assert judged[:2] == found[:2] and judged.failure_rate == pytest.approx(found.failure_rate)


def test_interval_of_the_auroc():
    rng = np.random.default_rng(1)
    failures = rng.random(400) < 0.3
    values = rng.normal(size=400) + failures
    low, high = auroc_interval(values, failures)
    assert low < failure_auroc(values, failures) < high
    # Hanley and McNeil's standard error for 0.76 with these counts is about 0.027.
    assert 0.07 < high - low < 0.14
    assert auroc_interval(values, failures) == (low, high)
    assert auroc_interval(list(values), failures.astype(int)) == (low, high)
    assert auroc_interval(values, np.zeros(400, bool)) is None
    assert auroc_interval(np.arange(4.0), np.array([False, False, True, True])) == (1.0, 1.0)


def test_interval_of_paired_differences():
    rng = np.random.default_rng(2)
    shared = rng.normal(0.1, 1, 400)
    low, high = paired_interval(np.stack([shared] * 3))
    error = shared.std() / 20
    assert low == pytest.approx(shared.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(shared.mean() + 1.96 * error, abs=0.15 * error)
    # Seeds that disagree widen it, though each alone is certain.
    low, high = paired_interval(np.array([[0.0] * 50, [1.0] * 50]))
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="finite numbers"):
        paired_interval(np.array([[np.nan]]))
