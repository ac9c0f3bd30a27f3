"""Step size and stopping, against cases worked out by hand from SPEC §6."""

from __future__ import annotations

import math

import pytest

from bti_fast.engine.schedule import Counters, cosine_share


def test_cosine_share() -> None:
    assert cosine_share(0.0, 0.03) == 1.0
    assert cosine_share(0.5, 0.03) == pytest.approx(0.515)  # halfway between 1 and 0.03
    assert cosine_share(1.0, 0.03) == pytest.approx(0.03)
    assert cosine_share(1 / 3, 0.0) == pytest.approx(0.75)  # (1 + cos 60°) / 2
    assert cosine_share(2.0, 0.03) == pytest.approx(0.03)


def test_plateau_then_cooldown() -> None:
    """Seven stalled epochs shrink the step; then two of rest and seven more until it shrinks again."""
    counters = Counters()
    factors = []
    for epoch in range(1 + 7 + 2 + 7):
        counters.update(
            epoch, 0.5, min_progress=0.004, plateau_factor=0.55, plateau_patience=7, plateau_cooldown=2
        )
        factors.append(counters.factor)
    assert factors == [1.0] * 7 + [0.55] * 9 + [pytest.approx(0.55**2)]
    assert counters.stalled == 16


def test_small_gains_are_no_progress_but_are_kept() -> None:
    """+0.003 an epoch: each is the best so far, and progress only when the sum reaches 0.004."""
    counters = Counters()
    assert counters.update(0, 0.500, min_progress=0.004)
    assert counters.update(1, 0.503, min_progress=0.004) and counters.stalled == 1
    assert counters.update(2, 0.506, min_progress=0.004) and counters.stalled == 0
    assert not counters.update(3, 0.505, min_progress=0.004) and counters.stalled == 1
    assert (counters.best_epoch, counters.best_score, counters.reference) == (2, 0.506, 0.506)


def test_equal_scores_are_no_progress() -> None:
    counters = Counters()
    counters.update(0, -1.0, min_progress=0.0)
    assert not counters.update(1, -1.0, min_progress=0.0)
    assert counters.stalled == 1


def test_state_survives_the_round_trip() -> None:
    counters = Counters()
    for epoch, score in enumerate((0.1, 0.2, 0.2, 0.1)):
        counters.update(epoch, score, min_progress=0.004, plateau_factor=0.55, plateau_patience=2)
    again = Counters(**counters.state_dict())
    assert again == counters and again.factor == 0.55
    assert math.isinf(Counters(**Counters().state_dict()).reference)
