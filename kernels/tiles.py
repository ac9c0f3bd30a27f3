"""Where a tile of a feature map lies in memory, for any strides; and what all tiled kernels share.

A map (B, C, *spatial) is seen as channels times P positions of one sample. A tensor whose positions follow
each other in memory is in format PLANES, one whose channels do in LAST (channels_last), any other in ANY.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ANY = tl.constexpr(0)
PLANES = tl.constexpr(1)
LAST = tl.constexpr(2)
# Offsets below this fit in int32 with a tile to spare.
INT32_OFFSETS = 2**31 - 2**20
# Where no device can be asked: the multiprocessors of an H100 or H200.
MULTIPROCESSORS = 132
# Whether the kernels run in Triton's interpreter, as triton.jit decides when it defines them.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Place(NamedTuple):
    """Where a kernel finds one tensor; one argument, named after the tensor: `x_at` for `x`."""

    batch: int  # strides in elements; in formats PLANES and LAST divided by align
    channel: int
    depth: int
    row: int
    column: int
    format: tl.constexpr
    align: tl.constexpr


class Space(NamedTuple):
    """The positions of one sample, and how they are cut into tiles."""

    positions: int  # P / align
    tiles: int
    rows: int  # the two last of three spatial axes, those merged that every tensor allows to be
    columns: int
    align: tl.constexpr


@triton.jit
def program_index(WIDE: tl.constexpr):
    """The index of this program, from which all offsets follow: WIDE makes them 64 bits long."""
    index = tl.program_id(0)
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def tile_positions(space, tile, BLOCK_P: tl.constexpr):
    """(the positions of a tile, which of them there are, how many a sample has)."""
    positions = space.positions * space.align
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    return p, p < positions, positions


@triton.jit
def map_offsets(b, c, p, space, at):
    """Offsets of channels c at positions p of sample b, in the shape that c and p broadcast to.

    Strides are multiplied by their common divisor here: it tells the compiler what wide loads may rely on.
    """
    if at.format == PLANES:
        return b * (at.batch * at.align) + c * (at.channel * at.align) + p
    elif at.format == LAST:
        return b * (at.batch * at.align) + p * (at.column * at.align) + c
    else:
        row = p // space.columns
        in_plane = (p % space.columns) * at.column + (row % space.rows) * at.row
        return b * at.batch + c * at.channel + in_plane + (row // space.rows) * at.depth


@triton.jit
def tile_offsets(b, c, p, space, at):
    """map_offsets of a tile: rows of channels c, columns of positions p."""
    return map_offsets(b, c[:, None], p[None, :], space, at)


@triton.jit
def channel_stride(at):
    """Elements from one channel to the next."""
    if at.format == PLANES:
        return at.channel * at.align
    else:
        return at.channel


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """value (float32) in dtype, rounded to nearest even; the interpreter alone would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, even, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def store_narrow(pointers, value, mask=None):
    """Stores value (float32) in the dtype that is there."""
    tl.store(pointers, narrow(value, pointers.dtype.element_ty), mask=mask)


def for_amd() -> bool:
    """Whether launches are for AMD's chips, whose warps of 64 make fewer of them do."""
    return torch.version.hip is not None


def divisor(*values: int) -> int:
    """The largest power of two up to 16 that divides every value."""
    for candidate in (16, 8, 4, 2):
        if all(value % candidate == 0 for value in values):
            return candidate
    return 1


@dataclass(frozen=True)
class Map:
    """How a kernel addresses one tensor."""

    at: Place
    span: int  # largest element offset

    @property
    def format(self) -> int:
        """ANY, PLANES or LAST."""
        return self.at.format.value


def merged_axes(sizes: Sequence[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Sizes, and strides per tensor, of the axes left when those merge that every tensor allows to."""
    kept: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        if kept and all(known[-1] == size * s[axis] for known, s in zip(steps, strides, strict=True)):
            kept[-1] *= size
            for known, s in zip(steps, strides, strict=True):
                known[-1] = s[axis]
        else:
            kept.append(size)
            for known, s in zip(steps, strides, strict=True):
                known.append(s[axis])
    return kept, steps


def maps_of(tensors: list[tuple[Tensor, bool]]) -> tuple[tuple[int, int], list[Map]]:
    """((rows, columns) of a Space, one Map per tensor) of (tensor, whether it has axis 1), else of one shape.

    Spatial axes are merged wherever every tensor allows it, so that dense maps have one.
    """
    first, has = tensors[0]
    spatial = first.shape[1 + has :]
    steps = [list(tensor.stride()[1 + with_channels :]) for tensor, with_channels in tensors]
    sizes, steps = merged_axes(spatial, steps)
    padding = 3 - len(sizes)
    sizes = [1] * padding + sizes
    merged = padding >= 2
    maps = []
    for (tensor, with_channels), known in zip(tensors, steps, strict=True):
        spatial_steps = [0] * padding + known if known else [0, 0, 1]
        sb = tensor.stride(0) if tensor.shape[0] > 1 else 0
        sc = tensor.stride(1) if with_channels and tensor.shape[1] > 1 else 0
        maps.append(Map(_place(sb, sc, *spatial_steps, merged), span(tensor)))
    return (sizes[1], sizes[2]), maps


def _place(sb: int, sc: int, s1: int, s2: int, s3: int, merged: bool) -> Place:
    if merged and s3 == 1:
        align = divisor(sb, sc)
        return Place(sb // align, sc // align, s1, s2, s3, PLANES, tl.constexpr(align))
    if merged and sc == 1:
        align = divisor(sb, s3)
        return Place(sb // align, sc, s1, s2, s3 // align, LAST, tl.constexpr(align))
    return Place(sb, sc, s1, s2, s3, ANY, tl.constexpr(1))


def space_of(x: Tensor, sizes: tuple[int, int], block_p: int) -> Space:
    """The Space of x (B, C, *spatial), its sizes those of maps_of, in tiles of block_p positions."""
    positions = positions_of(x)
    align = divisor(positions)
    tiles = triton.cdiv(positions, block_p)
    return Space(positions // align, tiles, *sizes, tl.constexpr(align))


def span(tensor: Tensor) -> int:
    """The largest element offset in the tensor."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def needs_64_bits(*offsets: int) -> bool:
    """Whether offsets up to these need 64 bits."""
    return max(offsets) >= INT32_OFFSETS


def positions_of(x: Tensor) -> int:
    """P, the number of spatial positions of x (B, C, *spatial)."""
    return x.shape[2:].numel()


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors (compute units) the device has; one for the interpreter."""
    if device.type == "cuda":
        return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())
    return 1 if device.type == "cpu" else MULTIPROCESSORS


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def power_of_two(n: int, lowest: int = 1) -> int:
    """The smallest power of two that is at least n and at least ``lowest``."""
    return max(triton.next_power_of_2(n), lowest)
