"""Trivial predictors."""

from __future__ import annotations

import numpy as np
import pytest

from bti_fast.metrics import majority_class_baseline, mean_mask_baseline, summarise


def centre(size, half) -> np.ndarray:
    """A box around the centre whose sides are a share of the image's."""
    rows, columns = (np.abs((np.arange(n) + 0.5) / n - 0.5) < half for n in size)
    return rows[:, None] & columns[None, :]


def test_majority_class():
    rows = majority_class_baseline([1, 1, 0, 1, 2], [1, 0, 2, 1, None], 3)
    assert rows[0]["class_prob"] == pytest.approx([0.2, 0.6, 0.2])
    found = summarise(rows, ["a", "b", "c"])["class"]
    assert found["accuracy"]["value"] == 0.5 and found["accuracy"]["left_out"] == 1
    # Only class b is predicted: precision 1/2, recall 1, F1 2/3; the other two 0.
    assert found["macro_f1"]["value"] == pytest.approx(2 / 9)
    assert found["macro_auc"]["value"] == 0.5
    assert found["ece"]["value"] == pytest.approx(0.1)


def test_mean_mask_of_equal_masks_is_that_mask_at_every_size():
    train = [centre((64, 64), 0.25), centre((128, 96), 0.25)]
    rows = mean_mask_baseline(train, [centre((200, 160), 0.25), centre((64, 64), 0.25)])
    assert min(row["iou"] for row in rows) > 0.95


def test_mean_mask_takes_the_best_threshold_in_training():
    # Nothing is lesion in more than 2 of 5: at 0.5 the prediction would be empty and score 0.
    big = [centre((64, 64), 0.25)] * 2 + [np.roll(centre((64, 64), 0.1), s, (0, 1)) for s in (-22, 22, 24)]
    rows = mean_mask_baseline(big, [centre((64, 64), 0.25)])
    assert rows[0]["iou"] > 0.8


def test_mean_mask_of_lesion_free_images():
    empty = np.zeros((32, 32), dtype=bool)
    rows = mean_mask_baseline([empty, empty], [empty, centre((32, 32), 0.25)])
    assert [row["iou"] for row in rows] == [1, 0]
    assert summarise(rows, ["a"])["mask"]["hd95"]["left_out"] == 1


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="train_labels"):
        majority_class_baseline([], [1], 2)
    with pytest.raises(ValueError, match="train_labels"):
        majority_class_baseline([0, 5], [1], 2)
    with pytest.raises(ValueError, match="train_masks: got none"):
        mean_mask_baseline([], [])
