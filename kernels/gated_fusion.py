"""Triton kernels of gated_fusion: entropy, gate, modulation and weighted pooling, x read once. SPEC 1.2.

A program owns all channels of BLOCK_P positions of one sample. It reads their logits once, turns them into
entropy and gate in registers, then walks the channels: read x, write x', and leave one partial pooling sum
per channel. The backward pass walks x and grad x' in the same way. A second small kernel adds the partial
sums in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import tile_for
from .entropy_uncertainty import log1p, softmax_sums
from .launch import Tile, tile_shape
from .tiles import (
    INT32_OFFSETS,
    LAST,
    divisor,
    interpreted,
    map_offsets,
    maps_of,
    narrow,
    positions_of,
    power_of_two,
)

FLOOR = tl.constexpr(1e-3)  # of the pooling weights, so that total ignorance still pools
REDUCE_C = 64
REDUCE_T = 32


@triton.jit
def forward_kernel(
    x,  # (B, C, P)
    logits,  # (B, K, P)
    prior,  # (B, C), contiguous
    doubt,  # (B,), uncertainty of the class prediction, contiguous
    coeffs,  # (3,), contiguous
    x_out,  # (B, C, P)
    u_out,  # (B, P) float32, contiguous
    partial,  # (B, tiles, C + 2) float32: sums of weight * x, of weight, of u
    tau,
    positions,  # P / P_ALIGN
    tiles,
    size2,
    size3,
    xb,
    xc,
    x1,
    x2,
    x3,
    lb,
    lc,
    l1,
    l2,
    l3,
    ob,
    oc,
    o1,
    o2,
    o3,
    class_stride,
    norm,  # 1 / log K
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    X_FORMAT: tl.constexpr,
    X_ALIGN: tl.constexpr,
    L_FORMAT: tl.constexpr,
    L_ALIGN: tl.constexpr,
    O_FORMAT: tl.constexpr,
    O_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    INTERPRET: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    b = program // tiles
    tile = program % tiles
    positions = positions * P_ALIGN
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < positions

    a = logits + map_offsets(b, 0, p, size2, size3, lb, lc, l1, l2, l3, L_FORMAT, L_ALIGN)
    if CLASSES == 1:
        z = tl.abs(tl.load(a, mask=inside, other=0.0).to(tl.float32))
        e = tl.exp(-z)
        h = log1p(e) + z * e / (1.0 + e)
    else:
        _top, rest, total = softmax_sums(a, class_stride, inside, CLASSES)
        h = log1p(rest) - total / (1.0 + rest)
    h *= norm
    u = tl.where(h > 1.0, 1.0, h)  # not minimum, which loses NaN
    tl.store(u_out + b * positions + p, u, mask=inside)

    alpha = tl.load(coeffs).to(tl.float32)
    beta = tl.load(coeffs + 1).to(tl.float32)
    gamma = tl.load(coeffs + 2).to(tl.float32)
    certainty = 1.0 - tl.load(doubt + b).to(tl.float32)
    gate = tau * tl.sigmoid(alpha * u + beta * certainty + gamma)
    weight = tl.where(inside, 1.0 - u + FLOOR, 0.0)

    row = partial + (b * tiles + tile) * (CHANNELS + 2)
    tl.store(row + CHANNELS, tl.sum(weight, 0))
    tl.store(row + CHANNELS + 1, tl.sum(tl.where(inside, u, 0.0), 0))
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        known = c < CHANNELS
        mask = known[:, None] & inside[None, :]
        at = map_offsets(b, c[:, None], p[None, :], size2, size3, xb, xc, x1, x2, x3, X_FORMAT, X_ALIGN)
        to = map_offsets(b, c[:, None], p[None, :], size2, size3, ob, oc, o1, o2, o3, O_FORMAT, O_ALIGN)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        known_prior = tl.load(prior + b * CHANNELS + c, mask=known, other=0.0).to(tl.float32)
        out = v * (1.0 + gate[None, :] * known_prior[:, None])
        tl.store(x_out + to, narrow(out, x_out.dtype.element_ty, INTERPRET), mask=mask)
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


@triton.jit
def backward_kernel(
    grad_out,  # (B, C, P)
    grad_pooled,  # (B, C) float32, contiguous
    grad_mean,  # (B,) float32, contiguous
    grad_u,  # (B, P) float32
    x,  # (B, C, P)
    logits,  # (B, K, P)
    prior,  # (B, C), contiguous
    doubt,  # (B,), contiguous
    coeffs,  # (3,), contiguous
    pooled,  # (B, C) float32, contiguous
    mean,  # (B,) float32, contiguous
    grad_x,  # (B, C, P)
    grad_logits,  # (B, K, P)
    partial,  # (B, tiles, C) float32: sums of grad * x * gate
    sums,  # (2, B * tiles) float32: sums of q and of q * u, q being the gate's gradient before the sigmoid
    tau,
    positions,  # P / P_ALIGN
    tiles,
    programs,  # B * tiles
    size2,
    size3,
    gb,
    gc,
    g1,
    g2,
    g3,
    ub,
    u1,
    u2,
    u3,
    xb,
    xc,
    x1,
    x2,
    x3,
    lb,
    lc,
    l1,
    l2,
    l3,
    ob,
    oc,
    o1,
    o2,
    o3,
    mb,
    mc,
    m1,
    m2,
    m3,
    class_stride,
    grad_class_stride,
    norm,  # 1 / log K
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    G_FORMAT: tl.constexpr,
    G_ALIGN: tl.constexpr,
    U_FORMAT: tl.constexpr,
    U_ALIGN: tl.constexpr,
    X_FORMAT: tl.constexpr,
    X_ALIGN: tl.constexpr,
    L_FORMAT: tl.constexpr,
    L_ALIGN: tl.constexpr,
    O_FORMAT: tl.constexpr,
    O_ALIGN: tl.constexpr,
    M_FORMAT: tl.constexpr,
    M_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    b = program // tiles
    tile = program % tiles
    positions = positions * P_ALIGN
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < positions

    a = logits + map_offsets(b, 0, p, size2, size3, lb, lc, l1, l2, l3, L_FORMAT, L_ALIGN)
    first = tl.load(a, mask=inside, other=0.0).to(tl.float32)
    if CLASSES == 1:
        e = tl.exp(-tl.abs(first))
        h = log1p(e) + tl.abs(first) * e / (1.0 + e)
        top, rest, total = first, e, e
    else:
        top, rest, total = softmax_sums(a, class_stride, inside, CLASSES)
        h = log1p(rest) - total / (1.0 + rest)
    h *= norm
    u = tl.where(h > 1.0, 1.0, h)

    alpha = tl.load(coeffs).to(tl.float32)
    beta = tl.load(coeffs + 1).to(tl.float32)
    gamma = tl.load(coeffs + 2).to(tl.float32)
    certainty = 1.0 - tl.load(doubt + b).to(tl.float32)
    gate = tl.sigmoid(alpha * u + beta * certainty + gamma)
    ubar = tl.load(mean + b)
    scale = 1.0 / ((1.0 - ubar + FLOOR) * positions)  # one over the sum of the pooling weights
    weight = tl.where(inside, (1.0 - u + FLOOR) * scale, 0.0)

    row = partial + program * CHANNELS
    by_gate = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    by_weight = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    constant = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        known = c < CHANNELS
        mask = known[:, None] & inside[None, :]
        at = map_offsets(b, c[:, None], p[None, :], size2, size3, xb, xc, x1, x2, x3, X_FORMAT, X_ALIGN)
        grad_at = map_offsets(b, c[:, None], p[None, :], size2, size3, gb, gc, g1, g2, g3, G_FORMAT, G_ALIGN)
        to = map_offsets(b, c[:, None], p[None, :], size2, size3, ob, oc, o1, o2, o3, O_FORMAT, O_ALIGN)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_out + grad_at, mask=mask, other=0.0).to(tl.float32)
        known_prior = tau * tl.load(prior + b * CHANNELS + c, mask=known, other=0.0).to(tl.float32)
        pool = tl.load(grad_pooled + b * CHANNELS + c, mask=known, other=0.0)
        constant += pool * tl.load(pooled + b * CHANNELS + c, mask=known, other=0.0)
        out = g * (1.0 + gate[None, :] * known_prior[:, None]) + weight[None, :] * pool[:, None]
        tl.store(grad_x + to, narrow(out, grad_x.dtype.element_ty, INTERPRET), mask=mask)
        product = g * v
        by_gate += product * known_prior[:, None]
        by_weight += v * pool[:, None]
        tl.store(row + c, tl.sum(product * gate[None, :], 1), mask=known)

    q = gate * (1.0 - gate) * tl.sum(by_gate, 0)
    q = tl.where(inside, q, 0.0)
    tl.store(sums + program, tl.sum(q, 0))
    tl.store(sums + programs + program, tl.sum(q * u, 0))
    offset = map_offsets(b, 0, p, size2, size3, ub, 0, u1, u2, u3, U_FORMAT, U_ALIGN)
    grad = tl.load(grad_u + offset, mask=inside, other=0.0) + tl.load(grad_mean + b) / positions
    grad += alpha * q - scale * (tl.sum(by_weight, 0) - tl.sum(constant, 0))
    grad *= -norm
    m = grad_logits + map_offsets(b, 0, p, size2, size3, mb, mc, m1, m2, m3, M_FORMAT, M_ALIGN)
    if CLASSES == 1:
        value = grad * (first * rest / ((1.0 + rest) * (1.0 + rest)))
        tl.store(m, narrow(value, grad_logits.dtype.element_ty, INTERPRET), mask=inside)
    else:
        share = 1.0 / (1.0 + rest)
        centre = total * share
        for _ in range(CLASSES):
            d = tl.load(a, mask=inside, other=0.0).to(tl.float32) - top
            value = grad * (tl.exp(d) * share * (d - centre))
            tl.store(m, narrow(value, grad_logits.dtype.element_ty, INTERPRET), mask=inside)
            a += class_stride
            m += grad_class_stride


@triton.jit
def backward_finish_kernel(
    partial,  # (B, tiles, C) float32
    sums,  # (2, B * tiles) float32
    doubt,  # (B,), contiguous
    coeffs,  # (3,), contiguous
    grad_prior,  # (B, C)
    grad_doubt,  # (B,)
    grad_coeffs,  # (3,)
    tau,
    tiles,
    programs,  # B * tiles
    prior_sb,
    prior_sc,
    doubt_sb,
    coeffs_s,
    CHANNELS: tl.constexpr,
    INTERPRET: tl.constexpr,
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
        dtype = grad_coeffs.dtype.element_ty
        tl.store(grad_coeffs, narrow(tl.sum(by_alpha, 0), dtype, INTERPRET))
        tl.store(grad_coeffs + coeffs_s, narrow(tl.sum(by_beta, 0), dtype, INTERPRET))
        tl.store(grad_coeffs + 2 * coeffs_s, narrow(tl.sum(by_gamma, 0), dtype, INTERPRET))
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
        out = narrow(tau * total, grad_prior.dtype.element_ty, INTERPRET)
        tl.store(grad_prior + b * prior_sb + c * prior_sc, out, mask=known)
        if block == 0:
            beta = tl.load(coeffs + 1).to(tl.float32)
            value = narrow(-beta * tl.sum(gate, 0), grad_doubt.dtype.element_ty, INTERPRET)
            tl.store(grad_doubt + b * doubt_sb, value)


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
    positions = positions_of(x)
    x_out = torch.empty_like(x)
    u = x.new_empty(x.shape[:1] + x.shape[2:], dtype=torch.float32)
    if x.numel() == 0:
        nothing = torch.full((batch, channels + 1), math.nan, dtype=torch.float32, device=x.device)
        return x_out, nothing[:, :channels].contiguous(), nothing[:, channels].contiguous(), u
    size2, size3, (mx, ml, mo) = maps_of([(x, True), (seg_logits, True), (x_out, True)])
    if tile is None:
        inputs = x, seg_logits, prior, cls_uncertainty, coeffs, tau
        tile = tile_for("gated_fusion", x, mx.format, lambda tile: gated_fusion(*inputs, tile))
    block_c, block_p = tile_shape(x, mx.format == LAST.value, tile.elements)
    tiles = triton.cdiv(positions, block_p)
    classes = seg_logits.shape[1]
    pooled = x.new_empty((batch, channels), dtype=torch.float32)
    mean = x.new_empty((batch,), dtype=torch.float32)
    partial = x.new_empty((batch, tiles, channels + 2), dtype=torch.float32)
    p_align = divisor(positions)
    forward_kernel[(batch * tiles,)](
        x,
        seg_logits,
        prior.contiguous(),
        cls_uncertainty.contiguous(),
        coeffs.contiguous(),
        x_out,
        u,
        partial,
        tau,
        positions // p_align,
        tiles,
        size2,
        size3,
        *mx.strides,
        *ml.strides,
        *mo.strides,
        ml.class_stride,
        1.0 / math.log(max(classes, 2)),
        CHANNELS=channels,
        CLASSES=classes,
        X_FORMAT=mx.format,
        X_ALIGN=mx.align,
        L_FORMAT=ml.format,
        L_ALIGN=ml.align,
        O_FORMAT=mo.format,
        O_ALIGN=mo.align,
        P_ALIGN=p_align,
        WIDE=max(mx.span, ml.span, mo.span, u.numel(), partial.numel()) >= INT32_OFFSETS,
        INTERPRET=interpreted(forward_kernel),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=tile.warps,
    )
    forward_finish_kernel[(batch * triton.cdiv(channels, REDUCE_C),)](
        partial,
        pooled,
        mean,
        positions,
        tiles,
        CHANNELS=channels,
        TILES=power_of_two(tiles),
        BLOCK_C=REDUCE_C,
        BLOCK_T=REDUCE_T,
        num_warps=4,
    )
    return x_out, pooled, mean, u


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
    positions = positions_of(x)
    grad_x, grad_logits = torch.empty_like(x), torch.empty_like(seg_logits)
    small = prior, cls_uncertainty, coeffs
    if x.numel() == 0:
        return grad_x, grad_logits, *(torch.zeros_like(value) for value in small)
    grad_prior, grad_doubt, grad_coeffs = (torch.empty_like(value) for value in small)
    prior, cls_uncertainty, coeffs = (value.contiguous() for value in small)
    maps = [(grad_x_out, True), (grad_u, False), (x, True), (seg_logits, True), (grad_x, True)]
    size2, size3, (mg, mu, mx, ml, mo, mm) = maps_of([*maps, (grad_logits, True)])
    if tile is None:
        grads = grad_x_out, grad_pooled, grad_mean, grad_u
        saved = x, seg_logits, prior, cls_uncertainty, coeffs, pooled, mean_uncertainty, tau
        run = lambda tile: gated_fusion_backward(*grads, *saved, tile)  # noqa: E731
        tile = tile_for("gated_fusion_backward", x, mx.format, run)
    block_c, block_p = tile_shape(x, mx.format == LAST.value, tile.elements)
    tiles = triton.cdiv(positions, block_p)
    classes = seg_logits.shape[1]
    partial = x.new_empty((batch, tiles, channels), dtype=torch.float32)
    sums = x.new_empty((2, batch * tiles), dtype=torch.float32)
    p_align = divisor(positions)
    wide = max(*(m.span for m in (mg, mu, mx, ml, mo, mm)), partial.numel()) >= INT32_OFFSETS
    backward_kernel[(batch * tiles,)](
        grad_x_out,
        grad_pooled.contiguous(),
        grad_mean.contiguous(),
        grad_u,
        x,
        seg_logits,
        prior,
        cls_uncertainty,
        coeffs,
        pooled.contiguous(),
        mean_uncertainty.contiguous(),
        grad_x,
        grad_logits,
        partial,
        sums,
        tau,
        positions // p_align,
        tiles,
        batch * tiles,
        size2,
        size3,
        *mg.strides,
        mu.strides[0],
        *mu.strides[2:],
        *mx.strides,
        *ml.strides,
        *mo.strides,
        *mm.strides,
        ml.class_stride,
        mm.class_stride,
        1.0 / math.log(max(classes, 2)),
        CHANNELS=channels,
        CLASSES=classes,
        G_FORMAT=mg.format,
        G_ALIGN=mg.align,
        U_FORMAT=mu.format,
        U_ALIGN=mu.align,
        X_FORMAT=mx.format,
        X_ALIGN=mx.align,
        L_FORMAT=ml.format,
        L_ALIGN=ml.align,
        O_FORMAT=mo.format,
        O_ALIGN=mo.align,
        M_FORMAT=mm.format,
        M_ALIGN=mm.align,
        P_ALIGN=p_align,
        WIDE=wide,
        INTERPRET=interpreted(backward_kernel),
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
        grad_doubt,
        grad_coeffs,
        tau,
        tiles,
        batch * tiles,
        *grad_prior.stride(),
        *grad_doubt.stride(),
        *grad_coeffs.stride(),
        CHANNELS=channels,
        INTERPRET=interpreted(backward_finish_kernel),
        TILES=power_of_two(tiles),
        PROGRAMS=power_of_two(batch * tiles),
        BLOCK_C=REDUCE_C,
        BLOCK_T=REDUCE_T,
        BLOCK_N=1024,
        num_warps=4,
    )
    return grad_x, grad_logits, grad_prior, grad_doubt, grad_coeffs
