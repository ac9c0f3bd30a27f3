"""Triton kernels of task_interaction's gate algebra: one launch in evaluation, two in training. SPEC 1.3.

Between the two passes over x stand eight small products with vectors. A program computes them all for its
sample, row blocks of a weight at a time; what a later product needs of an earlier one goes through a scratch
row of global memory, with a barrier in between. With the batch's own statistics the samples depend on each
other, by the normalisation alone: `normalise_kernel` does it beforehand, a block of features over all samples
by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import interpreted, narrow, power_of_two

EPS = tl.constexpr(1e-3)  # of the normalisation over the batch
SMALLEST_SQUARE = tl.constexpr(1e-12)
BLOCK_O = 32
BLOCK_K = 128
NORM_F = 16  # features of one program of the normalisation,
NORM_B = 32  # samples of one of its products,
NORM_K = 64  # and hidden channels


@triton.jit
def matvec(weight, vector, o, known, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows o of weight (ROWS, COLUMNS) times vector (COLUMNS), in float32."""
    total = tl.zeros([o.shape[0]], tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < COLUMNS
        v = tl.load(vector + k, mask=inside, other=0.0).to(tl.float32)
        mask = known[:, None] & inside[None, :]
        w = tl.load(weight + o[:, None] * COLUMNS + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(w * v[None, :], 1)
    return total


@triton.jit
def vector_at(pointer, o, known):
    return tl.load(pointer + o, mask=known, other=0.0).to(tl.float32)


@triton.jit
def linear_relu(
    hidden, step, fc_weight, fc_bias, b, f, BATCH, FEATURES, HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """relu(W2 q + b2) of samples b and features f, in float32; NaN stays."""
    total = tl.zeros([b.shape[0], f.shape[0]], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_mask = (b < BATCH)[:, None] & (k < HIDDEN)[None, :]
        w_mask = (f < FEATURES)[None, :] & (k < HIDDEN)[:, None]
        a = tl.load(hidden + b[:, None] * step + k[None, :], mask=a_mask, other=0.0)
        w = tl.load(fc_weight + f[None, :] * HIDDEN + k[:, None], mask=w_mask, other=0.0).to(tl.float32)
        total = tl.dot(a, w, total, input_precision="ieee")
    total += vector_at(fc_bias, f, f < FEATURES)[None, :]
    return tl.where(total < 0, 0.0, total)


@triton.jit
def normalise_kernel(
    summary,  # (B, C + H + 1) float32
    fc_weight,  # (F, H); all weights contiguous
    fc_bias,
    bn_weight,
    bn_bias,
    active,  # (B, F) float32: relu(W2 q + b2)
    context,  # (B, F) float32, rows context_step apart
    mean_out,  # (F,) float32
    var_out,  # (F,) float32, unbiased
    deviation_out,  # (F,) float32: what was divided by
    batch,
    context_step,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    SAMPLES: tl.constexpr,  # power of two, at least batch
    BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    known = f < FEATURES
    step: tl.constexpr = CHANNELS + HIDDEN + 1
    total = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = linear_relu(summary + CHANNELS, step, fc_weight, fc_bias, b, f, batch, FEATURES, HIDDEN, BLOCK_K)
        tl.store(active + b[:, None] * FEATURES + f[None, :], a, mask)
        total += tl.sum(tl.where(mask, a, 0.0), 0)
    mean = total / batch
    tl.debug_barrier()
    square = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = tl.load(active + b[:, None] * FEATURES + f[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, a - mean[None, :], 0.0)
        square += tl.sum(centred * centred, 0)
    deviation = tl.sqrt(square / batch + EPS)
    tl.store(mean_out + f, mean, known)
    tl.store(var_out + f, square / (batch - 1), known)
    tl.store(deviation_out + f, deviation, known)
    factor = vector_at(bn_weight, f, known) / deviation
    offset = vector_at(bn_bias, f, known)
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = tl.load(active + b[:, None] * FEATURES + f[None, :], mask=mask, other=0.0)
        normal = (a - mean[None, :]) * factor[None, :] + offset[None, :]
        tl.store(context + b[:, None] * context_step + f[None, :], normal, mask)


@triton.jit
def gate_kernel(
    summary,  # (B, C + H + 1) float32: mean of x, pooled hidden map, scene complexity
    y,  # (B, F)
    fc_weight,  # (F, H); all weights contiguous
    fc_bias,
    bn_weight,
    bn_bias,
    bn_mean,
    bn_var,
    cls_gate_weight,  # (F, F)
    cls_gate_bias,
    prior_weight,  # (C, F)
    prior_bias,
    seg_gate_weight,  # (C, C)
    seg_gate_bias,
    seg_proj,  # (A, C)
    cls_proj,  # (A, F)
    gate1_weight,  # (G, 3)
    gate1_bias,
    gate2_weight,  # (2, G)
    gate2_bias,
    scratch,  # (B, 2 F + C) float32: context (there already in training), y+ - y, mean of x times message
    scale,  # (B, C) float32
    y_out,  # (B, F)
    gates,  # (B, 2) float32
    signals,  # (B, 3) float32
    mean_out,  # (F,) float32: in evaluation, the running statistics as they were used
    var_out,
    tau,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GATE: tl.constexpr,
    TRAINING: tl.constexpr,
    INTERPRET: tl.constexpr,
    ALL_A: tl.constexpr,  # powers of two, at least ALIGNED, FEATURES and GATE
    ALL_F: tl.constexpr,
    ALL_G: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    mean = summary + b * (CHANNELS + HIDDEN + 1)
    y += b * FEATURES
    context = scratch + b * (2 * FEATURES + CHANNELS)
    change = context + FEATURES
    moved = change + FEATURES
    scale += b * CHANNELS
    if not TRAINING:
        for start in range(0, FEATURES, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            known = o < FEATURES
            active = matvec(fc_weight, mean + CHANNELS, o, known, FEATURES, HIDDEN, BLOCK_K)
            active += vector_at(fc_bias, o, known)
            active = tl.where(active < 0, 0.0, active)  # NaN stays
            used_mean = vector_at(bn_mean, o, known)
            used_var = vector_at(bn_var, o, known)
            normal = (active - used_mean) / tl.sqrt(used_var + EPS)
            normal = normal * vector_at(bn_weight, o, known) + vector_at(bn_bias, o, known)
            tl.store(context + o, normal, known)
            if b == 0:
                tl.store(mean_out + o, used_mean, known)
                tl.store(var_out + o, used_var, known)
    for start in range(0, CHANNELS, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < CHANNELS
        prior = matvec(prior_weight, y, o, known, CHANNELS, FEATURES, BLOCK_K)
        gate = matvec(seg_gate_weight, mean, o, known, CHANNELS, CHANNELS, BLOCK_K)
        message = tau * tl.sigmoid(gate + vector_at(seg_gate_bias, o, known))
        message *= tl.sigmoid(prior + vector_at(prior_bias, o, known))
        tl.store(scale + o, message, known)
        tl.store(moved + o, message * vector_at(mean, o, known), known)
    tl.debug_barrier()
    for start in range(0, FEATURES, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < FEATURES
        gate = matvec(cls_gate_weight, context, o, known, FEATURES, FEATURES, BLOCK_K)
        gate = tl.sigmoid(gate + vector_at(cls_gate_bias, o, known))
        tl.store(change + o, gate * vector_at(context, o, known), known)
    tl.debug_barrier()
    a = tl.arange(0, ALL_A)
    seg = matvec(seg_proj, moved, a, a < ALIGNED, ALIGNED, CHANNELS, BLOCK_K)
    cls = matvec(cls_proj, change, a, a < ALIGNED, ALIGNED, FEATURES, BLOCK_K)
    seg_square = tl.sum(seg * seg, 0)
    cls_square = tl.sum(cls * cls, 0)
    # Not maximum, which loses NaN. One norm after the other: their product may be too small for float32.
    seg_norm = tl.sqrt(tl.where(seg_square < SMALLEST_SQUARE, SMALLEST_SQUARE, seg_square))
    cls_norm = tl.sqrt(tl.where(cls_square < SMALLEST_SQUARE, SMALLEST_SQUARE, cls_square))
    alignment = tl.sum((seg / seg_norm) * (cls / cls_norm), 0)
    complexity = tl.load(mean + CHANNELS + HIDDEN)
    f = tl.arange(0, ALL_F)
    known = f < FEATURES
    before = vector_at(y, f, known)
    added = vector_at(change, f, known)
    after = before + added
    centred = tl.where(known, after - tl.sum(after, 0) / FEATURES, 0.0)
    variance = tl.sum(centred * centred, 0) / FEATURES
    rest = 1.0 + variance
    confidence = tl.log(rest) + (variance - (rest - 1.0)) / rest  # log1p

    g = tl.arange(0, ALL_G)
    inside = g < GATE
    hidden = vector_at(gate1_bias, g, inside)
    hidden += vector_at(gate1_weight, 3 * g, inside) * alignment
    hidden += vector_at(gate1_weight + 1, 3 * g, inside) * complexity
    hidden += vector_at(gate1_weight + 2, 3 * g, inside) * confidence
    hidden = tl.where(hidden < 0, 0.0, hidden)
    to_seg = tl.sum(vector_at(gate2_weight, g, inside) * hidden, 0) + tl.load(gate2_bias).to(tl.float32)
    to_cls = tl.sum(vector_at(gate2_weight + GATE, g, inside) * hidden, 0)
    to_seg = tl.sigmoid(to_seg)
    to_cls = tl.sigmoid(to_cls + tl.load(gate2_bias + 1).to(tl.float32))
    tl.store(gates + 2 * b, to_seg)
    tl.store(gates + 2 * b + 1, to_cls)
    tl.store(signals + 3 * b, alignment)
    tl.store(signals + 3 * b + 1, complexity)
    tl.store(signals + 3 * b + 2, confidence)
    out = narrow(before + to_cls * added, y_out.dtype.element_ty, INTERPRET)
    tl.store(y_out + b * FEATURES + f, out, known)
    for start in range(0, CHANNELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tl.store(scale + k, vector_at(scale, k, k < CHANNELS) * to_seg, k < CHANNELS)


def normalise(
    summary: Tensor,  # (B, C + C/2 + 1) float32
    fc_weight: Tensor,  # (F, C/2); all of them contiguous
    fc_bias: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    context: Tensor,  # (B, F) float32, written; rows contiguous
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """relu(W2 q + b2) (B, F), the batch's mean and unbiased variance (F,), and the deviation divided by."""
    features, hidden = fc_weight.shape
    batch = summary.shape[0]
    active = summary.new_empty((batch, features))
    mean, var, deviation = (summary.new_empty((features,)) for _ in range(3))
    normalise_kernel[(triton.cdiv(features, NORM_F),)](
        summary,
        fc_weight,
        fc_bias,
        bn_weight,
        bn_bias,
        active,
        context,
        mean,
        var,
        deviation,
        batch,
        context.stride(0),
        CHANNELS=summary.shape[1] - hidden - 1,
        HIDDEN=hidden,
        FEATURES=features,
        SAMPLES=power_of_two(batch),
        BLOCK_F=NORM_F,
        BLOCK_B=NORM_B,
        BLOCK_K=NORM_K,
        num_warps=4,
    )
    return active, mean, var, deviation


def gate_algebra(
    summary: Tensor,  # (B, C + C/2 + 1) float32
    y: Tensor,  # (B, F)
    weights: list[Tensor],  # of task_interaction, without W1 and b1
    tau: float,
    training: bool,
) -> tuple[Tensor, ...]:
    """scale (B, C) float32 of x' = x (1 + scale), y' (B, F) in y's dtype, gates (B, 2) and signals (B, 3);
    mean and variance (F,) float32: of evaluation the running ones, of training the batch's, unbiased."""
    batch, features = y.shape
    weights = [value.contiguous() for value in weights]
    fc_weight, seg_proj, gate1 = weights[0], weights[12], weights[14]
    channels, hidden = seg_proj.shape[1], fc_weight.shape[1]
    scale = summary.new_empty((batch, channels))
    scratch = summary.new_empty((batch, 2 * features + channels))
    y_out = torch.empty((batch, features), dtype=y.dtype, device=y.device)
    gates, signals = summary.new_empty((batch, 2)), summary.new_empty((batch, 3))
    if training:
        _, mean, var, _ = normalise(summary, *weights[:4], scratch[:, :features])
    else:
        mean, var = summary.new_empty((features,)), summary.new_empty((features,))
    gate_kernel[(batch,)](
        summary,
        y.contiguous(),
        *weights,
        scratch,
        scale,
        y_out,
        gates,
        signals,
        mean,
        var,
        tau,
        CHANNELS=channels,
        HIDDEN=hidden,
        FEATURES=features,
        ALIGNED=seg_proj.shape[0],
        GATE=gate1.shape[0],
        TRAINING=training,
        INTERPRET=interpreted(gate_kernel),
        ALL_A=power_of_two(seg_proj.shape[0]),
        ALL_F=power_of_two(features),
        ALL_G=power_of_two(gate1.shape[0]),
        BLOCK_O=BLOCK_O,
        BLOCK_K=BLOCK_K,
        num_warps=4,  # with 8, some compilers keep to 64 registers and spill
    )
    return scale, y_out, gates, signals, mean, var
