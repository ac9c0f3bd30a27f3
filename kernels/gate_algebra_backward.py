"""Triton kernel of the gate algebra's gradient: two launches in evaluation, four in training. SPEC 1.3.

`gate_gradient_kernel`, one program a sample, computes the forward vectors again and walks back to the
gradients of y, of the means of x and of the context; for each of the eight linear maps it leaves the two
vectors whose outer product is the gradient of its weight. In training `unnormalise` goes back through the
normalisation, and `weight_gradient` then adds the outer products over the batch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import EPS, normalise, unnormalise
from .gate_algebra import (
    SMALLEST_SQUARE,
    active_features,
    confidence_of,
    context_gate,
    gate_network,
    message_gates,
    unit_of,
)
from .gate_weight_gradient import LinearMaps, weight_gradient
from .tiles import power_of_two, store_narrow
from .vectors import (
    BLOCK_K,
    BLOCK_O,
    GateWeights,
    Sizes,
    matvec,
    sizes_of,
    transposed_matvec,
    vector_at,
)


class Kept(NamedTuple):
    """Vectors of a sample on the way back. What is read back is never overwritten: more threads may load a
    value than store it."""

    message: Tensor  # of C channels
    other_prior: Tensor  # one minus either gate of the message
    other_gate: Tensor
    part_mean: Tensor  # parts of gradients
    gate: Tensor  # of F features
    part_y: Tensor
    part_change: Tensor
    part_context: Tensor
    normal: Tensor  # the normalised features
    slope: Tensor  # of the context by W2 q + b2
    by_context: Tensor  # gradient of the context,
    by_normal: Tensor  # and that times the normalised features


@triton.jit
def unit_gradient(grad, unit, norm, square):
    """Gradient of v for the gradient of unit = v / norm, these three of unit_of."""
    along = tl.where(square < SMALLEST_SQUARE, 0.0, tl.sum(grad * unit, 0))
    return (grad - unit * along) / norm


@triton.jit
def gate_gradient_kernel(
    summary,  # (B, C + H + 1) float32: mean of x, pooled hidden map, scene complexity
    y,  # (B, F)
    w,
    grad_scale,  # (B, C) float32
    grad_y_out,  # (B, F)
    grad_gates,  # (B, 2) float32
    grad_signals,  # (B, 3) float32
    by,  # LinearMaps (B, rows), float32: gradients of what the linear maps give
    given,  # LinearMaps (B, columns), float32: what they are given
    kept,  # float32
    step,  # from sample to sample in these three
    scale,  # (B, C) float32
    grad_summary,  # (B, C + H + 1) float32
    grad_y,  # (B, F)
    tau,
    sizes,
    TRAINING: tl.constexpr,
    ALL_A: tl.constexpr,  # powers of two, at least the sizes A, F and G
    ALL_F: tl.constexpr,
    ALL_G: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = b * step
    mean = summary + b * (sizes.channels + sizes.hidden + 1)
    grad_mean = grad_summary + b * (sizes.channels + sizes.hidden + 1)
    y += b * sizes.features
    grad_y += b * sizes.features
    grad_y_out += b * sizes.features
    scale += b * sizes.channels
    grad_scale += b * sizes.channels

    for start in range(0, sizes.hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < sizes.hidden
        tl.store(given.fc + row + k, vector_at(mean + sizes.channels, k, known), known)
    context = given.cls_gate + row
    if not TRAINING:
        for start in range(0, sizes.features, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            known = o < sizes.features
            active = active_features(mean + sizes.channels, w, o, known, sizes)
            deviation = tl.sqrt(vector_at(w.bn_var, o, known) + EPS)
            normal = (active - vector_at(w.bn_mean, o, known)) / deviation
            factor = vector_at(w.bn_weight, o, known)
            tl.store(context + o, normal * factor + vector_at(w.bn_bias, o, known), known)
            tl.store(kept.normal + row + o, normal, known)
            tl.store(kept.slope + row + o, tl.where(active <= 0, 0.0, factor / deviation), known)
    to_seg = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, sizes.channels, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < sizes.channels
        gate, prior = message_gates(mean, y, w, o, known, sizes)
        m = tau * gate * prior
        value = vector_at(mean, o, known)
        tl.store(kept.message + row + o, m, known)
        tl.store(kept.other_prior + row + o, 1.0 - prior, known)
        tl.store(kept.other_gate + row + o, 1.0 - gate, known)
        tl.store(given.seg_gate + row + o, value, known)
        tl.store(given.seg + row + o, m * value, known)
        to_seg += vector_at(grad_scale, o, known) * m
    tl.debug_barrier()
    to_cls = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, sizes.features, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < sizes.features
        gate = context_gate(context, w, o, known, sizes)
        added = gate * vector_at(context, o, known)
        tl.store(kept.gate + row + o, gate, known)
        tl.store(given.cls + row + o, added, known)
        tl.store(given.prior + row + o, vector_at(y, o, known), known)
        to_cls += vector_at(grad_y_out, o, known) * added
    tl.debug_barrier()

    a = tl.arange(0, ALL_A)
    known_a = a < sizes.aligned
    seg, seg_norm, seg_square = unit_of(matvec(w.seg_proj, given.seg + row, a, known_a, sizes.channels))
    cls, cls_norm, cls_square = unit_of(matvec(w.cls_proj, given.cls + row, a, known_a, sizes.features))
    alignment = tl.sum(seg * cls, 0)
    complexity = tl.load(mean + sizes.channels + sizes.hidden)
    f = tl.arange(0, ALL_F)
    known_f = f < sizes.features
    after = vector_at(y, f, known_f) + vector_at(given.cls + row, f, known_f)
    confidence, rest, centred = confidence_of(after, known_f, sizes.features)
    g = tl.arange(0, ALL_G)
    known_g = g < sizes.gate
    hidden, seg_gate, cls_gate = gate_network(alignment, complexity, confidence, w, g, known_g, sizes.gate)

    by_seg_gate = (tl.sum(to_seg, 0) + tl.load(grad_gates + 2 * b)) * seg_gate * (1.0 - seg_gate)
    by_cls_gate = (tl.sum(to_cls, 0) + tl.load(grad_gates + 2 * b + 1)) * cls_gate * (1.0 - cls_gate)
    by_hidden = vector_at(w.gate2_weight, g, known_g) * by_seg_gate
    by_hidden += vector_at(w.gate2_weight + sizes.gate, g, known_g) * by_cls_gate
    by_hidden = tl.where(hidden <= 0, 0.0, by_hidden)
    told = grad_signals + 3 * b
    by_alignment = tl.sum(vector_at(w.gate1_weight, 3 * g, known_g) * by_hidden, 0) + tl.load(told)
    by_complexity = tl.sum(vector_at(w.gate1_weight + 1, 3 * g, known_g) * by_hidden, 0) + tl.load(told + 1)
    by_confidence = tl.sum(vector_at(w.gate1_weight + 2, 3 * g, known_g) * by_hidden, 0) + tl.load(told + 2)
    tl.store(by.gate2 + row, by_seg_gate)
    tl.store(by.gate2 + row + 1, by_cls_gate)
    tl.store(by.gate1 + row + g, by_hidden, known_g)
    tl.store(given.gate2 + row + g, hidden, known_g)
    tl.store(given.gate1 + row, alignment)
    tl.store(given.gate1 + row + 1, complexity)
    tl.store(given.gate1 + row + 2, confidence)
    tl.store(grad_mean + sizes.channels + sizes.hidden, by_complexity)
    tl.store(by.seg + row + a, unit_gradient(by_alignment * cls, seg, seg_norm, seg_square), known_a)
    tl.store(by.cls + row + a, unit_gradient(by_alignment * seg, cls, cls_norm, cls_square), known_a)
    by_after = by_confidence / rest * (2.0 / sizes.features) * centred
    by_out = vector_at(grad_y_out, f, known_f)
    tl.store(kept.part_y + row + f, by_out + by_after, known_f)
    tl.store(kept.part_change + row + f, by_out * cls_gate + by_after, known_f)
    tl.debug_barrier()

    for start in range(0, sizes.channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < sizes.channels
        by_moved = transposed_matvec(w.seg_proj, by.seg + row, k, known, sizes.aligned, sizes.channels)
        m = vector_at(kept.message + row, k, known)
        by_message = vector_at(grad_scale, k, known) * seg_gate + by_moved * vector_at(mean, k, known)
        tl.store(scale + k, m * seg_gate, known)
        tl.store(kept.part_mean + row + k, by_moved * m, known)
        tl.store(by.prior + row + k, by_message * m * vector_at(kept.other_prior + row, k, known), known)
        tl.store(by.seg_gate + row + k, by_message * m * vector_at(kept.other_gate + row, k, known), known)
    for start in range(0, sizes.features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < sizes.features
        by_change = transposed_matvec(w.cls_proj, by.cls + row, k, known, sizes.aligned, sizes.features)
        by_change += vector_at(kept.part_change + row, k, known)
        gate = vector_at(kept.gate + row, k, known)
        tl.store(kept.part_context + row + k, by_change * gate, known)
        by_gate = by_change * vector_at(context, k, known) * gate * (1.0 - gate)
        tl.store(by.cls_gate + row + k, by_gate, known)
    tl.debug_barrier()

    for start in range(0, sizes.channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < sizes.channels
        by_gate = by.seg_gate + row
        by_mean = transposed_matvec(w.seg_gate_weight, by_gate, k, known, sizes.channels, sizes.channels)
        tl.store(grad_mean + k, by_mean + vector_at(kept.part_mean + row, k, known), known)
    for start in range(0, sizes.features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < sizes.features
        by_y = transposed_matvec(w.prior_weight, by.prior + row, k, known, sizes.channels, sizes.features)
        store_narrow(grad_y + k, by_y + vector_at(kept.part_y + row, k, known), known)
        by_gate = by.cls_gate + row
        total = transposed_matvec(w.cls_gate_weight, by_gate, k, known, sizes.features, sizes.features)
        total += vector_at(kept.part_context + row, k, known)
        tl.store(kept.by_context + row + k, total, known)
        if not TRAINING:
            tl.store(kept.by_normal + row + k, total * vector_at(kept.normal + row, k, known), known)
            tl.store(by.fc + row + k, total * vector_at(kept.slope + row, k, known), known)


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
    w = GateWeights(*(value.contiguous() for value in weights))
    sizes = sizes_of(w)
    (batch, features), channels = y.shape, sizes.channels.value
    by, given, kept, step = work_of(summary, sizes)
    scale, grad_summary = summary.new_empty((batch, channels)), summary.new_empty(summary.shape)
    grad_y = torch.empty((batch, features), dtype=y.dtype, device=y.device)
    if training:
        active, mean, _, deviation = normalise(summary, *w[:4], given.cls_gate)
    gate_gradient_kernel[(batch,)](
        summary,
        y.contiguous(),
        w,
        grad_scale.contiguous(),
        grad_y_out.contiguous(),
        grad_gates.contiguous(),
        grad_signals.contiguous(),
        by,
        given,
        kept,
        step,
        scale,
        grad_summary,
        grad_y,
        tau,
        sizes,
        TRAINING=training,
        ALL_A=power_of_two(sizes.aligned.value),
        ALL_F=power_of_two(features),
        ALL_G=power_of_two(sizes.gate.value),
        num_warps=4,
    )
    if training:
        unnormalise(active, mean, deviation, w.bn_weight, kept.by_context, kept.by_normal, by.fc)
    grads = weight_gradient(
        by, given, kept.by_context, kept.by_normal, step, w, sizes, grad_summary, training
    )
    return scale, grad_summary, grad_y, list(grads)


def work_of(summary: Tensor, sizes: Sizes) -> tuple[LinearMaps, LinearMaps, Kept, int]:
    """`by`, `given` and `kept` of gate_gradient_kernel as columns of one fresh matrix, and its row length."""
    c, h, f, a, g = (size.value for size in sizes)
    rows, columns = (f, f, c, c, a, a, g, 2), (h, f, f, c, c, f, 3, g)
    lengths = (*rows, *columns, *[c] * 4, *[f] * 8)
    *starts, step = accumulate(lengths, initial=0)
    matrix = summary.new_empty((summary.shape[0], step))
    parts = [matrix[:, start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return LinearMaps(*parts[:8]), LinearMaps(*parts[8:16]), Kept(*parts[16:]), step
