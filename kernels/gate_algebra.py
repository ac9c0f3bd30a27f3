"""Triton kernel of task_interaction's gate algebra: one launch in evaluation, two in training. SPEC 1.3.

Between the two passes over x stand eight small products with vectors. A program computes them all for its
sample, row blocks of a weight at a time; what a later product needs of an earlier one goes through a scratch
row of global memory, with a barrier in between. In training `normalise` computes the contexts beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import EPS, normalise
from .entropy_uncertainty import log1p
from .tiles import power_of_two, store_narrow
from .vectors import BLOCK_K, BLOCK_O, GateWeights, matvec, sizes_of, vector_at

SMALLEST_SQUARE = tl.constexpr(1e-12)


@triton.jit
def active_features(pooled, w, o, known, sizes):
    """relu(W2 q + b2) of features o, q the sample's pooled hidden map; NaN stays."""
    active = matvec(w.fc_weight, pooled, o, known, sizes.hidden) + vector_at(w.fc_bias, o, known)
    return tl.where(active < 0, 0.0, active)


@triton.jit
def message_gates(mean, y, w, o, known, sizes):
    """The two gates of channels o: by the means of x, and by y."""
    by_y = matvec(w.prior_weight, y, o, known, sizes.features)
    by_mean = matvec(w.seg_gate_weight, mean, o, known, sizes.channels)
    by_mean = tl.sigmoid(by_mean + vector_at(w.seg_gate_bias, o, known))
    return by_mean, tl.sigmoid(by_y + vector_at(w.prior_bias, o, known))


@triton.jit
def context_gate(context, w, o, known, sizes):
    """The gate of features o."""
    gate = matvec(w.cls_gate_weight, context, o, known, sizes.features)
    return tl.sigmoid(gate + vector_at(w.cls_gate_bias, o, known))


@triton.jit
def unit_of(vector):
    """(vector / norm, norm, sum of squares), the norm not below a constant."""
    square = tl.sum(vector * vector, 0)
    # Not maximum, which loses NaN.
    norm = tl.sqrt(tl.where(square < SMALLEST_SQUARE, SMALLEST_SQUARE, square))
    return vector / norm, norm, square


@triton.jit
def confidence_of(after, known, FEATURES: tl.constexpr):
    """(log(1 + variance), 1 + variance, deviations from the mean) of y+."""
    centred = tl.where(known, after - tl.sum(after, 0) / FEATURES, 0.0)
    variance = tl.sum(centred * centred, 0) / FEATURES
    return log1p(variance), 1.0 + variance, centred


@triton.jit
def gate_network(alignment, complexity, confidence, w, g, known, GATE: tl.constexpr):
    """(hidden units g, w_seg, w_cls) of the gate network."""
    hidden = vector_at(w.gate1_bias, g, known)
    hidden += vector_at(w.gate1_weight, 3 * g, known) * alignment
    hidden += vector_at(w.gate1_weight + 1, 3 * g, known) * complexity
    hidden += vector_at(w.gate1_weight + 2, 3 * g, known) * confidence
    hidden = tl.where(hidden < 0, 0.0, hidden)
    to_seg = tl.sum(vector_at(w.gate2_weight, g, known) * hidden, 0) + tl.load(w.gate2_bias).to(tl.float32)
    to_cls = tl.sum(vector_at(w.gate2_weight + GATE, g, known) * hidden, 0)
    to_cls += tl.load(w.gate2_bias + 1).to(tl.float32)
    return hidden, tl.sigmoid(to_seg), tl.sigmoid(to_cls)


