"""Class metrics, the summary of an evaluation, its table and the data of its figures."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import accuracy_score, auc, f1_score, roc_auc_score
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from bti_fast.metrics import reliability_curve, render_summary, roc_curves, summarise

CLASSES = ["normal", "benign", "malignant"]


def row(index=0, label=None, prob=(0.2, 0.5, 0.3), iou=None, dice=None, sensitivity=None, hd95=None):
    return {
        "id": f"case {index}",
        "iou": iou,
        "dice": dice,
        "sensitivity": sensitivity,
        "hd95": hd95,
        "label": label,
        "class_prob": list(prob),
        "failure_signals": {"class_entropy": 0.1 * index},
    }


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(0)
    labels, probs = rng.integers(3, size=200), rng.dirichlet([1, 1, 1], size=200)
    probs[np.arange(200), labels] += 0.3
    probs /= probs.sum(1, keepdims=True)
    return labels, probs, [row(i, int(k), p) for i, (k, p) in enumerate(zip(labels, probs, strict=True))]


def test_agrees_with_sklearn_and_torchmetrics(many):
    labels, probs, rows = many
    found = summarise(rows, CLASSES)["class"]
    value = {name: metric["value"] for name, metric in found.items()}
    assert value["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert value["macro_f1"] == pytest.approx(f1_score(labels, probs.argmax(1), average="macro"))
    assert value["macro_auc"] == pytest.approx(
        roc_auc_score(labels, probs, multi_class="ovr", average="macro")
    )
    p, y = torch.from_numpy(probs), torch.from_numpy(labels)
    assert value["macro_f1"] == pytest.approx(float(multiclass_f1_score(p, y, 3)), rel=1e-6)
    assert value["macro_auc"] == pytest.approx(float(multiclass_auroc(p, y, 3)), rel=1e-6)
    assert value["ece"] == pytest.approx(float(multiclass_calibration_error(p, y, 3, n_bins=15)), rel=1e-6)


def test_hand_computed_calibration():
    # Two cases at 0.82 (bin 12: 0.800..0.867), one right; one at 0.50 (bin 7), right: (2·0.32 + 0.5) / 3.
    rows = [row(0, 0, (0.82, 0.08, 0.1)), row(1, 1, (0.82, 0.08, 0.1)), row(2, 2, (0.25, 0.25, 0.5))]
    assert summarise(rows, CLASSES)["class"]["ece"]["value"] == pytest.approx(1.14 / 3)
    curve = reliability_curve(rows)
    assert [i for i, n in enumerate(curve["count"]) if n] == [7, 12]
    assert sum(curve["count"]) == 3 and curve["accuracy"][7] == 1 and curve["accuracy"][0] is None


def test_certain_predictions_fall_in_the_last_bin():
    curve = reliability_curve([row(0, 0, (1.0, 0, 0)), row(1, 1, (1.0, 0, 0))])
    assert curve["count"][14] == 2 and curve["accuracy"][14] == 0.5 and curve["confidence"][14] == 1


def test_absent_classes_are_left_out_with_their_count():
    rows = [row(0, 0, (0.7, 0.2, 0.1)), row(1, 0, (0.3, 0.6, 0.1)), row(2, 1, (0.2, 0.7, 0.1))]
    found = summarise(rows, CLASSES)
    # Class 0: 1 of 2 found, no false one: F1 2/3. Class 1: both hits, one false: F1 2/3. Class 2 nowhere.
    assert found["class"]["macro_f1"] == {
        "value": pytest.approx(2 / 3),
        "count": 2,
        "left_out": 1,
        "of": "classes",
    }
    assert found["class"]["macro_auc"] == {"value": 1.0, "count": 2, "left_out": 1, "of": "classes"}
    assert found["per_class"]["malignant"] == {"cases": 0, "f1": None, "auc": None}


def test_a_class_predicted_but_never_true_scores_zero():
    rows = [row(0, 0, (0.7, 0.2, 0.1)), row(1, 0, (0.1, 0.2, 0.7))]
    assert summarise(rows, CLASSES)["per_class"]["malignant"]["f1"] == 0


def test_one_class_only_has_no_auc():
    rows = [row(i, 1) for i in range(3)]
    found = summarise(rows, CLASSES)["class"]
    assert found["macro_auc"] == {"value": None, "count": 0, "left_out": 3, "of": "classes"}
    assert found["accuracy"]["value"] == 1


def test_means_leave_undefined_cases_out():
    rows = [
        row(0, iou=0.2, dice=0.4, sensitivity=None, hd95=3.0),
        row(1, iou=0.6, dice=0.8, sensitivity=0.5),
        row(2),
    ]
    found = summarise(rows, CLASSES)["mask"]
    assert found["iou"] == {"value": pytest.approx(0.4), "count": 2, "left_out": 1, "of": "cases"}
    assert found["sensitivity"] == {"value": 0.5, "count": 1, "left_out": 2, "of": "cases"}
    assert found["hd95"] == {"value": 3.0, "count": 1, "left_out": 2, "of": "cases"}


@pytest.mark.parametrize("rows", [[], [row(0)]])
def test_nothing_known_is_not_a_score(rows):
    found = summarise(rows, CLASSES)
    metrics = [*found["mask"].values(), *found["class"].values(), found["failure"]["rate"]]
    assert [metric["value"] for metric in metrics] == [None] * 9
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_summary(found))
    assert console.export_text().count("n/a") >= 9


def test_table_shows_values_and_counts(many):
    console = Console(width=120, record=True, file=io.StringIO())
    found = summarise([*many[2], row(500, iou=0.25, dice=0.4)], CLASSES)
    console.print(render_summary(found))
    text = console.export_text()
    for expected in (
        f"{found['class']['accuracy']['value']:.3f}",
        "200 cases",
        "3 classes",
        "malignant",
        "0.250",
    ):
        assert expected in text
    assert any(
        line.split("│")[1].strip() == "HD95 (pixels)" and "n/a" in line
        for line in text.splitlines()
        if "│" in line
    )


def test_summary_is_json(many):
    found = summarise(many[2], CLASSES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_roc_curves(many):
    labels, probs, rows = many
    curves = roc_curves(rows, CLASSES)
    for k, name in enumerate(CLASSES):
        curve = curves[name]
        assert curve["auc"] == pytest.approx(roc_auc_score(labels == k, probs[:, k]))
        assert auc(curve["fpr"], curve["tpr"]) == pytest.approx(curve["auc"])
    assert roc_curves([row(0, 1)], CLASSES) == dict.fromkeys(CLASSES)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(7, 3), "case 7: label is 3, needs 0..2"),
        (row(7, 1, (0.5, 0.5)), "case 7: class_prob is .*, needs 3 finite probabilities"),
        (row(7, 1, (0.5, math.nan, 0.5)), "case 7: class_prob is .*nan"),
    ],
)
def test_errors_name_the_case(bad, message):
    with pytest.raises(ValueError, match=message):
        summarise([row(0, 1), bad], CLASSES)
