"""Launch shapes in one table, by kernel and architecture, made smaller where a map is small.

The entries keep every variant within registers and shared memory, as the compilers report them for each
architecture; where no two compile differently they are the same. `autotune` may replace those of TILES.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import tiles
from .tiles import ANY, multiprocessors, positions_of, power_of_two

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
UNKNOWN = "sm_90"  # taken where no device can be asked: tensors without memory, the interpreter


class Tile(NamedTuple):
    """A tile of x that a program takes at once."""

    elements: int
    warps: int


class Product(NamedTuple):
    """The most that a pass multiplying with W1 holds of each axis."""

    hidden: int
    channels: int
    positions: int
    warps: int


TILES = {
    #                          sm_80          sm_90          sm_100         gfx942
    "gated_fusion":           (Tile(4096, 4), Tile(4096, 4), Tile(4096, 4), Tile(4096, 4)),
    "gated_fusion_backward":  (Tile(2048, 8), Tile(2048, 8), Tile(2048, 8), Tile(2048, 8)),
    "modulate":               (Tile(4096, 4), Tile(4096, 4), Tile(4096, 4), Tile(4096, 4)),
}  # fmt: skip

# W1 x, pooled: sums that the registers hold, beside offsets of scattered positions or of 64 bits, or W1 in
# two terms.
SUMS = {
    #             sm_80  sm_90  sm_100 gfx942
    "scattered": (4096,  4096,  4096,  4096),
    "two terms": (8192,  8192,  8192,  8192),
    "one term":  (16384, 16384, 16384, 16384),
}  # fmt: skip
MAX_HIDDEN = 256  # rows of W1 in one product; more go in chunks

_FEW, _MANY, _HALF_AMD = Product(32, 64, 64, 8), Product(128, 32, 64, 8), Product(64, 32, 64, 4)
_FULL, _FULL_AMD = Product(32, 64, 32, 8), Product(32, 64, 32, 4)
INPUT_GRADIENT = {
    #               sm_80  sm_90  sm_100 gfx942
    "few hidden":  (_FEW,  _FEW,  _FEW,  _HALF_AMD),
    "many hidden": (_MANY, _MANY, _MANY, _HALF_AMD),
    "float32":     (_FULL, _FULL, _FULL, _FULL_AMD),
}  # fmt: skip


def architecture(device: torch.device) -> str:
    """Whose entries serve this device: of ARCHITECTURES, the newest that is not newer than it."""
    if tiles.for_amd():
        return "gfx942"
    return _nvidia(device.index) if device.type == "cuda" else UNKNOWN


@cache
def _nvidia(index: int | None) -> str:
    major = torch.cuda.get_device_capability(index)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def entry(row: tuple, device: torch.device):
    """The entry of a row of a table for this device."""
    return row[ARCHITECTURES.index(architecture(device))]


def tile_shape(x: Tensor, last: bool, elements: int, waves: int = 4) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P) of about ``elements`` values, long on the axis that is contiguous in memory.

    Shorter in positions where the map is too small to give every multiprocessor ``waves`` tiles.
    """
    batch, channels = x.shape[:2]
    positions = positions_of(x)
    if last:
        block_c = min(power_of_two(channels, 16), 64)
        block_p = min(elements // block_c, 256)
    else:
        block_c, block_p = 0, 256
    block_p = min(block_p, power_of_two(positions, 16))
    wanted = waves * multiprocessors(x.device)
    while block_p > 32 and batch * triton.cdiv(positions, block_p) < wanted:
        block_p //= 2
    if not last:
        block_c = min(power_of_two(channels, 4), elements // block_p)
    return block_c, block_p


def dot_shape(x: Tensor, weight: Tensor, format: int, wide: bool) -> tuple[int, int, int]:
    """(BLOCK_H, BLOCK_C, BLOCK_P) of a pass that multiplies W1 with tiles of x, its sums in registers; wide:
    offsets have 64 bits."""
    batch, channels = x.shape[:2]
    positions = positions_of(x)
    alike = weight.dtype == x.dtype
    block_h = min(power_of_two(weight.shape[0], 16), MAX_HIDDEN)
    kind = "scattered" if format == ANY.value or wide else "one term" if alike else "two terms"
    sums = entry(SUMS[kind], x.device)
    longest = 256 if x.element_size() == 2 else 128
    block_p = min(max(sums // block_h, 32), longest, power_of_two(positions, 32))
    while block_p > 32 and batch * triton.cdiv(positions, block_p) < multiprocessors(x.device):
        block_p //= 2
    held = 8192 if x.element_size() == 2 and alike else 4096
    most = max(held // max(block_p, block_h if x.element_size() == 4 else block_h // 2), 16)
    return block_h, min(power_of_two(channels, 16), most, 64), block_p


def gradient_shape(x: Tensor, hidden: int) -> Product:
    """The shape of the pass that writes grad x."""
    block_h = power_of_two(hidden, 16)
    kind = "float32" if x.element_size() == 4 else "few hidden" if block_h <= 32 else "many hidden"
    shape = entry(INPUT_GRADIENT[kind], x.device)
    # The interpreter has no registers to spare, and takes its time by the tile.
    block_p = 128 if x.device.type == "cpu" else shape.positions
    block_c = min(shape.channels, power_of_two(x.shape[1], 16))
    block_p = min(block_p, power_of_two(positions_of(x), 32))
    return Product(min(block_h, shape.hidden), block_c, block_p, shape.warps)
