"""Triton kernels of task_interaction's gradient: four reads of x's size and one write. SPEC 1.3.

`reduce_gradient` reads grad and x for the gradient of scale, and keeps one bit per hidden value, its sign;
after the gate algebra's gradient, `input_gradient` reads grad and x again, writes grad x, and adds up the
gradient of W1. Partial sums are added in a fixed order by `sum_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .differences import neighbours, variation_slope
from .hidden_product import hidden_product, precision, product
from .launch import dot_shape, gradient_shape
from .sum_rows import sum_rows
from .tiles import (
    maps_of,
    multiprocessors,
    narrow,
    needs_64_bits,
    program_index,
    space_of,
    store_narrow,
    tile_offsets,
    tile_positions,
)


@triton.jit
def reduce_gradient_kernel(
    grad,  # (B, C, P)
    grad_at,
    x,  # (B, C, P)
    x_at,
    weight,  # (H, C), contiguous
    bias,  # (H,), contiguous
    partial,  # (B, tiles, C) float32: sums of grad * x
    signs,  # (B, H, tiles * BLOCK_P / 32) int32: bit j of word w is set where W1 x + b1 > 0 at 32 w + j
    space,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_H hidden channels
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_P // 32
    program = program_index(WIDE)
    b = program // space.tiles
    tile = program % space.tiles
    p, inside, _positions = tile_positions(space, tile, BLOCK_P)
    word = tile * WORDS + tl.arange(0, WORDS)
    for chunk in tl.static_range(CHUNKS):
        h = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
        known_h = h < HIDDEN
        hidden = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
        for start in range(0, CHANNELS, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            known = c < CHANNELS
            mask = known[:, None] & inside[None, :]
            v = tl.load(x + tile_offsets(b, c, p, space, x_at), mask=mask, other=0.0)
            w_mask = known_h[:, None] & known[None, :]
            w = tl.load(weight + h[:, None] * CHANNELS + c[None, :], mask=w_mask, other=0.0)
            hidden = hidden_product(w, v, hidden, PRECISION)
            if chunk == 0:
                at = tile_offsets(b, c, p, space, grad_at)
                g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(partial + program * CHANNELS + c, tl.sum(g * v.to(tl.float32), 1), mask=known)
        hidden += tl.load(bias + h, mask=known_h, other=0.0).to(tl.float32)[:, None]
        bits = tl.where((hidden > 0) & inside[None, :], 1, 0)
        bits = tl.reshape(bits, [BLOCK_H, WORDS, 32]) << tl.arange(0, 32)[None, None, :]
        words = tl.sum(bits, 2)
        to = (b * HIDDEN + h[:, None]) * (space.tiles * WORDS) + word[None, :]
        tl.store(signs + to, words, mask=known_h[:, None])


@triton.jit
def input_gradient_kernel(
    grad,  # (B, C, P)
    grad_at,
    x,  # (B, C, P)
    x_at,
    weight,  # (H, C), contiguous
    signs,  # (B, H, words) int32, of reduce_gradient_kernel
    scale,  # (B, C) float32, contiguous
    summary_grad,  # (B, C + H + 1) float32, contiguous: gradients of the means and of the scene complexity
    grad_x,  # (B, C, P)
    grad_x_at,
    partial,  # (splits, H C + H) float32: gradients of W1 and b1
    every,  # B * tiles
    words,
    splits,
    space,
    near,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_P // 32
    parts: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks  # of the rows of grad W1 added up here; 0 writes grad x
    split = program_index(WIDE) // (parts * chunks)
    share = 1.0 / (space.positions * space.align)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < CHANNELS
    weight_grad = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    bias_grad = tl.zeros([BLOCK_H], tl.float32)
    # A while loop: the interpreter of this Triton cannot count to a bound that is not a constant.
    item = split
    while item < every:
        b = item // space.tiles
        tile = item % space.tiles
        p, inside, positions = tile_positions(space, tile, BLOCK_P)
        mask = known[:, None] & inside[None, :]
        mine = summary_grad + b * (CHANNELS + HIDDEN + 1)
        word = tile * WORDS + tl.arange(0, WORDS)
        at = tile_offsets(b, c, p, space, x_at)
        v = tl.load(x + at, mask=mask, other=0.0)
        out = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for k in range(0, chunks):
            if (chunk == 0) | (chunk == k):
                h = k * BLOCK_H + tl.arange(0, BLOCK_H)
                known_h = h < HIDDEN
                word_at = (b * HIDDEN + h[:, None]) * words + word[None, :]
                packed = tl.load(signs + word_at, mask=known_h[:, None] & (word < words)[None, :], other=0)
                bits = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
                active = tl.reshape(bits, [BLOCK_H, BLOCK_P]).to(tl.float32).to(v.dtype)
                by_hidden = tl.load(mine + CHANNELS + h, mask=known_h, other=0.0)
                if chunk == 0:
                    # Brought to magnitude 1, lest half precision lose it; put back after the product.
                    size = tl.max(tl.abs(by_hidden), 0)
                    size = tl.where(size > 0, size, 1.0)
                    w_at = h[:, None] * CHANNELS + c[None, :]
                    w = tl.load(weight + w_at, mask=known_h[:, None] & known[None, :], other=0.0)
                    w = narrow(w.to(tl.float32) * (by_hidden / size)[:, None], v.dtype)
                    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
                    out += product(tl.trans(w), active, zero, PRECISION) * (size * share)
                if chunk == k:
                    zero = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
                    seen = product(active, tl.trans(v), zero, PRECISION)
                    weight_grad += seen * (by_hidden * share)[:, None]
                    bias_grad += tl.sum(active.to(tl.float32), 1) * (by_hidden * share)
        if chunk == 0:
            from_at = tile_offsets(b, c, p, space, grad_at)
            g = tl.load(grad + from_at, mask=mask, other=0.0).to(tl.float32)
            factor = 1.0 + tl.load(scale + b * CHANNELS + c, mask=known, other=0.0)
            out += g * factor[:, None]
            out += (tl.load(mine + c, mask=known, other=0.0) * share)[:, None]
            if near.axes > 0:
                value = v.to(tl.float32)
                slope = variation_slope(x, at, value, known, p, inside, positions, near)
                out += slope * (tl.load(mine + CHANNELS + HIDDEN) * share / CHANNELS)
            store_narrow(grad_x + tile_offsets(b, c, p, space, grad_x_at), out, mask)
        item += splits
    h = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    known_h = h < HIDDEN
    line = partial + split * (HIDDEN * (CHANNELS + 1))
    at = h[:, None] * CHANNELS + c[None, :]
    tl.store(line + at, weight_grad, mask=known_h[:, None] & known[None, :])
    if part == 0:
        tl.store(line + HIDDEN * CHANNELS + h, bias_grad, mask=known_h)


def reduce_gradient(
    grad_x_out: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of scale (B, C) float32, and the signs of W1 x + b1: (B, C/2, words) int32 of 32 positions."""
    batch, channels = x.shape[:2]
    hidden = conv_weight.shape[0]
    sizes, (mg, mx) = maps_of([(grad_x_out, True), (x, True)])
    wide = needs_64_bits(mg.span, mx.span)
    block_h, block_c, block_p = dot_shape(x, conv_weight, mx.format, wide)
    space = space_of(x, sizes, block_p)
    partial = x.new_empty((batch, space.tiles, channels), dtype=torch.float32)
    signs = torch.empty((batch, hidden, space.tiles * block_p // 32), dtype=torch.int32, device=x.device)
    reduce_gradient_kernel[(batch * space.tiles,)](
        grad_x_out,
        mg.at,
        x,
        mx.at,
        conv_weight.contiguous(),
        conv_bias.contiguous(),
        partial,
        signs,
        space,
        CHANNELS=channels,
        HIDDEN=hidden,
        CHUNKS=triton.cdiv(hidden, block_h),
        PRECISION=precision(),
        WIDE=needs_64_bits(mg.span, mx.span, partial.numel(), signs.numel()),
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=8 if block_h * block_p > 4096 else 4,
        num_stages=2,
    )
    grad_scale = x.new_empty((batch, channels), dtype=torch.float32)
    sum_rows(partial, grad_scale)
    return grad_scale, signs


def input_gradient(
    grad_x_out: Tensor,  # (B, C, *spatial)
    x: Tensor,
    conv_weight: Tensor,
    signs: Tensor,  # of reduce_gradient
    scale: Tensor,  # (B, C) float32
    summary_grad: Tensor,  # (B, C + C/2 + 1) float32
    bias_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (like x), of conv_weight (C/2, C) and of conv_bias (C/2), in the dtypes of these."""
    batch, channels = x.shape[:2]
    hidden = conv_weight.shape[0]
    grad_x = torch.empty_like(x)
    sizes, (mg, mx, mo) = maps_of([(grad_x_out, True), (x, True), (grad_x, True)])
    block_h, block_c, block_p, warps = gradient_shape(x, hidden)
    space = space_of(x, sizes, block_p)
    every = batch * space.tiles
    parts = triton.cdiv(channels, block_c)
    chunks = triton.cdiv(hidden, block_h)
    splits = max(min(2 * multiprocessors(x.device) // (parts * chunks), every), 1)
    partial = x.new_empty((1, splits, hidden * (channels + 1)), dtype=torch.float32)
    input_gradient_kernel[(parts * chunks * splits,)](
        grad_x_out,
        mg.at,
        x,
        mx.at,
        conv_weight.contiguous(),
        signs,
        scale.contiguous(),
        summary_grad.contiguous(),
        grad_x,
        mo.at,
        partial,
        every,
        signs.shape[2],
        splits,
        space,
        neighbours(x),
        CHANNELS=channels,
        HIDDEN=hidden,
        PRECISION=precision(),
        WIDE=needs_64_bits(mg.span, mx.span, mo.span, partial.numel(), signs.numel()),
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=warps,
        num_stages=1,
    )
    grad_weight = torch.empty((hidden, channels), dtype=conv_weight.dtype, device=x.device)
    grad_bias = torch.empty((hidden,), dtype=bias_dtype, device=x.device)
    sum_rows(partial, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
