"""How images and masks come to the network's size: one rule for training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

import numpy as np
from PIL import Image

from bti_fast.errors import UserError


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) from one side length or a pair; raises UserError unless both are positive integers."""
    pair = size if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, Integral) and side > 0 for side in pair):
        raise UserError(f"size is {size!r}; needs a positive integer or (height, width)")
    return int(pair[0]), int(pair[1])


def resize_image(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize float32 (C, H, W) in [0, 1] to (C, *size), bilinear with antialiasing, aspect ratio not kept.

    Results lie on the grid k / 65535, so that `CaseDataset` can cache them in 16 bits without changing a bit.
    """
    height, width = as_size(size)
    if image.shape[1:] == (height, width):
        resized = image
    elif image.shape[0] > 1 and all(np.array_equal(image[0], plane) for plane in image[1:]):
        resized = np.repeat(_resize_plane(image[0], height, width)[None], image.shape[0], axis=0)
    else:
        resized = np.stack([_resize_plane(plane, height, width) for plane in image])
    return to_unit(to_uint16(resized))


def _resize_plane(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def to_uint16(image: np.ndarray) -> np.ndarray:
    """Unit-range float to uint16 in 1/65535 steps, values outside [0, 1] clipped."""
    return np.rint(np.clip(image, 0, 1) * np.float32(65535)).astype(np.uint16)


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint16 to float32 in [0, 1]; the inverse of `to_uint16` on its grid."""
    return image.astype(np.float32) / np.float32(65535)


def resize_mask(mask: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize bool (H, W) to bool `size`: a pixel is lesion where lesion covers at least half of its area.

    A lesion too small to cover half of any pixel keeps the pixel it covers most, so that a known lesion never
    becomes a known empty mask.
    """
    height, width = as_size(size)
    if mask.shape == (height, width):
        return mask.copy()
    cover = area_average(mask.astype(np.float64), (height, width))
    # Summing rounded overlaps leaves exact halves a few ulp off; they count as half.
    resized = cover >= 0.5 - 1e-9
    if not resized.any() and mask.any():
        resized[np.unravel_index(np.argmax(cover), cover.shape)] = True
    return resized


def area_average(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Exact area average of (H, W) over a grid of `size` equal cells, which need not align with pixels."""
    rows, columns = _overlaps(image.shape[0], size[0]), _overlaps(image.shape[1], size[1])
    return rows @ image @ columns.T


@lru_cache(maxsize=64)
def _overlaps(pixels: int, cells: int) -> np.ndarray:
    """(cells, pixels) share of each cell that each pixel covers; rows sum to one."""
    edges = np.linspace(0, pixels, cells + 1)
    starts = np.arange(pixels)
    shared = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.clip(shared, 0, None) * (cells / pixels)
