"""Triton kernels of gated_fusion's gradient: one pass over x and grad x'. SPEC 1.2.

As in the forward pass a program owns all channels of BLOCK_P positions. It computes entropy and gate again,
writes the gradients of x and of the logits, and leaves partial sums for those of the vectors, which a second
small kernel adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import tile_for
from .entropy_uncertainty import entropy, norm_of, store_logit_gradient
from .launch import Tile, tile_shape
from .tiles import (
    LAST,
    channel_stride,
    map_offsets,
    maps_of,
    needs_64_bits,
    power_of_two,
    program_index,
    space_of,
    store_narrow,
    tile_offsets,
    tile_positions,
)
from .uncertainty_gate import gate_of, pooling_weight

REDUCE_C = 64
REDUCE_T = 32
REDUCE_N = 1024


@triton.jit
def backward_kernel(
    grad_out,  # (B, C, P)
    grad_out_at,
    grad_pooled,  # (B, C) float32, contiguous
    grad_mean,  # (B,) float32, contiguous
    grad_u,  # (B, P) float32
    grad_u_at,
    x,  # (B, C, P)
    x_at,
    logits,  # (B, K, P)
    logits_at,
    prior,  # (B, C), contiguous
    doubt,  # (B,), contiguous
    coeffs,  # (3,), contiguous
    pooled,  # (B, C) float32, contiguous
    mean,  # (B,) float32, contiguous
    grad_x,  # (B, C, P)
    grad_x_at,
    grad_logits,  # (B, K, P)
    grad_logits_at,
    partial,  # (B, tiles, C) float32: sums of grad * x * gate
    sums,  # (2, B * tiles) float32: sums of q and of q * u, q being the gate's gradient before the sigmoid
    tau,
    norm,  # 1 / log K
    programs,  # B * tiles
    space,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = program_index(WIDE)
    b = program // space.tiles
    p, inside, positions = tile_positions(space, program % space.tiles, BLOCK_P)
    a = logits + map_offsets(b, 0, p, space, logits_at)
    u, top, rest, total = entropy(a, channel_stride(logits_at), inside, norm, CLASSES)
    gate = gate_of(u, doubt + b, coeffs)
    scale = 1.0 / (pooling_weight(tl.load(mean + b)) * positions)  # one over the sum of the pooling weights
    weight = tl.where(inside, pooling_weight(u) * scale, 0.0)

    row = partial + program * CHANNELS
    by_gate = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    by_weight = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    constant = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        known = c < CHANNELS
        mask = known[:, None] & inside[None, :]
        v = tl.load(x + tile_offsets(b, c, p, space, x_at), mask=mask, other=0.0).to(tl.float32)
        grad_at = tile_offsets(b, c, p, space, grad_out_at)
        g = tl.load(grad_out + grad_at, mask=mask, other=0.0).to(tl.float32)
        known_prior = tau * tl.load(prior + b * CHANNELS + c, mask=known, other=0.0).to(tl.float32)
        pool = tl.load(grad_pooled + b * CHANNELS + c, mask=known, other=0.0)
        constant += pool * tl.load(pooled + b * CHANNELS + c, mask=known, other=0.0)
        out = g * (1.0 + gate[None, :] * known_prior[:, None]) + weight[None, :] * pool[:, None]
        store_narrow(grad_x + tile_offsets(b, c, p, space, grad_x_at), out, mask)
        product = g * v
        by_gate += product * known_prior[:, None]
        by_weight += v * pool[:, None]
        tl.store(row + c, tl.sum(product * gate[None, :], 1), mask=known)

    q = gate * (1.0 - gate) * tl.sum(by_gate, 0)
    q = tl.where(inside, q, 0.0)
    tl.store(sums + program, tl.sum(q, 0))
    tl.store(sums + programs + program, tl.sum(q * u, 0))
    u_at = map_offsets(b, 0, p, space, grad_u_at)
    grad = tl.load(grad_u + u_at, mask=inside, other=0.0) + tl.load(grad_mean + b) / positions
    grad += tl.load(coeffs).to(tl.float32) * q - scale * (tl.sum(by_weight, 0) - tl.sum(constant, 0))
    out = grad_logits + map_offsets(b, 0, p, space, grad_logits_at)
    strides = channel_stride(grad_logits_at), channel_stride(logits_at)
    store_logit_gradient(grad, out, strides[0], a, strides[1], top, rest, total, inside, norm, CLASSES)


@triton.jit
def backward_finish_kernel(
    partial,  # (B, tiles, C) float32
    sums,  # (2, B * tiles) float32
    doubt,  # (B,), contiguous
    coeffs,  # (3,), contiguous
    grad_prior,  # (B, C)
    prior_strides,
    grad_doubt,  # (B,)
    doubt_stride,
    grad_coeffs,  # (3,)
    coeffs_stride,
    tau,
    tiles,
    programs,  # B * tiles
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,  # powers of two, at least tiles and programs
    PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    if tl.program_id(0) == tl.num_programs(0) - 1:
        by_alpha = tl.zeros([BLOCK_N], tl.float32)
        by_beta = tl.zeros([BLOCK_N], tl.float32)
        by_gamma = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, PROGRAMS, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            mask = n < programs
            q = tl.load(sums + n, mask=mask, other=0.0)
            certainty = 1.0 - tl.load(doubt + n // tiles, mask=mask, other=0.0).to(tl.float32)
            by_alpha += tl.load(sums + programs + n, mask=mask, other=0.0)
            by_beta += q * certainty
            by_gamma += q
        store_narrow(grad_coeffs, tl.sum(by_alpha, 0))
        store_narrow(grad_coeffs + coeffs_stride, tl.sum(by_beta, 0))
        store_narrow(grad_coeffs + 2 * coeffs_stride, tl.sum(by_gamma, 0))
    else:
        b = (tl.program_id(0) // blocks).to(tl.int64)
        block = tl.program_id(0) % blocks
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        known = c < CHANNELS
        total = tl.zeros([BLOCK_C], tl.float32)
        gate = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, TILES, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = t < tiles
            at = (b * tiles + t[:, None]) * CHANNELS + c[None, :]
            total += tl.sum(tl.load(partial + at, mask=inside[:, None] & known[None, :], other=0.0), 0)
            gate += tl.load(sums + b * tiles + t, mask=inside, other=0.0)
        store_narrow(grad_prior + b * prior_strides[0] + c * prior_strides[1], tau * total, known)
        if block == 0:
            beta = tl.load(coeffs + 1).to(tl.float32)
            store_narrow(grad_doubt + b * doubt_stride, -beta * tl.sum(gate, 0))


def gated_fusion_backward(
    grad_x_out: Tensor,  # (B, C, *spatial)
    grad_pooled: Tensor,  # (B, C)
    grad_mean: Tensor,  # (B,)
    grad_u: Tensor,  # (B, *spatial)
    x: Tensor,
    seg_logits: Tensor,
    prior: Tensor,
    cls_uncertainty: Tensor,
    coeffs: Tensor,
    pooled: Tensor,  # (B, C), of the forward pass
    mean_uncertainty: Tensor,  # (B,), of the forward pass
    tau: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, seg_logits, prior, cls_uncertainty and coeffs, each like its tensor."""
    batch, channels = x.shape[:2]
    grad_x, grad_logits = torch.empty_like(x), torch.empty_like(seg_logits)
    small = prior, cls_uncertainty, coeffs
    if x.numel() == 0:
        return grad_x, grad_logits, *(torch.zeros_like(value) for value in small)
    grad_prior, grad_doubt, grad_coeffs = (torch.empty_like(value) for value in small)
    prior, cls_uncertainty, coeffs = (value.contiguous() for value in small)
    tensors = [(grad_x_out, True), (grad_u, False), (x, True), (seg_logits, True), (grad_x, True)]
    sizes, maps = maps_of([*tensors, (grad_logits, True)])
    mg, mu, mx, ml, mo, mm = maps
    if tile is None:
        grads = grad_x_out, grad_pooled, grad_mean, grad_u
        saved = x, seg_logits, prior, cls_uncertainty, coeffs, pooled, mean_uncertainty, tau
        run = lambda tile: gated_fusion_backward(*grads, *saved, tile)  # noqa: E731
        tile = tile_for("gated_fusion_backward", x, mx.format, run)
    block_c, block_p = tile_shape(x, mx.format == LAST.value, tile.elements)
    space = space_of(x, sizes, block_p)
    programs = batch * space.tiles
    classes = seg_logits.shape[1]
    partial = x.new_empty((batch, space.tiles, channels), dtype=torch.float32)
    sums = x.new_empty((2, programs), dtype=torch.float32)
    backward_kernel[(programs,)](
        grad_x_out,
        mg.at,
        grad_pooled.contiguous(),
        grad_mean.contiguous(),
        grad_u,
        mu.at,
        x,
        mx.at,
        seg_logits,
        ml.at,
        prior,
        cls_uncertainty,
        coeffs,
        pooled.contiguous(),
        mean_uncertainty.contiguous(),
        grad_x,
        mo.at,
        grad_logits,
        mm.at,
        partial,
        sums,
        tau,
        norm_of(classes),
        programs,
        space,
        CHANNELS=channels,
        CLASSES=classes,
        WIDE=needs_64_bits(*(one.span for one in maps), partial.numel()),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=tile.warps,
    )
    backward_finish_kernel[(batch * triton.cdiv(channels, REDUCE_C) + 1,)](
        partial,
        sums,
        cls_uncertainty,
        coeffs,
        grad_prior,
        grad_prior.stride(),
        grad_doubt,
        grad_doubt.stride(0),
        grad_coeffs,
        grad_coeffs.stride(0),
        tau,
        space.tiles,
        programs,
        CHANNELS=channels,
        TILES=power_of_two(space.tiles),
        PROGRAMS=power_of_two(programs),
        BLOCK_C=REDUCE_C,
        BLOCK_T=REDUCE_T,
        BLOCK_N=REDUCE_N,
        num_warps=4,
    )
    return grad_x, grad_logits, grad_prior, grad_doubt, grad_coeffs
