"""Triton kernels of the gate algebra's normalisation by the batch's own statistics, and of the way back.

With these the samples depend on each other. A program takes a block of features over all samples: forward
together with W2 and relu, so that one launch gives every sample its context.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import power_of_two
from .vectors import vector_at

EPS = tl.constexpr(1e-3)
BLOCK_F = 16  # features of one program,
BLOCK_B = 32  # samples that it takes at once,
BLOCK_H = 64  # and hidden channels of one product


@triton.jit
def linear_relu(
    hidden, step, fc_weight, fc_bias, b, f, BATCH, FEATURES, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr
):
    """relu(W2 q + b2) of samples b and features f, in float32; NaN stays."""
    total = tl.zeros([b.shape[0], f.shape[0]], tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
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
    BLOCK_H: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    known = f < FEATURES
    step: tl.constexpr = CHANNELS + HIDDEN + 1
    total = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = linear_relu(summary + CHANNELS, step, fc_weight, fc_bias, b, f, batch, FEATURES, HIDDEN, BLOCK_H)
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
def unnormalise_kernel(
    active,  # (B, F) float32: relu(W2 q + b2)
    mean,  # (F,) float32
    deviation,  # (F,) float32
    bn_weight,  # (F,)
    by_context,  # (B, F) float32, rows `step` apart, as the next two
    by_normal,  # gradient of context times normal value, written
    by_fc,  # gradient of W2 q + b2, written
    batch,
    step,
    FEATURES: tl.constexpr,
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
        grad = tl.load(by_context + b[:, None] * step + f[None, :], mask=mask, other=0.0)
        product = grad * ((a - centre[None, :]) / divided[None, :])
        tl.store(by_normal + b[:, None] * step + f[None, :], product, mask)
        total += tl.sum(grad, 0)
        along += tl.sum(product, 0)
    total = total / batch
    along = along / batch
    factor = vector_at(bn_weight, f, known) / divided
    for start in range(0, SAMPLES, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (b < batch)[:, None] & known[None, :]
        a = tl.load(active + b[:, None] * FEATURES + f[None, :], mask=mask, other=0.0)
        grad = tl.load(by_context + b[:, None] * step + f[None, :], mask=mask, other=0.0)
        normal = (a - centre[None, :]) / divided[None, :]
        value = factor[None, :] * (grad - total[None, :] - normal * along[None, :])
        tl.store(by_fc + b[:, None] * step + f[None, :], tl.where(a <= 0, 0.0, value), mask)


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
    normalise_kernel[(triton.cdiv(features, BLOCK_F),)](
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
        BLOCK_F=BLOCK_F,
        BLOCK_B=BLOCK_B,
        BLOCK_H=BLOCK_H,
        num_warps=4,
    )
    return active, mean, var, deviation


def unnormalise(
    active: Tensor,  # these three of normalise
    mean: Tensor,
    deviation: Tensor,
    bn_weight: Tensor,  # (F,)
    by_context: Tensor,  # (B, F) float32, as the next two with rows as far apart
    by_normal: Tensor,  # written: gradient of context times normal value
    by_fc: Tensor,  # written: gradient of W2 q + b2
) -> None:
    """The way back through the normalisation and the relu."""
    batch, features = active.shape
    unnormalise_kernel[(triton.cdiv(features, BLOCK_F),)](
        active,
        mean,
        deviation,
        bn_weight,
        by_context,
        by_normal,
        by_fc,
        batch,
        by_context.stride(0),
        FEATURES=features,
        SAMPLES=power_of_two(batch),
        BLOCK_F=BLOCK_F,
        BLOCK_B=BLOCK_B,
        num_warps=4,
    )
