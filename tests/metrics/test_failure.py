"""Failure signals: what counts as a failure, which way signals point, AUROC and AURC."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bti_fast.metrics import (
    SIGNALS,
    failure_aurc,
    failure_auroc,
    failure_signals,
    is_failure,
    risk_coverage,
    summarise,
)


def row(iou=None, label=None, prob=(0.7, 0.3), **signals):
    found = {"id": "a", "iou": iou, "dice": iou, "sensitivity": iou, "hd95": None}
    return {**found, "label": label, "class_prob": list(prob), "failure_signals": signals}


def test_failure_is_low_iou_or_a_wrong_class_judged_by_what_is_known():
    assert is_failure(row(0.49, 0)) is True
    assert is_failure(row(0.5, 0)) is False
    assert is_failure(row(0.9, 1)) is True
    assert is_failure(row(None, 0)) is False and is_failure(row(0.2, None)) is True
    assert is_failure(row()) is None


def test_signals_are_level_means_turned_towards_failure():
    found = failure_signals(
        gates=[(0.2, 0.4), (0.4, 0.8)],
        proxies=np.array([[0.5, 2.0, 1.0], [0.7, 4.0, 3.0]]),
        mask_entropy=0.1,
        class_entropy=0.9,
    )
    assert list(found) == list(SIGNALS)
    assert found == pytest.approx(
        {
            "w_seg": 0.3,
            "w_cls": 0.6,
            "alignment": -0.6,
            "complexity": 3.0,
            "confidence": -2.0,
            "mask_entropy": 0.1,
            "class_entropy": 0.9,
        }
    )
    assert failure_signals(class_entropy=0.5) == {"class_entropy": 0.5}
    with pytest.raises(ValueError, match="w_seg/w_cls: got 3 values, needs 2"):
        failure_signals(gates=[(1, 2, 3)])


def brute_force_aurc(values, failures) -> float:
    """Definition: over every order that sorts the values, mean over n of the failure rate of the first n."""
    areas = []
    for order in itertools.permutations(range(len(values))):
        ordered = [values[i] for i in order]
        if ordered == sorted(ordered):
            lost = [failures[i] for i in order]
            areas.append(np.mean([sum(lost[: n + 1]) / (n + 1) for n in range(len(lost))]))
    return float(np.mean(areas))


def test_aurc_agrees_with_its_definition_ties_included():
    rng = np.random.default_rng(0)
    for kinds in (2, 3, 100):
        for _ in range(3):
            values, failures = (
                rng.integers(kinds, size=6).astype(float),
                rng.permutation([1, 1, 0, 0, 0, 1]) == 1,
            )
            truth = brute_force_aurc(values.tolist(), failures.tolist())
            assert failure_aurc(values, failures) == pytest.approx(truth, rel=1e-12)


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    values, failures = rng.integers(8, size=60).astype(float), rng.random(60) > 0.7
    pairs = [(f > k) + 0.5 * (f == k) for f in values[failures] for k in values[~failures]]
    assert failure_auroc(values, failures) == pytest.approx(np.mean(pairs))


def test_hand_computed_curve():
    rows = [row(0.9, a=0.1), row(0.2, a=0.4), row(0.8, a=0.2), row(0.1, a=0.3), row(None, a=0.0), row(0.9)]
    found = risk_coverage(rows, "a")
    assert found["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert found["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert found["aurc"] == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert found["left_out"] == 2


@pytest.mark.parametrize("iou", [0.9, 0.1])
def test_one_outcome_only_is_not_defined(iou):
    rows = [row(iou, w_seg=x) for x in (0.1, 0.2, 0.3)]
    found = summarise(rows, ["a", "b"])["failure"]["signals"]["w_seg"]
    assert found["auroc"]["value"] is None and found["aurc"]["value"] is None
    assert risk_coverage([], "w_seg") == {"coverage": [], "risk": [], "aurc": None, "left_out": 0}


def test_signals_that_are_missing_or_not_finite_are_left_out():
    rows = [
        row(0.9, w_seg=0.1),
        row(0.1, w_seg=0.2),
        row(0.1, w_seg=math.nan),
        row(0.2),
        row(None, w_seg=0.9),
    ]
    found = summarise(rows, ["a", "b"])["failure"]["signals"]["w_seg"]
    assert found["auroc"] == {"value": 1.0, "count": 2, "left_out": 3, "of": "cases"}
