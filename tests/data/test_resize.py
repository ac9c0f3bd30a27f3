"""Resizing against hand-computed cases and PyTorch's own area and antialiased resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from bti_fast.data import resize_image, resize_mask
from bti_fast.data.resize import area_average, to_uint16
from bti_fast.errors import UserError


def test_area_average_by_hand_on_cells_that_cut_pixels():
    row = np.array([[0.0, 3.0, 6.0]])
    # Two cells of 1.5 pixels: (0 + 3/2) / 1.5 and (3/2 + 6) / 1.5.
    np.testing.assert_allclose(area_average(row, (1, 2)), [[1.0, 5.0]])


def test_area_average_equals_pooling_where_cells_align():
    image = np.random.default_rng(0).random((64, 96))
    pooled = interpolate(torch.from_numpy(image)[None, None], size=(32, 32), mode="area")[0, 0].numpy()
    np.testing.assert_allclose(area_average(image, (32, 32)), pooled, atol=1e-12)


@pytest.mark.parametrize("size", [(20, 30), (61, 47), (128, 128)])
def test_image_equals_antialiased_bilinear(size):
    image = np.random.default_rng(1).random((3, 61, 47)).astype(np.float32)
    expected = interpolate(
        torch.from_numpy(image).double()[None], size=size, mode="bilinear", antialias=True
    )[0].numpy()
    resized = resize_image(image, size)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-5)


def test_image_values_lie_on_the_16_bit_grid():
    resized = resize_image(np.random.default_rng(2).random((1, 33, 21)).astype(np.float32), 16)
    np.testing.assert_array_equal(to_uint16(resized).astype(np.float32) / np.float32(65535), resized)


def test_mask_is_cut_at_half_the_area():
    mask = np.zeros((4, 6), dtype=bool)
    mask[0:2, 0:1] = True  # half of the first 2x2 cell
    mask[2:3, 2:3] = True  # a quarter of another
    mask[2:4, 4:6] = True
    np.testing.assert_array_equal(resize_mask(mask, (2, 3)), [[True, False, False], [False, False, True]])


def test_lesion_too_small_for_the_size_keeps_one_pixel():
    mask = np.zeros((100, 100), dtype=bool)
    mask[71, 33] = True
    resized = resize_mask(mask, 10)
    assert resized.sum() == 1 and resized[7, 3]
    assert not resize_mask(np.zeros((100, 100), dtype=bool), 10).any()


def test_enlarged_mask_keeps_its_share_of_the_area():
    mask = np.zeros((5, 5), dtype=bool)
    mask[1:3, 1:4] = True
    assert resize_mask(mask, 50).sum() == 600


@pytest.mark.parametrize("size", [0, -3, (4,), (4, 0), 2.5])
def test_bad_sizes_are_named(size):
    with pytest.raises(UserError, match="size is"):
        resize_image(np.zeros((1, 4, 4), dtype=np.float32), size)
