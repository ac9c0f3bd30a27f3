"""Sums of partial sums in a fixed order: the second stage of every reduction over positions."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import power_of_two, store_narrow

BLOCK_C = 64
BLOCK_R = 32


@triton.jit
def sum_rows_kernel(
    partial,  # (B, rows, columns) float32
    out,  # (B, head): the first columns
    tail,  # (B, columns - head): the others
    rows,
    columns,
    head,
    scale,
    last_scale,  # of the last column
    blocks,  # programs for each b
    ROWS: tl.constexpr,  # power of two, at least rows
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < columns
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, ROWS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & known[None, :]
        total += tl.load(partial + (b * rows + r[:, None]) * columns + c[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0) * tl.where(c == columns - 1, last_scale, scale)
    store_narrow(out + b * head + c, total, c < head)
    store_narrow(tail + b * (columns - head) + (c - head), total, known & (c >= head))


def sum_rows(
    partial: Tensor,  # (B, rows, columns) float32
    out: Tensor,  # (B, head), contiguous, written
    tail: Tensor | None = None,  # (B, columns - head), contiguous, written
    scale: float = 1.0,
    last_scale: float = 1.0,
) -> None:
    """Sums over axis 1 of partial, times scale, the last column times last_scale."""
    batch, rows, columns = partial.shape
    blocks = triton.cdiv(columns, BLOCK_C)
    sum_rows_kernel[(batch * blocks,)](
        partial,
        out,
        out if tail is None else tail,
        rows,
        columns,
        columns if tail is None else out.numel() // batch,
        scale,
        last_scale,
        blocks,
        ROWS=power_of_two(rows),
        BLOCK_C=BLOCK_C,
        BLOCK_R=BLOCK_R,
        num_warps=4,
    )
