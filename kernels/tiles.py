"""Where a tile of a feature map lies in memory, for any strides; and what all tiled kernels share.

A map (B, C, *spatial) is seen as channels times P positions of one sample. A tensor whose positions follow
each other in memory is in format PLANES, one whose channels do in LAST (channels_last), any other in ANY.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

ANY = tl.constexpr(0)
PLANES = tl.constexpr(1)
LAST = tl.constexpr(2)
# Offsets below this fit in int32 with a tile to spare.
INT32_OFFSETS = 2**31 - 2**20
# Where no device can be asked: the multiprocessors of an H100 or H200.
MULTIPROCESSORS = 132


@triton.jit
def map_offsets(b, c, p, size2, size3, sb, sc, s1, s2, s3, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of channels c at positions p of sample b, in the shape that c and p broadcast to.

    The strides of formats PLANES and LAST come divided by ALIGN; multiplying them here tells the compiler
    what wide loads may rely on. size2 and size3 are the two last of three spatial axes.
    """
    if FORMAT == PLANES:
        return b * (sb * ALIGN) + c * (sc * ALIGN) + p
    elif FORMAT == LAST:
        return b * (sb * ALIGN) + p * (s3 * ALIGN) + c
    else:
        row = p // size3
        return b * sb + c * sc + (p % size3) * s3 + (row % size2) * s2 + (row // size2) * s1


@triton.jit
def narrow(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """value (float32) in dtype, rounded to nearest even; the interpreter alone would cut bfloat16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, even, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)


def interpreted(kernel) -> bool:
    """Whether this kernel runs in Triton's interpreter (decided by TRITON_INTERPRET when it was defined)."""
    return isinstance(kernel, InterpretedFunction)


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
    """How a kernel addresses one tensor: the strides, format and alignment that map_offsets takes."""

    strides: tuple[int, int, int, int, int]
    format: int
    align: int
    span: int  # largest element offset

    @property
    def class_stride(self) -> int:
        """Elements from one channel to the next."""
        return self.strides[1] * (self.align if self.format == PLANES.value else 1)


def maps_of(tensors: list[tuple[Tensor, bool]]) -> tuple[int, int, list[Map]]:
    """(size2, size3, one Map per tensor) of (tensor, whether it has axis 1), equal in all other axes.

    Spatial axes are merged wherever every tensor allows it, so that dense maps have one.
    """
    first, has = tensors[0]
    spatial = first.shape[1 + has :]
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in tensors]
    for axis, size in enumerate(spatial):
        if size == 1:
            continue
        step = [t.stride(1 + with_channels + axis) for t, with_channels in tensors]
        if sizes and all(known[-1] == size * s for known, s in zip(steps, step, strict=True)):
            sizes[-1] *= size
            for known, s in zip(steps, step, strict=True):
                known[-1] = s
        else:
            sizes.append(size)
            for known, s in zip(steps, step, strict=True):
                known.append(s)
    padding = 3 - len(sizes)
    sizes = [1] * padding + sizes
    merged = padding >= 2
    maps = []
    for (tensor, with_channels), known in zip(tensors, steps, strict=True):
        s1, s2, s3 = [0] * padding + known
        s3 = s3 if known else 1
        sb = tensor.stride(0) if tensor.shape[0] > 1 else 0
        sc = tensor.stride(1) if with_channels and tensor.shape[1] > 1 else 0
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        maps.append(_map(sb, sc, s1, s2, s3, merged, span))
    return sizes[1], sizes[2], maps


def _map(sb: int, sc: int, s1: int, s2: int, s3: int, merged: bool, span: int) -> Map:
    if merged and s3 == 1:
        align = divisor(sb, sc)
        return Map((sb // align, sc // align, s1, s2, s3), PLANES.value, align, span)
    if merged and sc == 1:
        align = divisor(sb, s3)
        return Map((sb // align, sc, s1, s2, s3 // align), LAST.value, align, span)
    return Map((sb, sc, s1, s2, s3), ANY.value, 1, span)


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