@triton.jit
def gate_kernel(
    summary,  # (B, C + H + 1) float32: mean of x, pooled hidden map, scene complexity
    y,  # (B, F)
    w,
    scratch,  # (B, 2 F + C) float32: context (there already in training), y+ - y, mean of x times message
    scale,  # (B, C) float32
    y_out,  # (B, F)
    gates,  # (B, 2) float32
    signals,  # (B, 3) float32
    mean_out,  # (F,) float32: in evaluation, the running statistics as they were used
    var_out,
    tau,
    sizes,
    TRAINING: tl.constexpr,
    ALL_A: tl.constexpr,  # powers of two, at least the sizes A, F and G
    ALL_F: tl.constexpr,
    ALL_G: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    mean = summary + b * (sizes.channels + sizes.hidden + 1)
    y += b * sizes.features
    context = scratch + b * (2 * sizes.features + sizes.channels)
    change = context + sizes.features
    moved = change + sizes.features
    scale += b * sizes.channels
    if not TRAINING:
        for start in range(0, sizes.features, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            known = o < sizes.features
            active = active_features(mean + sizes.channels, w, o, known, sizes)
            used_mean = vector_at(w.bn_mean, o, known)
            used_var = vector_at(w.bn_var, o, known)
            normal = (active - used_mean) / tl.sqrt(used_var + EPS)
            normal = normal * vector_at(w.bn_weight, o, known) + vector_at(w.bn_bias, o, known)
            tl.store(context + o, normal, known)
            if b == 0:
                tl.store(mean_out + o, used_mean, known)
                tl.store(var_out + o, used_var, known)
    for start in range(0, sizes.channels, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < sizes.channels
        by_mean, by_y = message_gates(mean, y, w, o, known, sizes)
        message = tau * by_mean * by_y
        tl.store(scale + o, message, known)
        tl.store(moved + o, message * vector_at(mean, o, known), known)
    tl.debug_barrier()
    for start in range(0, sizes.features, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        known = o < sizes.features
        gate = context_gate(context, w, o, known, sizes)
        tl.store(change + o, gate * vector_at(context, o, known), known)
    tl.debug_barrier()
    a = tl.arange(0, ALL_A)
    seg, _norm, _square = unit_of(matvec(w.seg_proj, moved, a, a < sizes.aligned, sizes.channels))
    cls, _norm, _square = unit_of(matvec(w.cls_proj, change, a, a < sizes.aligned, sizes.features))
    # One norm after the other: their product may be too small for float32.
    alignment = tl.sum(seg * cls, 0)
    complexity = tl.load(mean + sizes.channels + sizes.hidden)
    f = tl.arange(0, ALL_F)
    known = f < sizes.features
    before = vector_at(y, f, known)
    added = vector_at(change, f, known)
    confidence, _rest, _centred = confidence_of(before + added, known, sizes.features)
    g = tl.arange(0, ALL_G)
    known_g = g < sizes.gate
    _hidden, to_seg, to_cls = gate_network(alignment, complexity, confidence, w, g, known_g, sizes.gate)
    tl.store(gates + 2 * b, to_seg)
    tl.store(gates + 2 * b + 1, to_cls)
    tl.store(signals + 3 * b, alignment)
    tl.store(signals + 3 * b + 1, complexity)
    tl.store(signals + 3 * b + 2, confidence)
    store_narrow(y_out + b * sizes.features + f, before + to_cls * added, known)
    for start in range(0, sizes.channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known_k = k < sizes.channels
        tl.store(scale + k, vector_at(scale, k, known_k) * to_seg, known_k)


def gate_algebra(
    summary: Tensor,  # (B, C + C/2 + 1) float32
    y: Tensor,  # (B, F)
    weights: list[Tensor],  # of task_interaction, without W1 and b1
    tau: float,
    training: bool,
) -> tuple[Tensor, ...]:
    """scale (B, C) float32 of x' = x (1 + scale), y' (B, F) in y's dtype, gates (B, 2) and signals (B, 3);
    mean and variance (F,) float32: of evaluation the running ones, of training the batch's, unbiased."""
    w = GateWeights(*(value.contiguous() for value in weights))
    sizes = sizes_of(w)
    (batch, features), channels = y.shape, sizes.channels.value
    scale = summary.new_empty((batch, channels))
    scratch = summary.new_empty((batch, 2 * features + channels))
    y_out = torch.empty((batch, features), dtype=y.dtype, device=y.device)
    gates, signals = summary.new_empty((batch, 2)), summary.new_empty((batch, 3))
    if training:
        _, mean, var, _ = normalise(summary, *w[:4], scratch[:, :features])
    else:
        mean, var = summary.new_empty((features,)), summary.new_empty((features,))
    gate_kernel[(batch,)](
        summary,
        y.contiguous(),
        w,
        scratch,
        scale,
        y_out,
        gates,
        signals,
        mean,
        var,
        tau,
        sizes,
        TRAINING=training,
        ALL_A=power_of_two(sizes.aligned.value),
        ALL_F=power_of_two(features),
        ALL_G=power_of_two(sizes.gate.value),
        # Whole registers everywhere: compilers that keep to 64 of them with 8 warps, or to 128 with 4, spill.
        num_warps=8 if channels <= 64 else 4,
    )
    return scale, y_out, gates, signals, mean, var
