"""Metrics of one predicted mask, at the resolution of the original image."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
from scipy import ndimage


class CaseMetrics(TypedDict):
    """Overlap and distance of one mask; None where a metric is not defined."""

    iou: float
    dice: float
    sensitivity: float | None
    hd95: float | None


def case_metrics(pred_mask: np.ndarray, true_mask: np.ndarray) -> CaseMetrics:
    """IoU, Dice, sensitivity and HD95 of a predicted mask (H, W) against the true one, both bool (SPEC §7).

    Both empty: IoU = Dice = 1, HD95 not defined. Exactly one empty: IoU = Dice = 0, HD95 = image diagonal
    sqrt(H² + W²). Sensitivity is not defined where the true mask is empty. TypeError unless both are bool
    (threshold probabilities first), ValueError unless both have one shape.
    """
    for name, mask in (("pred_mask", pred_mask), ("true_mask", true_mask)):
        if not isinstance(mask, np.ndarray) or mask.dtype != bool:
            found = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"{name}: got {found}, needs a numpy array of bool")
    if pred_mask.shape != true_mask.shape or pred_mask.ndim != 2:
        raise ValueError(
            f"pred_mask: got shape {pred_mask.shape} for a true_mask of {true_mask.shape}, needs one (H, W)"
        )
    overlap = int(np.count_nonzero(pred_mask & true_mask))
    predicted, true = int(np.count_nonzero(pred_mask)), int(np.count_nonzero(true_mask))
    if predicted == 0 and true == 0:
        return CaseMetrics(iou=1.0, dice=1.0, sensitivity=None, hd95=None)
    return CaseMetrics(
        iou=overlap / (predicted + true - overlap),
        dice=2 * overlap / (predicted + true),
        sensitivity=overlap / true if true else None,
        hd95=hausdorff95(pred_mask, true_mask) if predicted and true else math.hypot(*true_mask.shape),
    )


def hausdorff95(a: np.ndarray, b: np.ndarray) -> float:
    """Greater of the two directed 95th-percentile distances between the outlines of masks a and b (H, W),
    neither of them empty, in pixels.

    The outline of a mask is what a 4-connected erosion removes (pixels on the image border belong to it), as
    in MONAI's compute_hausdorff_distance(percentile=95).
    """
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    edges = [_outline(mask[box]) for mask in (a, b)]
    directed = [
        np.percentile(ndimage.distance_transform_edt(~onto)[edge], 95) for edge, onto in (edges, edges[::-1])
    ]
    return float(max(directed))


def _outline(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)
