"""Differences of neighbouring positions along the spatial axes: the scene complexity of task_interaction."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tiles import divisor

SMALLEST_ROWS = 8  # below, the total variation is zero by definition


class Neighbours(NamedTuple):
    """The spatial axes of a map as they are, not merged: how its neighbours are found in memory."""

    rows: int  # sizes of the last two axes
    columns: int
    depth_step: int  # elements to the next depth,
    row_step: int  # to the next row, divided by align,
    column_step: int  # and to the next column
    edge: int  # first position of the last row of a 2D map, divided by align
    axes: tl.constexpr  # how many; 0 leaves the differences out
    align: tl.constexpr


@triton.jit
def difference(x, at, step, value, known, inside):
    """(value one step on) - value for known channels and positions inside, else 0."""
    mask = known[:, None] & inside[None, :]
    ahead = tl.load(x + (at + step), mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, ahead - value, 0.0)


@triton.jit
def sign(value):
    return tl.where(value > 0, 1.0, 0.0) - tl.where(value < 0, 1.0, 0.0)


@triton.jit
def variation(x, at, value, known, p, inside, positions, near):
    """Sums of the absolute differences ahead of `value` (channels x positions), the elements of x at `at`."""
    right = inside & (p % near.columns < near.columns - 1)
    steps = tl.abs(difference(x, at, near.column_step, value, known, right))
    if near.axes == 2:
        below = p < near.edge * near.align
    else:
        below = inside & ((p // near.columns) % near.rows < near.rows - 1)
    if near.axes > 1:
        steps += tl.abs(difference(x, at, near.row_step * near.align, value, known, below))
    if near.axes > 2:
        behind = p < positions - near.rows * near.columns
        steps += tl.abs(difference(x, at, near.depth_step, value, known, behind))
    return tl.sum(steps, 1)


@triton.jit
def variation_slope(x, at, value, known, p, inside, positions, near):
    """Gradient of the sum of `variation` over the whole map, by the differences on both sides of `value`."""
    column = p % near.columns
    ahead = difference(x, at, near.column_step, value, known, inside & (column < near.columns - 1))
    back = difference(x, at, -near.column_step, value, known, inside & (column > 0))
    slope = -sign(ahead) - sign(back)
    if near.axes > 1:
        if near.axes == 2:
            below = p < near.edge * near.align
            above = inside & (p >= near.columns)
        else:
            row = (p // near.columns) % near.rows
            below = inside & (row < near.rows - 1)
            above = inside & (row > 0)
        step = near.row_step * near.align
        slope -= sign(difference(x, at, step, value, known, below))
        slope -= sign(difference(x, at, -step, value, known, above))
    if near.axes > 2:
        plane = near.rows * near.columns
        slope -= sign(difference(x, at, near.depth_step, value, known, p < positions - plane))
        slope -= sign(difference(x, at, -near.depth_step, value, known, inside & (p >= plane)))
    return slope


def neighbours(x: Tensor) -> Neighbours:
    """The Neighbours of x (B, C, *spatial)."""
    spatial = x.shape[2:]
    rows, columns = ((1,) * (3 - len(spatial)) + tuple(spatial))[1:]
    depth_step, row_step, column_step = (0,) * (3 - len(spatial)) + tuple(x.stride()[2:])
    edge = (rows - 1) * columns
    align = divisor(row_step, edge)
    differs = (rows if len(spatial) > 1 else columns) >= SMALLEST_ROWS
    axes = tl.constexpr(len(spatial) if differs else 0)
    row_step, edge = row_step // align, edge // align
    return Neighbours(rows, columns, depth_step, row_step, column_step, edge, axes, tl.constexpr(align))
