"""Mask metrics: hand-computed cases, policies for empty masks, agreement with MONAI and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from sklearn.metrics import f1_score, jaccard_score, recall_score

from bti_fast.metrics import case_metrics, hausdorff95


def block(rows: slice, columns: slice, size=(20, 30)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[rows, columns] = True
    return mask


def blobs(rng: np.random.Generator, size) -> np.ndarray:
    """Smooth random shapes, some of them touching the border."""
    coarse = rng.normal(size=(6, 6))
    tall = np.kron(coarse, np.ones((size[0] // 6 + 1, size[1] // 6 + 1)))[: size[0], : size[1]]
    return tall + 0.3 * rng.normal(size=size) > 0.5


def test_hand_computed_case():
    # 4x6 = 24 true, moved right by 2: 4x4 = 16 overlap, union 32, outlines 2 apart.
    true, pred = block(slice(5, 9), slice(10, 16)), block(slice(5, 9), slice(12, 18))
    assert case_metrics(pred, true) == pytest.approx(
        {"iou": 0.5, "dice": 2 / 3, "sensitivity": 2 / 3, "hd95": 2.0}
    )


def test_percentile_leaves_a_far_pixel_out():
    true = block(slice(2, 12), slice(2, 12), (40, 40))
    pred = true.copy()
    pred[39, 39] = True
    assert hausdorff95(pred, true) == 0
    assert case_metrics(pred, true)["iou"] == pytest.approx(100 / 101)


def test_single_pixels():
    pred, true = block(slice(0, 1), slice(0, 1)), block(slice(3, 4), slice(4, 5))
    assert case_metrics(pred, true) == {"iou": 0, "dice": 0, "sensitivity": 0, "hd95": 5.0}


def test_identical_masks():
    mask = block(slice(3, 9), slice(3, 9))
    assert case_metrics(mask, mask) == {"iou": 1, "dice": 1, "sensitivity": 1, "hd95": 0}


def test_both_empty():
    empty = np.zeros((3, 4), dtype=bool)
    assert case_metrics(empty, empty) == {"iou": 1, "dice": 1, "sensitivity": None, "hd95": None}


def test_exactly_one_empty():
    empty, full = np.zeros((3, 4), dtype=bool), np.ones((3, 4), dtype=bool)
    assert case_metrics(empty, full) == {"iou": 0, "dice": 0, "sensitivity": 0, "hd95": 5.0}
    assert case_metrics(full, empty) == {"iou": 0, "dice": 0, "sensitivity": None, "hd95": 5.0}


@pytest.mark.parametrize("size", [(40, 55), (64, 64), (31, 90)])
def test_agrees_with_monai_and_sklearn(size):
    rng = np.random.default_rng(size[1])
    for _ in range(8):
        pred, true = blobs(rng, size), blobs(rng, size)
        found = case_metrics(pred, true)
        monai = compute_hausdorff_distance(
            torch.from_numpy(pred)[None, None], torch.from_numpy(true)[None, None], True, percentile=95
        )
        assert math.isfinite(float(monai)) and float(monai) > 0
        # MONAI interpolates its quantile in float32.
        assert found["hd95"] == pytest.approx(float(monai), rel=1e-5)
        flat = true.ravel(), pred.ravel()
        assert found["iou"] == pytest.approx(jaccard_score(*flat))
        assert found["dice"] == pytest.approx(f1_score(*flat))
        assert found["sensitivity"] == pytest.approx(recall_score(*flat))


def test_errors_name_the_argument():
    mask = np.zeros((3, 4), dtype=bool)
    with pytest.raises(TypeError, match="pred_mask: got float64, needs a numpy array of bool"):
        case_metrics(mask * 0.5, mask)
    with pytest.raises(TypeError, match="true_mask: got uint8"):
        case_metrics(mask, mask.astype(np.uint8))
    with pytest.raises(ValueError, match=r"pred_mask: got shape \(3, 4\) for a true_mask of \(4, 3\)"):
        case_metrics(mask, mask.T)
