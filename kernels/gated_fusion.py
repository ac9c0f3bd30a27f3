"""Triton kernels of gated_fusion: entropy, gate, modulation and weighted pooling, x read once. SPEC 1.2.

A program owns all channels of BLOCK_P positions of one sample. It reads their logits once, turns them into
entropy and gate in registers, then walks the channels: read x, write x', and leave one partial pooling sum
per channel. A second small kernel adds the partial sums in a fixed order. `gated_fusion_backward` walks x and
grad x' in the same way.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import tile_for
from .entropy_uncertainty import entropy, norm_of
from .gated_fusion_backward import gated_fusion_backward
from .launch import Tile, tile_shape
from .tiles import (
    LAST,
    channel_stride,
    map_offsets,
    maps_of,
    needs_64_bits,
    positions_of,
    power_of_two,
    program_index,
    space_of,
    store_narrow,
    tile_offsets,
    tile_positions,
)
from .uncertainty_gate import gate_of, pooling_weight

__all__ = ["gated_fusion", "gated_fusion_backward"]
REDUCE_C = 64
REDUCE_T = 32


@triton.jit
def forward_kernel(
    x,  # (B, C, P)
    x_at,
    logits,  # (B, K, P)
    logits_at,
    prior,  # (B, C), contiguous
    doubt,  # (B,), uncertainty of the class prediction, contiguous
    coeffs,  # (3,), contiguous
    x_out,  # (B, C, P)
    out_at,
    u_out,  # (B, P) float32, contiguous
    partial,  # (B, tiles, C + 2) float32: sums of weight * x, of weight, of u
    tau,
    norm,  # 1 / log K
    space,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = program_index(WIDE)
    b = program // space.tiles
    p, inside, positions = tile_positions(space, program % space.tiles, BLOCK_P)
    a = logits + map_offsets(b, 0, p, space, logits_at)
    u, _top, _rest, _total = entropy(a, channel_stride(logits_at), inside, norm, CLASSES)
    tl.store(u_out + b * positions + p, u, mask=inside)
    gate = tau * gate_of(u, doubt + b, coeffs)
    weight = tl.where(inside, pooling_weight(u), 0.0)

    row = partial + program * (CHANNELS + 2)
    tl.store(row + CHANNELS, tl.sum(weight, 0))
    tl.store(row + CHANNELS + 1, tl.sum(tl.where(inside, u, 0.0), 0))
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        known = c < CHANNELS
        mask = known[:, None] & inside[None, :]
        v = tl.load(x + tile_offsets(b, c, p, space, x_at), mask=mask, other=0.0).to(tl.float32)
        known_prior = tl.load(prior + b * CHANNELS + c, mask=known, other=0.0).to(tl.float32)
        out = v * (1.0 + gate[None, :] * known_prior[:, None])
        store_narrow(x_out + tile_offsets(b, c, p, space, out_at), out, mask)
        tl.store(row + c, tl.sum(v * weight[None, :], 1), mask=known)


@triton.jit
def forward_finish_kernel(
    partial,  # (B, tiles, C + 2) float32
    pooled,  # (B, C) float32
    mean,  # (B,) float32
    positions,
    tiles,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,  # power of two, at least tiles
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < CHANNELS
    rows = partial + b * tiles * (CHANNELS + 2)
    total = tl.zeros([BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_T], tl.float32)
    doubt = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, TILES, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < tiles
        row = rows + t * (CHANNELS + 2)
        mask = inside[:, None] & known[None, :]
        total += tl.sum(tl.load(row[:, None] + c[None, :], mask=mask, other=0.0), 0)
        weight += tl.load(row + CHANNELS, mask=inside, other=0.0)
        doubt += tl.load(row + CHANNELS + 1, mask=inside, other=0.0)
    tl.store(pooled + b * CHANNELS + c, total / tl.sum(weight, 0), mask=known)
    if block == 0:
        tl.store(mean + b, tl.sum(doubt, 0) / positions)


def gated_fusion(
    x: Tensor,  # (B, C, *spatial)
    seg_logits: Tensor,  # (B, K, *spatial)
    prior: Tensor,  # (B, C)
    cls_uncertainty: Tensor,  # (B,)
    coeffs: Tensor,  # (3,)
    tau: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' like x; pooled (B, C), mean uncertainty (B,) and uncertainty (B, *spatial) in float32."""
    batch, channels = x.shape[:2]
    x_out = torch.empty_like(x)
    u = x.new_empty(x.shape[:1] + x.shape[2:], dtype=torch.float32)
    if x.numel() == 0:
        nothing = torch.full((batch, channels + 1), math.nan, dtype=torch.float32, device=x.device)
        return x_out, nothing[:, :channels].contiguous(), nothing[:, channels].contiguous(), u
    sizes, (mx, ml, mo) = maps_of([(x, True), (seg_logits, True), (x_out, True)])
    if tile is None:
        inputs = x, seg_logits, prior, cls_uncertainty, coeffs, tau
        tile = tile_for("gated_fusion", x, mx.format, lambda tile: gated_fusion(*inputs, tile))
    block_c, block_p = tile_shape(x, mx.format == LAST.value, tile.elements)
    space = space_of(x, sizes, block_p)
    classes = seg_logits.shape[1]
    pooled = x.new_empty((batch, channels), dtype=torch.float32)
    mean = x.new_empty((batch,), dtype=torch.float32)
    partial = x.new_empty((batch, space.tiles, channels + 2), dtype=torch.float32)
    forward_kernel[(batch * space.tiles,)](
        x,
        mx.at,
        seg_logits,
        ml.at,
        prior.contiguous(),
        cls_uncertainty.contiguous(),
        coeffs.contiguous(),
        x_out,
        mo.at,
        u,
        partial,
        tau,
        norm_of(classes),
        space,
        CHANNELS=channels,
        CLASSES=classes,
        WIDE=needs_64_bits(mx.span, ml.span, mo.span, u.numel(), partial.numel()),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=tile.warps,
    )
    forward_finish_kernel[(batch * triton.cdiv(channels, REDUCE_C),)](
        partial,
        pooled,
        mean,
        positions_of(x),
        space.tiles,
        CHANNELS=channels,
        TILES=power_of_two(space.tiles),
        BLOCK_C=REDUCE_C,
        BLOCK_T=REDUCE_T,
        num_warps=4,
    )
    return x_out, pooled, mean, u
