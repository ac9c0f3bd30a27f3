"""Triton kernels of task_interaction's forward pass: two reads of x and one write. SPEC 1.3.

`statistics` reads x once for its mean, its total variation and the pooled relu(W1 x + b1), which stays on the
chip; after the gate algebra on vectors, `modulate` reads x again and writes x (1 + scale). Partial sums are
added in a fixed order by `sum_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import tile_for
from .differences import neighbours, variation
from .hidden_product import hidden_product, precision
from .launch import Tile, dot_shape, tile_shape
from .sum_rows import sum_rows
from .tiles import (
    LAST,
    maps_of,
    needs_64_bits,
    positions_of,
    program_index,
    space_of,
    store_narrow,
    tile_offsets,
    tile_positions,
)


@triton.jit
def statistics_kernel(
    x,  # (B, C, P)
    x_at,
    weight,  # (H, C), contiguous
    bias,  # (H,), contiguous
    partial,  # (B, tiles, C + H + 1) float32: sums of x, of relu(W1 x + b1), and of absolute differences
    space,
    near,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_H hidden channels; the tile of x is read again for each, out of a cache
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = program_index(WIDE)
    b = program // space.tiles
    p, inside, positions = tile_positions(space, program % space.tiles, BLOCK_P)
    row = partial + program * (CHANNELS + HIDDEN + 1)
    varied = tl.zeros([BLOCK_C], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        h = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
        known_h = h < HIDDEN
        hidden = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
        for start in range(0, CHANNELS, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            known = c < CHANNELS
            at = tile_offsets(b, c, p, space, x_at)
            v = tl.load(x + at, mask=known[:, None] & inside[None, :], other=0.0)
            w_mask = known_h[:, None] & known[None, :]
            w = tl.load(weight + h[:, None] * CHANNELS + c[None, :], mask=w_mask, other=0.0)
            hidden = hidden_product(w, v, hidden, PRECISION)
            if chunk == 0:
                value = v.to(tl.float32)
                tl.store(row + c, tl.sum(value, 1), mask=known)
                if near.axes > 0:
                    varied += variation(x, at, value, known, p, inside, positions, near)
        hidden += tl.load(bias + h, mask=known_h, other=0.0).to(tl.float32)[:, None]
        hidden = tl.where(hidden < 0, 0.0, hidden)  # NaN stays
        hidden = tl.where(inside[None, :], hidden, 0.0)
        tl.store(row + CHANNELS + h, tl.sum(hidden, 1), mask=known_h)
    tl.store(row + CHANNELS + HIDDEN, tl.sum(varied, 0))


@triton.jit
def modulate_kernel(
    x,  # (B, C, P)
    x_at,
    scale,  # (B, C) float32, contiguous
    x_out,  # (B, C, P)
    out_at,
    space,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    parts: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = program_index(WIDE)
    # Neighbours in memory run one after the other: the parts of a tile, the tiles of a sample.
    b = program // (parts * space.tiles)
    if x_at.format == LAST:
        part = program % parts
        tile = (program // parts) % space.tiles
    else:
        tile = program % space.tiles
        part = (program // space.tiles) % parts
    p, inside, _positions = tile_positions(space, tile, BLOCK_P)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < CHANNELS
    mask = known[:, None] & inside[None, :]
    at = tile_offsets(b, c, p, space, x_at)
    to = tile_offsets(b, c, p, space, out_at)
    factor = 1.0 + tl.load(scale + b * CHANNELS + c, mask=known, other=0.0)
    out = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    store_narrow(x_out + to, out, mask)


def statistics(x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    """(B, C + C/2 + 1) float32: mean of x (B, C, *spatial), mean of relu(W1 x + b1), scene complexity."""
    batch, channels = x.shape[:2]
    hidden = conv_weight.shape[0]
    positions = positions_of(x)
    sizes, (mx,) = maps_of([(x, True)])
    block_h, block_c, block_p = dot_shape(x, conv_weight, mx.format, needs_64_bits(mx.span))
    space = space_of(x, sizes, block_p)
    partial = x.new_empty((batch, space.tiles, channels + hidden + 1), dtype=torch.float32)
    statistics_kernel[(batch * space.tiles,)](
        x,
        mx.at,
        conv_weight.contiguous(),
        conv_bias.contiguous(),
        partial,
        space,
        neighbours(x),
        CHANNELS=channels,
        HIDDEN=hidden,
        CHUNKS=triton.cdiv(hidden, block_h),
        PRECISION=precision(),
        WIDE=needs_64_bits(mx.span, partial.numel()),
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=8 if block_h * block_p > 4096 else 4,
        num_stages=2,
    )
    summary = x.new_empty((batch, partial.shape[2]), dtype=torch.float32)
    sum_rows(partial, summary, scale=1.0 / positions, last_scale=1.0 / (positions * channels))
    return summary


def modulate(x: Tensor, scale: Tensor, tile: Tile | None = None) -> Tensor:
    """x (B, C, *spatial) times 1 + scale (B, C) float32, like x."""
    batch, channels = x.shape[:2]
    x_out = torch.empty_like(x)
    sizes, (mx, mo) = maps_of([(x, True), (x_out, True)])
    tile = tile or tile_for("modulate", x, mx.format, lambda tile: modulate(x, scale, tile))
    block_c, block_p = tile_shape(x, mx.format == LAST.value, tile.elements)
    space = space_of(x, sizes, block_p)
    modulate_kernel[(batch * space.tiles * triton.cdiv(channels, block_c),)](
        x,
        mx.at,
        scale.contiguous(),
        x_out,
        mo.at,
        space,
        CHANNELS=channels,
        WIDE=needs_64_bits(mx.span, mo.span),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=tile.warps,
    )
    return x_out
