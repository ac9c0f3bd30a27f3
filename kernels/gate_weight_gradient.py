"""Triton kernel of the gradients of the gate algebra's weights: sums of outer products over the batch.

A program takes a square of one of the eight weights and adds in the batch's order; some more programs take
the weights of the normalisation, and the last step back for each sample, to its pooled hidden map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import EPS
from .tiles import power_of_two, store_narrow
from .vectors import BLOCK_K, GateWeights, Sizes, transposed_matvec, vector_at

SQUARE = tl.constexpr(32)  # rows and columns of a weight's gradient in one program,
BLOCK_B = tl.constexpr(16)  # and samples that it takes at once


class LinearMaps(NamedTuple):
    """One vector for each of the eight linear maps, in the order of their weights."""

    fc: Tensor
    cls_gate: Tensor
    prior: Tensor
    seg_gate: Tensor
    seg: Tensor
    cls: Tensor
    gate1: Tensor
    gate2: Tensor


@triton.jit
def store_square(weight_grad, bias_grad, value, sums, o, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes rows o and columns k of a weight's gradient, and rows o of its bias's, where it has one."""
    mask = (o < ROWS)[:, None] & (k < COLUMNS)[None, :]
    store_narrow(weight_grad + o[:, None] * COLUMNS + k[None, :], value, mask)
    if bias_grad is not None:
        store_narrow(bias_grad + o, sums, (o < ROWS) & (tl.min(k, 0) == 0))


