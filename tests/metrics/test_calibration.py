"""Temperature scaling against a fine grid, a known temperature and its own symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from bti_fast.metrics import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    scaled_probabilities,
)


def sample(cases: int = 4000, classes: int = 3, overconfidence: float = 2.5):
    """Logits that are too large by a factor, and classes drawn from the right probabilities."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(cases, classes)) * 1.5
    labels = np.array([rng.choice(classes, p=row) for row in softmax(true, axis=1)])
    return true * overconfidence, labels


@pytest.mark.parametrize(("classes", "factor"), [(2, 0.4), (3, 2.5), (7, 6.0)])
def test_the_known_temperature_is_found(classes, factor):
    logits, labels = sample(classes=classes, overconfidence=factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.06)


def test_nothing_on_a_fine_grid_is_better():
    logits, labels = sample(300)
    found = fit_temperature(logits, labels)
    grid = np.geomspace(0.06, 19, 3000)
    values = [negative_log_likelihood(logits / t, labels) for t in grid]
    assert negative_log_likelihood(logits / found, labels) <= min(values) + 1e-9
    assert found == pytest.approx(grid[int(np.argmin(values))], rel=5e-3)
    assert fit_temperature(4 * logits, labels) == pytest.approx(4 * found, rel=1e-3)
    assert fit_temperature(logits + 7, labels) == pytest.approx(found, rel=1e-4)


def test_scaling_mends_the_confidence_and_keeps_the_class():
    logits, labels = sample()
    before = scaled_probabilities(logits, 1.0)
    after = scaled_probabilities(logits, fit_temperature(logits, labels))
    assert expected_calibration_error(labels, before) > 0.1
    assert expected_calibration_error(labels, after) < 0.03
    assert (before.argmax(1) == after.argmax(1)).all()
    np.testing.assert_allclose(after, softmax(logits / fit_temperature(logits, labels), axis=1))


def test_extremes_stay_within_bounds():
    logits = np.array([[0.0, 9.0], [0.0, -9.0]] * 10)
    assert fit_temperature(logits, np.array([1, 0] * 10)) == pytest.approx(0.05, rel=1e-3)  # always right
    assert fit_temperature(logits, np.array([0, 1] * 10)) == pytest.approx(20, rel=1e-3)  # always wrong
    with pytest.raises(ValueError, match="N > 0"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=int))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, np.nan], [1.0, 0.0]], [0, 1], "logits: got NaN or Inf in 1 of 2 cases"),
        ([[0.0, 1.0], [1.0, 0.0]], [0, 2], r"labels: got 0 to 2, needs classes 0\.\.1"),
        ([[0.0, 1.0], [1.0, 0.0]], [-1, 0], "labels: got -1 to 0"),
    ],
)
def test_nothing_is_fitted_to_what_is_no_logit_or_class(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(np.array(logits), np.array(labels))
