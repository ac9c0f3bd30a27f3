"""Triton kernels of the gate algebra's gradient: two launches in evaluation, four in training. SPEC 1.3.

`gate_gradient_kernel`, one program a sample, computes the forward vectors again and walks back to the
gradients of y, of the means of x and of the context; for each of the eight weights it leaves, in two rows of
scratch, the two vectors whose outer product is the weight's gradient. In training `unnormalise_kernel` goes
back through the normalisation, a block of features over all samples by one program. `weight_gradient_kernel`
adds the outer products over the batch, in its order, and takes the last step back, to the pooled hidden map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate_algebra import BLOCK_K, BLOCK_O, EPS, SMALLEST_SQUARE, matvec, normalise, vector_at
from .tiles import interpreted, narrow, power_of_two

NORM_F = 16  # features of one program of the way back through the normalisation,
NORM_B = 32  # and samples that it takes at once
SQUARE = 32  # rows and columns of a weight's gradient in one program


@triton.jit
def transposed_matvec(
    weight, vector, k, known, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_O: tl.constexpr
):
    """Columns k of weight (ROWS, COLUMNS), transposed, times vector (ROWS), in float32."""
    total = tl.zeros([BLOCK_O, k.shape[0]], tl.float32)
    for start in range(0, ROWS, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        inside = o < ROWS
        v = tl.load(vector + o, mask=inside, other=0.0)
        mask = inside[:, None] & known[None, :]
        w = tl.load(weight + o[:, None] * COLUMNS + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += w * v[:, None]
    return tl.sum(total, 0)


@triton.jit
def normalised_gradient(grad, unit, norm, square):
    """Gradient of v for the gradient of unit = v / norm, norm being the larger of |v| and a constant."""
    along = tl.where(square < SMALLEST_SQUARE, 0.0, tl.sum(grad * unit, 0))
    return (grad - unit * along) / norm


@triton.jit
def gate_gradient_kernel(
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
    grad_scale,  # (B, C) float32
    grad_y_out,  # (B, F)
    grad_gates,  # (B, 2) float32
    grad_signals,  # (B, 3) float32
    left,  # (B, LEFT) float32: gradients of what eight linear maps give, of ctx, and of ctx times normal
    right,  # (B, RIGHT) float32: what those maps are given
    scratch,  # (B, 4 C + 6 F) float32
    scale,  # (B, C) float32
    grad_summary,  # (B, C + H + 1) float32
    grad_y,  # (B, F)
    tau,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GATE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
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
    grad_y += b * FEATURES
    grad_y_out += b * FEATURES
    scale += b * CHANNELS
    grad_scale += b * CHANNELS
    grad_mean = grad_summary + b * (CHANNELS + HIDDEN + 1)
    # The rows of left and right, in the order of the eight weights.
    by_fc = left + b * LEFT
    by_cls_gate = by_fc + FEATURES
    by_prior = by_cls_gate + FEATURES
    by_seg_gate = by_prior + CHANNELS
    by_seg = by_seg_gate + CHANNELS
    by_cls = by_seg + ALIGNED
    by_gate1 = by_cls + ALIGNED
    by_gate2 = by_gate1 + GATE
    by_context = by_gate2 + 2
    by_normal = by_context + FEATURES
    pooled = right + b * RIGHT
    context = pooled + HIDDEN
    known_y = context + FEATURES
    means = known_y + FEATURES
    moved = means + CHANNELS
    change = moved + CHANNELS
    told = change + FEATURES
    opinion = told + 3
    # What is read back is never overwritten: a value may be loaded by more threads than store it.
    message = scratch + b * (4 * CHANNELS + 6 * FEATURES)
    other_prior = message + CHANNELS
    other_gate = other_prior + CHANNELS
    part_mean = other_gate + CHANNELS
    gate_at = part_mean + CHANNELS
    part_y = gate_at + FEATURES
    part_change = part_y + FEATURES
    part_context = part_change + FEATURES
    normal_at = part_context + FEATURES
    slope = normal_at + FEATURES

    for start in range(0, HIDDEN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tl.store(pooled + k, vector_at(mean + CHANNELS, k, k < HIDDEN), k < HIDDEN)
    if not TRAINING:
        for start in range(0, FEATURES, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            known = o < FEATURES
            active = matvec(fc_weight, mean + CHANNELS, o, known, FEATURES, HIDDEN, BLOCK_K)
            active += vector_at(fc_bias, o, known)
            active = tl.where(active < 0, 0.0, active)
            deviation = tl.sqrt(vector_at(bn_var, o, known) + EPS)
            normal = (active - vector_at(bn_mean, o, known)) / deviation
            factor = vector_at(bn_weight, o, known)
            tl.store(context + o, normal * factor + vector_at(bn_bias, o, known), known)
            tl.store(normal_at + o, normal, known)
            tl.store(slope + o, tl.where(active <= 0, 0.0, factor / deviation), known)
    to_seg = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, CHANNELS, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < CHANNELS
        prior = matvec(prior_weight, y, o, known, CHANNELS, FEATURES, BLOCK_K)
        prior = tl.sigmoid(prior + vector_at(prior_bias, o, known))
        gate = matvec(seg_gate_weight, mean, o, known, CHANNELS, CHANNELS, BLOCK_K)
        gate = tl.sigmoid(gate + vector_at(seg_gate_bias, o, known))
        m = tau * gate * prior
        value = vector_at(mean, o, known)
        tl.store(message + o, m, known)
        tl.store(other_prior + o, 1.0 - prior, known)
        tl.store(other_gate + o, 1.0 - gate, known)
        tl.store(means + o, value, known)
        tl.store(moved + o, m * value, known)
        to_seg += vector_at(grad_scale, o, known) * m
    tl.debug_barrier()
    to_cls = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, FEATURES, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < FEATURES
        gate = matvec(cls_gate_weight, context, o, known, FEATURES, FEATURES, BLOCK_K)
        gate = tl.sigmoid(gate + vector_at(cls_gate_bias, o, known))
        added = gate * vector_at(context, o, known)
        tl.store(gate_at + o, gate, known)
        tl.store(change + o, added, known)
        tl.store(known_y + o, vector_at(y, o, known), known)
        to_cls += vector_at(grad_y_out, o, known) * added
    tl.debug_barrier()

    a = tl.arange(0, ALL_A)
    seg = matvec(seg_proj, moved, a, a < ALIGNED, ALIGNED, CHANNELS, BLOCK_K)
    cls = matvec(cls_proj, change, a, a < ALIGNED, ALIGNED, FEATURES, BLOCK_K)
    seg_square = tl.sum(seg * seg, 0)
    cls_square = tl.sum(cls * cls, 0)
    seg_norm = tl.sqrt(tl.where(seg_square < SMALLEST_SQUARE, SMALLEST_SQUARE, seg_square))
    cls_norm = tl.sqrt(tl.where(cls_square < SMALLEST_SQUARE, SMALLEST_SQUARE, cls_square))
    seg = seg / seg_norm
    cls = cls / cls_norm
    alignment = tl.sum(seg * cls, 0)
    complexity = tl.load(mean + CHANNELS + HIDDEN)
    f = tl.arange(0, ALL_F)
    known_f = f < FEATURES
    after = vector_at(y, f, known_f) + vector_at(change, f, known_f)
    centred = tl.where(known_f, after - tl.sum(after, 0) / FEATURES, 0.0)
    rest = 1.0 + tl.sum(centred * centred, 0) / FEATURES
    confidence = tl.log(rest) + (tl.sum(centred * centred, 0) / FEATURES - (rest - 1.0)) / rest  # log1p
    g = tl.arange(0, ALL_G)
    known_g = g < GATE
    first = vector_at(gate1_weight, 3 * g, known_g)
    second = vector_at(gate1_weight + 1, 3 * g, known_g)
    third = vector_at(gate1_weight + 2, 3 * g, known_g)
    hidden = vector_at(gate1_bias, g, known_g) + first * alignment + second * complexity + third * confidence
    hidden = tl.where(hidden < 0, 0.0, hidden)
    seg_row = vector_at(gate2_weight, g, known_g)
    cls_row = vector_at(gate2_weight + GATE, g, known_g)
    seg_gate = tl.sigmoid(tl.sum(seg_row * hidden, 0) + tl.load(gate2_bias).to(tl.float32))
    cls_gate = tl.sigmoid(tl.sum(cls_row * hidden, 0) + tl.load(gate2_bias + 1).to(tl.float32))

    by_seg_gate_value = (tl.sum(to_seg, 0) + tl.load(grad_gates + 2 * b)) * seg_gate * (1.0 - seg_gate)
    by_cls_gate_value = (tl.sum(to_cls, 0) + tl.load(grad_gates + 2 * b + 1)) * cls_gate * (1.0 - cls_gate)
    by_hidden = seg_row * by_seg_gate_value + cls_row * by_cls_gate_value
    by_hidden = tl.where(hidden <= 0, 0.0, by_hidden)
    by_alignment = tl.sum(first * by_hidden, 0) + tl.load(grad_signals + 3 * b)
    by_complexity = tl.sum(second * by_hidden, 0) + tl.load(grad_signals + 3 * b + 1)
    by_confidence = tl.sum(third * by_hidden, 0) + tl.load(grad_signals + 3 * b + 2)
    tl.store(by_gate2, by_seg_gate_value)
    tl.store(by_gate2 + 1, by_cls_gate_value)
    tl.store(by_gate1 + g, by_hidden, known_g)
    tl.store(opinion + g, hidden, known_g)
    tl.store(told, alignment)
    tl.store(told + 1, complexity)
    tl.store(told + 2, confidence)
    tl.store(grad_mean + CHANNELS + HIDDEN, by_complexity)
    tl.store(by_seg + a, normalised_gradient(by_alignment * cls, seg, seg_norm, seg_square), a < ALIGNED)
    tl.store(by_cls + a, normalised_gradient(by_alignment * seg, cls, cls_norm, cls_square), a < ALIGNED)
    by_after = by_confidence / rest * (2.0 / FEATURES) * centred
    by_out = vector_at(grad_y_out, f, known_f)
    tl.store(part_y + f, by_out + by_after, known_f)
    tl.store(part_change + f, by_out * cls_gate + by_after, known_f)
    tl.debug_barrier()

    for start in range(0, CHANNELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < CHANNELS
        by_moved = transposed_matvec(seg_proj, by_seg, k, known, ALIGNED, CHANNELS, BLOCK_O)
        m = vector_at(message, k, known)
        by_message = vector_at(grad_scale, k, known) * seg_gate + by_moved * vector_at(mean, k, known)
        tl.store(scale + k, m * seg_gate, known)
        tl.store(part_mean + k, by_moved * m, known)
        tl.store(by_prior + k, by_message * m * vector_at(other_prior, k, known), known)
        tl.store(by_seg_gate + k, by_message * m * vector_at(other_gate, k, known), known)
    for start in range(0, FEATURES, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < FEATURES
        by_change = transposed_matvec(cls_proj, by_cls, k, known, ALIGNED, FEATURES, BLOCK_O)
        by_change += vector_at(part_change, k, known)
        gate = vector_at(gate_at, k, known)
        tl.store(part_context + k, by_change * gate, known)
        by_gate = by_change * vector_at(context, k, known) * gate * (1.0 - gate)
        tl.store(by_cls_gate + k, by_gate, known)
    tl.debug_barrier()

    for start in range(0, CHANNELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < CHANNELS
        by_mean = transposed_matvec(seg_gate_weight, by_seg_gate, k, known, CHANNELS, CHANNELS, BLOCK_O)
        tl.store(grad_mean + k, by_mean + vector_at(part_mean, k, known), known)
    for start in range(0, FEATURES, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < FEATURES
        by_y = transposed_matvec(prior_weight, by_prior, k, known, CHANNELS, FEATURES, BLOCK_O)
        by_y += vector_at(part_y, k, known)
        tl.store(grad_y + k, narrow(by_y, grad_y.dtype.element_ty, INTERPRET), known)
        total = transposed_matvec(cls_gate_weight, by_cls_gate, k, known, FEATURES, FEATURES, BLOCK_O)
        total += vector_at(part_context, k, known)
        tl.store(by_context + k, total, known)
        if not TRAINING:
            tl.store(by_normal + k, total * vector_at(normal_at, k, known), known)
            tl.store(by_fc + k, total * vector_at(slope, k, known), known)


@triton.jit
def unnormalise_kernel(
    active,  # (B, F) float32: relu(W2 q + b2)
    mean,  # (F,) float32
    deviation,  # (F,) float32
    bn_weight,  # (F,)
    by_context,  # (B, F) float32, rows LEFT apart, as the next two
    by_normal,  # gradient of context times normal value, written
    by_fc,  # gradient of W2 q + b2, written
    batch,
    FEATURES: tl.constexpr,
    LEFT: tl.constexpr,
    SAMPLES: tl.constexpr,  # power of two, at least batch
    BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    known = f < FEATURES
    centre = vector_at(mean, f, known)
    divided = tl.load(deviation + f, mask=known, other=1.0)
    total = tl.zeros([BLOCK_F], tl.float32)
    along = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = tl.load(active + b[:, None] * FEATURES + f[None, :], mask=mask, other=0.0)
        grad = tl.load(by_context + b[:, None] * LEFT + f[None, :], mask=mask, other=0.0)
        product = grad * ((a - centre[None, :]) / divided[None, :])
        tl.store(by_normal + b[:, None] * LEFT + f[None, :], product, mask)
        total += tl.sum(grad, 0)
        along += tl.sum(product, 0)
    total = total / batch
    along = along / batch
    factor = vector_at(bn_weight, f, known) / divided
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = tl.load(active + b[:, None] * FEATURES + f[None, :], mask=mask, other=0.0)
        grad = tl.load(by_context + b[:, None] * LEFT + f[None, :], mask=mask, other=0.0)
        normal = (a - centre[None, :]) / divided[None, :]
        value = factor[None, :] * (grad - total[None, :] - normal * along[None, :])
        tl.store(by_fc + b[:, None] * LEFT + f[None, :], tl.where(a <= 0, 0.0, value), mask)


@triton.jit
def store_tile(
    weight_grad,
    bias_grad,
    value,
    sums,
    o,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,  # whether there is one
    INTERPRET: tl.constexpr,
):
    mask = (o < ROWS)[:, None] & (k < COLUMNS)[None, :]
    value = narrow(value, weight_grad.dtype.element_ty, INTERPRET)
    tl.store(weight_grad + o[:, None] * COLUMNS + k[None, :], value, mask)
    if BIAS:
        sums = narrow(sums, bias_grad.dtype.element_ty, INTERPRET)
        tl.store(bias_grad + o, sums, (o < ROWS) & (tl.min(k, 0) == 0))


@triton.jit
def weight_gradient_kernel(
    left,  # (B, LEFT) float32, of gate_gradient_kernel
    right,  # (B, RIGHT) float32
    fc_weight,  # (F, H), contiguous, as all weights and their gradients
    bn_weight,  # (F,)
    deviation,  # (F,): in evaluation the running variance
    fc_weight_grad,
    fc_bias_grad,
    bn_weight_grad,
    bn_bias_grad,
    bn_mean_grad,
    bn_var_grad,
    cls_gate_weight_grad,
    cls_gate_bias_grad,
    prior_weight_grad,
    prior_bias_grad,
    seg_gate_weight_grad,
    seg_gate_bias_grad,
    seg_proj_grad,
    cls_proj_grad,
    gate1_weight_grad,
    gate1_bias_grad,
    gate2_weight_grad,
    gate2_bias_grad,
    grad_summary,  # (B, C + H + 1) float32
    batch,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GATE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TRAINING: tl.constexpr,
    INTERPRET: tl.constexpr,
    SAMPLES: tl.constexpr,  # power of two, at least batch
    BLOCK_B: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of the eight gradients, one weight after the other, end at:
    parts_f: tl.constexpr = (FEATURES + SQUARE - 1) // SQUARE
    parts_c: tl.constexpr = (CHANNELS + SQUARE - 1) // SQUARE
    parts_a: tl.constexpr = (ALIGNED + SQUARE - 1) // SQUARE
    parts_g: tl.constexpr = (GATE + SQUARE - 1) // SQUARE
    fc_end: tl.constexpr = parts_f * ((HIDDEN + SQUARE - 1) // SQUARE)
    cls_gate_end: tl.constexpr = fc_end + parts_f * parts_f
    prior_end: tl.constexpr = cls_gate_end + parts_c * parts_f
    seg_gate_end: tl.constexpr = prior_end + parts_c * parts_c
    seg_end: tl.constexpr = seg_gate_end + parts_a * parts_c
    cls_end: tl.constexpr = seg_end + parts_a * parts_f
    gate1_end: tl.constexpr = cls_end + parts_g
    gate2_end: tl.constexpr = gate1_end + parts_g
    norm_end: tl.constexpr = gate2_end + parts_f
    t = tl.program_id(0)
    if t < gate2_end:
        # Where its two vectors begin, how long they are, and its first tile.
        one = 0
        two = 0
        rows = FEATURES
        columns = HIDDEN
        first = 0
        if t >= fc_end:
            one = FEATURES
            two = HIDDEN
            columns = FEATURES
            first = fc_end
        if t >= cls_gate_end:
            one = 2 * FEATURES
            two = HIDDEN + FEATURES
            rows = CHANNELS
            first = cls_gate_end
        if t >= prior_end:
            one = 2 * FEATURES + CHANNELS
            two = HIDDEN + 2 * FEATURES
            columns = CHANNELS
            first = prior_end
        if t >= seg_gate_end:
            one = 2 * FEATURES + 2 * CHANNELS
            two = HIDDEN + 2 * FEATURES + CHANNELS
            rows = ALIGNED
            first = seg_gate_end
        if t >= seg_end:
            one = 2 * FEATURES + 2 * CHANNELS + ALIGNED
            two = HIDDEN + 2 * FEATURES + 2 * CHANNELS
            columns = FEATURES
            first = seg_end
        if t >= cls_end:
            one = 2 * FEATURES + 2 * CHANNELS + 2 * ALIGNED
            two = HIDDEN + 3 * FEATURES + 2 * CHANNELS
            rows = GATE
            columns = 3
            first = cls_end
        if t >= gate1_end:
            one = 2 * FEATURES + 2 * CHANNELS + 2 * ALIGNED + GATE
            two = HIDDEN + 3 * FEATURES + 2 * CHANNELS + 3
            rows = 2
            columns = GATE
            first = gate1_end
        across = (columns + SQUARE - 1) // SQUARE
        o = (t - first) // across * SQUARE + tl.arange(0, SQUARE)
        k = (t - first) % across * SQUARE + tl.arange(0, SQUARE)
        value = tl.zeros([SQUARE, SQUARE], tl.float32)
        gathered = tl.zeros([SQUARE, BLOCK_B], tl.float32)
        for start in range(0, SAMPLES, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B).to(tl.int64)
            there = b < batch
            l_mask = (o < rows)[:, None] & there[None, :]
            r_mask = there[:, None] & (k < columns)[None, :]
            ones = tl.load(left + one + b[None, :] * LEFT + o[:, None], mask=l_mask, other=0.0)
            others = tl.load(right + two + b[:, None] * RIGHT + k[None, :], mask=r_mask, other=0.0)
            value = tl.dot(ones, others, value, input_precision="ieee")
            gathered += ones
        # Summed only here: Triton 3.6 cannot compile a loop's sum along the last axis that is used twice.
        sums = tl.sum(gathered, 1)
        if t < fc_end:
            store_tile(fc_weight_grad, fc_bias_grad, value, sums, o, k, FEATURES, HIDDEN, True, INTERPRET)
        elif t < cls_gate_end:
            store_tile(
                cls_gate_weight_grad,
                cls_gate_bias_grad,
                value,
                sums,
                o,
                k,
                FEATURES,
                FEATURES,
                True,
                INTERPRET,
            )
        elif t < prior_end:
            store_tile(
                prior_weight_grad, prior_bias_grad, value, sums, o, k, CHANNELS, FEATURES, True, INTERPRET
            )
        elif t < seg_gate_end:
            store_tile(
                seg_gate_weight_grad,
                seg_gate_bias_grad,
                value,
                sums,
                o,
                k,
                CHANNELS,
                CHANNELS,
                True,
                INTERPRET,
            )
        elif t < seg_end:
            store_tile(seg_proj_grad, seg_proj_grad, value, sums, o, k, ALIGNED, CHANNELS, False, INTERPRET)
        elif t < cls_end:
            store_tile(cls_proj_grad, cls_proj_grad, value, sums, o, k, ALIGNED, FEATURES, False, INTERPRET)
        elif t < gate1_end:
            store_tile(gate1_weight_grad, gate1_bias_grad, value, sums, o, k, GATE, 3, True, INTERPRET)
        else:
            store_tile(gate2_weight_grad, gate2_bias_grad, value, sums, o, k, 2, GATE, True, INTERPRET)
    elif t < norm_end:
        f = (t - gate2_end) * SQUARE + tl.arange(0, SQUARE)
        known = f < FEATURES
        by_offset = tl.zeros([SQUARE], tl.float32)
        by_factor = tl.zeros([SQUARE], tl.float32)
        at = left + (LEFT - 2 * FEATURES) + f
        for start in range(0, SAMPLES, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B).to(tl.int64)
            mask = (b < batch)[:, None] & known[None, :]
            by_offset += tl.sum(tl.load(at[None, :] + b[:, None] * LEFT, mask=mask, other=0.0), 0)
            by_factor += tl.sum(tl.load(at[None, :] + FEATURES + b[:, None] * LEFT, mask=mask, other=0.0), 0)
        tl.store(bn_weight_grad + f, narrow(by_factor, bn_weight_grad.dtype.element_ty, INTERPRET), known)
        tl.store(bn_bias_grad + f, narrow(by_offset, bn_bias_grad.dtype.element_ty, INTERPRET), known)
        by_mean = tl.zeros([SQUARE], tl.float32)
        by_var = tl.zeros([SQUARE], tl.float32)
        if not TRAINING:
            square = tl.load(deviation + f, mask=known, other=1.0).to(tl.float32) + EPS
            factor = vector_at(bn_weight, f, known)
            by_mean = -by_offset * factor / tl.sqrt(square)
            by_var = -0.5 * by_factor * factor / square
        tl.store(bn_mean_grad + f, narrow(by_mean, bn_mean_grad.dtype.element_ty, INTERPRET), known)
        tl.store(bn_var_grad + f, narrow(by_var, bn_var_grad.dtype.element_ty, INTERPRET), known)
    else:
        b = (t - norm_end).to(tl.int64)
        out = grad_summary + b * (CHANNELS + HIDDEN + 1) + CHANNELS
        for start in range(0, HIDDEN, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            known = k < HIDDEN
            total = transposed_matvec(fc_weight, left + b * LEFT, k, known, FEATURES, HIDDEN, BLOCK_O)
            tl.store(out + k, total, known)


def gate_algebra_backward(
    grad_scale: Tensor,  # (B, C) float32
    grad_y_out: Tensor,  # (B, F)
    grad_gates: Tensor,  # (B, 2) float32
    grad_signals: Tensor,  # (B, 3) float32
    summary: Tensor,  # (B, C + C/2 + 1) float32
    y: Tensor,  # (B, F)
    weights: list[Tensor],  # of task_interaction, without W1 and b1
    tau: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """scale (B, C) of the forward pass; gradients of summary, both float32, of y, and of the weights in their
    dtypes, contiguous. Those of the running statistics are zero in training."""
    batch, features = y.shape
    weights = [value.contiguous() for value in weights]
    (aligned, channels), gate, hidden = weights[12].shape, weights[14].shape[0], weights[0].shape[1]
    fc_weight, bn_weight, bn_var = weights[0], weights[2], weights[5]
    lefts = 4 * features + 2 * (channels + aligned) + gate + 2
    rights = 3 * features + 2 * channels + hidden + gate + 3
    left, right = summary.new_empty((batch, lefts)), summary.new_empty((batch, rights))
    scale, grad_summary = summary.new_empty((batch, channels)), summary.new_empty(summary.shape)
    grad_y = torch.empty((batch, features), dtype=y.dtype, device=y.device)
    grads = [torch.empty_like(value) for value in weights]
    deviation = bn_var
    if training:
        context = right[:, hidden : hidden + features]
        active, mean, _, deviation = normalise(summary, *weights[:4], context)
    sizes = {
        "CHANNELS": channels,
        "HIDDEN": hidden,
        "FEATURES": features,
        "ALIGNED": aligned,
        "GATE": gate,
        "LEFT": lefts,
        "RIGHT": rights,
        "TRAINING": training,
        "INTERPRET": interpreted(gate_gradient_kernel),
        "BLOCK_O": BLOCK_O,
        "BLOCK_K": BLOCK_K,
    }
    gate_gradient_kernel[(batch,)](
        summary,
        y.contiguous(),
        *weights,
        grad_scale.contiguous(),
        grad_y_out.contiguous(),
        grad_gates.contiguous(),
        grad_signals.contiguous(),
        left,
        right,
        summary.new_empty((batch, 4 * channels + 6 * features)),
        scale,
        grad_summary,
        grad_y,
        tau,
        **sizes,
        ALL_A=power_of_two(aligned),
        ALL_F=power_of_two(features),
        ALL_G=power_of_two(gate),
        num_warps=4,
    )
    samples = power_of_two(batch)
    if training:
        unnormalise_kernel[(triton.cdiv(features, NORM_F),)](
            active,
            mean,
            deviation,
            bn_weight,
            left[:, lefts - 2 * features :],
            left[:, lefts - features :],
            left,
            batch,
            FEATURES=features,
            LEFT=lefts,
            SAMPLES=samples,
            BLOCK_F=NORM_F,
            BLOCK_B=NORM_B,
            num_warps=4,
        )
    f, h, c, a, g = (triton.cdiv(size, SQUARE) for size in (features, hidden, channels, aligned, gate))
    tiles = f * h + f * f + c * f + c * c + a * c + a * f + 2 * g
    weight_gradient_kernel[(tiles + f + batch,)](
        left,
        right,
        fc_weight,
        bn_weight,
        deviation,
        *grads,
        grad_summary,
        batch,
        **sizes,
        SAMPLES=samples,
        BLOCK_B=16,
        SQUARE=SQUARE,
        num_warps=4,
    )
    return scale, grad_summary, grad_y, grads