@triton.jit
def weight_gradient_kernel(
    by,  # LinearMaps (B, rows), float32: gradients of what the maps give
    given,  # LinearMaps (B, columns), float32: what they are given
    by_context,  # (B, F) float32
    by_normal,  # (B, F) float32
    step,  # from sample to sample in these four
    w,
    grads,  # GateWeights, written
    grad_summary,  # (B, C + H + 1) float32: its part for the pooled hidden map is written
    batch,
    sizes,
    TRAINING: tl.constexpr,
    SAMPLES: tl.constexpr,  # power of two, at least batch
):
    # Squares of the eight gradients, one weight after the other, end at:
    parts_f: tl.constexpr = (sizes.features + SQUARE - 1) // SQUARE
    parts_c: tl.constexpr = (sizes.channels + SQUARE - 1) // SQUARE
    parts_a: tl.constexpr = (sizes.aligned + SQUARE - 1) // SQUARE
    parts_g: tl.constexpr = (sizes.gate + SQUARE - 1) // SQUARE
    fc_end: tl.constexpr = parts_f * ((sizes.hidden + SQUARE - 1) // SQUARE)
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
        # Its two vectors, how long they are, and its first square.
        left = by.fc
        right = given.fc
        rows = sizes.features
        columns = sizes.hidden
        first = 0
        if t >= fc_end:
            left = by.cls_gate
            right = given.cls_gate
            columns = sizes.features
            first = fc_end
        if t >= cls_gate_end:
            left = by.prior
            right = given.prior
            rows = sizes.channels
            first = cls_gate_end
        if t >= prior_end:
            left = by.seg_gate
            right = given.seg_gate
            columns = sizes.channels
            first = prior_end
        if t >= seg_gate_end:
            left = by.seg
            right = given.seg
            rows = sizes.aligned
            first = seg_gate_end
        if t >= seg_end:
            left = by.cls
            right = given.cls
            columns = sizes.features
            first = seg_end
        if t >= cls_end:
            left = by.gate1
            right = given.gate1
            rows = sizes.gate
            columns = 3
            first = cls_end
        if t >= gate1_end:
            left = by.gate2
            right = given.gate2
            rows = 2
            columns = sizes.gate
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
            ones = tl.load(left + b[None, :] * step + o[:, None], mask=l_mask, other=0.0)
            others = tl.load(right + b[:, None] * step + k[None, :], mask=r_mask, other=0.0)
            value = tl.dot(ones, others, value, input_precision="ieee")
            gathered += ones
        # Summed only here: Triton 3.6 cannot compile a loop's sum along the last axis that is used twice.
        sums = tl.sum(gathered, 1)
        f: tl.constexpr = sizes.features
        c: tl.constexpr = sizes.channels
        if t < fc_end:
            store_square(grads.fc_weight, grads.fc_bias, value, sums, o, k, f, sizes.hidden)
        elif t < cls_gate_end:
            store_square(grads.cls_gate_weight, grads.cls_gate_bias, value, sums, o, k, f, f)
        elif t < prior_end:
            store_square(grads.prior_weight, grads.prior_bias, value, sums, o, k, c, f)
        elif t < seg_gate_end:
            store_square(grads.seg_gate_weight, grads.seg_gate_bias, value, sums, o, k, c, c)
        elif t < seg_end:
            store_square(grads.seg_proj, None, value, sums, o, k, sizes.aligned, c)
        elif t < cls_end:
            store_square(grads.cls_proj, None, value, sums, o, k, sizes.aligned, f)
        elif t < gate1_end:
            store_square(grads.gate1_weight, grads.gate1_bias, value, sums, o, k, sizes.gate, 3)
        else:
            store_square(grads.gate2_weight, grads.gate2_bias, value, sums, o, k, 2, sizes.gate)
    elif t < norm_end:
        f = (t - gate2_end) * SQUARE + tl.arange(0, SQUARE)
        known = f < sizes.features
        by_offset = tl.zeros([SQUARE], tl.float32)
        by_factor = tl.zeros([SQUARE], tl.float32)
        for start in range(0, SAMPLES, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B).to(tl.int64)
            mask = (b < batch)[:, None] & known[None, :]
            at = b[:, None] * step + f[None, :]
            by_offset += tl.sum(tl.load(by_context + at, mask=mask, other=0.0), 0)
            by_factor += tl.sum(tl.load(by_normal + at, mask=mask, other=0.0), 0)
        store_narrow(grads.bn_weight + f, by_factor, known)
        store_narrow(grads.bn_bias + f, by_offset, known)
        by_mean = tl.zeros([SQUARE], tl.float32)
        by_var = tl.zeros([SQUARE], tl.float32)
        if not TRAINING:
            square = tl.load(w.bn_var + f, mask=known, other=1.0).to(tl.float32) + EPS
            factor = vector_at(w.bn_weight, f, known)
            by_mean = -by_offset * factor / tl.sqrt(square)
            by_var = -0.5 * by_factor * factor / square
        store_narrow(grads.bn_mean + f, by_mean, known)
        store_narrow(grads.bn_var + f, by_var, known)
    else:
        b = (t - norm_end).to(tl.int64)
        out = grad_summary + b * (sizes.channels + sizes.hidden + 1) + sizes.channels
        for start in range(0, sizes.hidden, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            known = k < sizes.hidden
            total = transposed_matvec(w.fc_weight, by.fc + b * step, k, known, sizes.features, sizes.hidden)
            tl.store(out + k, total, known)


def weight_gradient(
    by: LinearMaps,
    given: LinearMaps,
    by_context: Tensor,  # (B, F)
    by_normal: Tensor,  # (B, F)
    step: int,  # from sample to sample in all of these
    w: GateWeights,
    sizes: Sizes,
    grad_summary: Tensor,  # (B, C + C/2 + 1) float32: its part for the pooled hidden map is written
    training: bool,
) -> GateWeights:
    """The gradients of the weights, in their dtypes."""
    batch = grad_summary.shape[0]
    grads = GateWeights(*(torch.empty_like(value) for value in w))
    c, h, f, a, g = (triton.cdiv(size.value, SQUARE.value) for size in sizes)
    squares = f * h + f * f + c * f + c * c + a * c + a * f + 2 * g
    weight_gradient_kernel[(squares + f + batch,)](
        by,
        given,
        by_context,
        by_normal,
        step,
        w,
        grads,
        grad_summary,
        batch,
        sizes,
        TRAINING=training,
        SAMPLES=power_of_two(batch),
        num_warps=4,
    )
    return grads
