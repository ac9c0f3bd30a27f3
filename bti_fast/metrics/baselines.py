"""What a predictor that never looks at the image would score: the majority class and the mean mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from bti_fast.metrics.masks import case_metrics
from bti_fast.metrics.rows import CaseRow

GRID = 128


def majority_class_baseline(
    train_labels: Iterable[int], test_labels: Iterable[int | None], classes: int
) -> list[CaseRow]:
    """Rows for summarise in which every test case gets the class frequencies of the training cases.

    The predicted class is thus the majority class, the first of equals. ValueError without training labels.
    """
    counts = np.bincount(np.fromiter(train_labels, dtype=np.int64), minlength=classes)
    if not counts.sum() or len(counts) > classes:
        raise ValueError(f"train_labels: got counts {counts.tolist()}, needs labels 0..{classes - 1}")
    prob = (counts / counts.sum()).tolist()
    return [_row(i, label=label, class_prob=list(prob)) for i, label in enumerate(test_labels)]


def mean_mask_baseline(train_masks: Iterable[np.ndarray], test_masks: Iterable[np.ndarray]) -> list[CaseRow]:
    """Rows for summarise in which every test case gets the mean training mask, thresholded, at its own size.

    Masks are bool (H, W) of any size, averaged on a grid of 128x128. The threshold is the one of 0.05,
    0.10, ..., 0.95 with the best mean IoU over the training masks on that grid: a mean mask seldom reaches
    0.5 anywhere. ValueError without training masks.
    """
    grids = [_resized(mask.astype(np.float32), (GRID, GRID)) for mask in train_masks]
    if not grids:
        raise ValueError("train_masks: got none, needs at least one mask")
    train = np.stack(grids)
    mean = train.mean(0)
    threshold = _best_threshold(mean, train >= 0.5)
    rows = []
    for i, mask in enumerate(test_masks):
        prediction = _resized(mean, mask.shape) >= threshold
        rows.append(_row(i, **case_metrics(prediction, mask)))
    return rows


def _best_threshold(mean: np.ndarray, train: np.ndarray) -> float:
    candidates: Sequence[float] = [step / 20 for step in range(1, 20)]
    area = train.sum((1, 2))

    def mean_iou(threshold: float) -> float:
        prediction = mean >= threshold
        overlap = train[:, prediction].sum(1)
        union = area + prediction.sum() - overlap
        return float(np.where(union > 0, overlap / np.maximum(union, 1), 1.0).mean())

    return max(candidates, key=mean_iou)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centres, edges clamped."""
    rows, columns = (
        np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        for old, new in zip(image.shape, size, strict=True)
    )
    return ndimage.map_coordinates(image, np.meshgrid(rows, columns, indexing="ij"), order=1)


def _row(index: int, **known) -> CaseRow:
    unknown = dict.fromkeys(("iou", "dice", "sensitivity", "hd95", "label"))
    return CaseRow(**{"id": str(index), **unknown, "class_prob": [], "failure_signals": {}, **known})
