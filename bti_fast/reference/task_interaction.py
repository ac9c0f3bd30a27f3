"""Reference of task_interaction: the paper's TIM followed by UPA, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bti_fast.reference.numerics import accumulate_dtype, vjp

BATCH_NORM_EPS = 1e-3
SMALLEST_ROWS = 8


class TaskInteractionWeights(NamedTuple):
    """The learned tensors of task_interaction, with C segmentation channels and F classification features.

    The names of SPEC 1.3 stand behind each shape.
    """

    conv_weight: Tensor  # (C/2, C)   W1
    conv_bias: Tensor  # (C/2,)       b1
    fc_weight: Tensor  # (F, C/2)     W2
    fc_bias: Tensor  # (F,)           b2
    bn_weight: Tensor  # (F,)         BatchNorm gamma
    bn_bias: Tensor  # (F,)           BatchNorm beta
    bn_mean: Tensor  # (F,)           running mean, no gradient
    bn_var: Tensor  # (F,)            running variance, no gradient
    cls_gate_weight: Tensor  # (F, F) Wcg
    cls_gate_bias: Tensor  # (F,)
    prior_weight: Tensor  # (C, F)    Wcs
    prior_bias: Tensor  # (C,)
    seg_gate_weight: Tensor  # (C, C) Wsg
    seg_gate_bias: Tensor  # (C,)
    seg_proj: Tensor  # (64, C)       Psp
    cls_proj: Tensor  # (64, F)       Pcp
    gate1_weight: Tensor  # (32, 3)   V1
    gate1_bias: Tensor  # (32,)
    gate2_weight: Tensor  # (2, 32)   V2
    gate2_bias: Tensor  # (2,)


class GateAlgebra(NamedTuple):
    """What the small dense algebra between the two passes over x gives."""

    scale: Tensor  # (B, C), x' = x * (1 + scale)
    y: Tensor  # (B, F)
    gates: Tensor  # (B, 2)
    signals: Tensor  # (B, 3)
    batch_mean: Tensor  # (F,)
    batch_var: Tensor  # (F,), unbiased


def statistics(x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    """All that the gates need to know of x (B, C, *spatial): mean, pooled hidden map and scene complexity.

    Returns (B, C + C/2 + 1): mean_p x, mean_p relu(W1 x + b1), and the total variation s2. SPEC 1.3.
    """
    dtype = accumulate_dtype(x)
    pixels = x.to(dtype).flatten(2)
    hidden = torch.einsum("hc,bcp->bhp", conv_weight.to(dtype), pixels) + conv_bias.to(dtype).unsqueeze(1)
    complexity = scene_complexity(x.to(dtype)).unsqueeze(1)
    return torch.cat([pixels.mean(2), hidden.relu().mean(2), complexity], dim=1)


def scene_complexity(x: Tensor) -> Tensor:
    """Mean absolute forward difference along every spatial axis of x (B, C, *spatial), summed: (B,).

    The missing last difference counts as zero in a mean over all C * P values. Zero where the rows (second to
    last axis; the only axis of a sequence) are fewer than 8, as SPEC 1.3 asks.
    """
    rows = x.shape[-2] if x.dim() > 3 else x.shape[-1]
    total = x.new_zeros(x.shape[0])
    if rows < SMALLEST_ROWS:
        return total
    for axis in range(2, x.dim()):
        total = total + x.diff(dim=axis).abs().flatten(1).sum(1)
    return total / max(x[0].numel() if x.shape[0] else 1, 1)


def gate_algebra(
    summary: Tensor,  # (B, C + C/2 + 1), what statistics() returns
    y: Tensor,  # (B, F)
    weights: TaskInteractionWeights,
    tau: float,
    training: bool,
) -> GateAlgebra:
    """TIM's two messages, UPA's three signals and its two gates, from vectors alone. SPEC 1.3."""
    dtype = summary.dtype
    w = TaskInteractionWeights(*[value.to(dtype) for value in weights])
    y = y.to(dtype)
    channels = w.conv_weight.shape[1]
    mean, hidden, complexity = summary.split([channels, summary.shape[1] - channels - 1, 1], dim=1)
    active = torch.relu(hidden @ w.fc_weight.t() + w.fc_bias)
    batch_mean, batch_var = w.bn_mean, w.bn_var
    used_mean, used_var = w.bn_mean, w.bn_var
    if training:
        used_mean = active.mean(0)
        used_var = active.var(0, correction=0)
        batch_mean, batch_var = used_mean, active.var(0, correction=1)
    ctx = (active - used_mean) * torch.rsqrt(used_var + BATCH_NORM_EPS) * w.bn_weight + w.bn_bias
    y_plus = y + torch.sigmoid(ctx @ w.cls_gate_weight.t() + w.cls_gate_bias) * ctx
    prior = torch.sigmoid(y @ w.prior_weight.t() + w.prior_bias)
    message = tau * torch.sigmoid(mean @ w.seg_gate_weight.t() + w.seg_gate_bias) * prior
    seg_residual = _normalise((mean * message) @ w.seg_proj.t())
    cls_residual = _normalise((y_plus - y) @ w.cls_proj.t())
    alignment = (seg_residual * cls_residual).sum(1, keepdim=True)
    centred = y_plus - y_plus.mean(1, keepdim=True)
    confidence = torch.log1p(centred.square().mean(1, keepdim=True))
    signals = torch.cat([alignment, complexity, confidence], dim=1)
    hidden_gate = torch.relu(signals @ w.gate1_weight.t() + w.gate1_bias)
    gates = torch.sigmoid(hidden_gate @ w.gate2_weight.t() + w.gate2_bias)
    y_out = y + gates[:, 1:] * (y_plus - y)
    return GateAlgebra(gates[:, :1] * message, y_out, gates, signals, batch_mean, batch_var)


def apply(x: Tensor, scale: Tensor) -> Tensor:
    """x (B, C, *spatial) times 1 + scale (B, C), in x's dtype."""
    factor = (1 + scale).view(*scale.shape, *[1] * (x.dim() - 2))
    return (x.to(scale.dtype) * factor).to(x.dtype)


def task_interaction(
    x: Tensor,  # (B, C, *spatial)
    y: Tensor,  # (B, F)
    weights: list[Tensor],  # in the order of TaskInteractionWeights
    tau: float,
    training: bool,
) -> tuple[Tensor, ...]:
    """x' (B, C, *spatial), y' (B, F), gates (B, 2), signals (B, 3), the batch's mean and unbiased variance
    (F,) for the running statistics, and the statistics of x (B, C + C/2 + 1) that a backward pass can start
    from. SPEC 1.3."""
    w = TaskInteractionWeights(*weights)
    summary = statistics(x, w.conv_weight, w.conv_bias)
    algebra = gate_algebra(summary, y, w, tau, training)
    return (
        apply(x, algebra.scale),
        algebra.y.to(y.dtype),
        algebra.gates,
        algebra.signals,
        algebra.batch_mean,
        algebra.batch_var,
        summary,
    )


def task_interaction_backward(
    grad_x_out: Tensor,
    grad_y_out: Tensor,
    grad_gates: Tensor,
    grad_signals: Tensor,
    x: Tensor,
    y: Tensor,
    summary: Tensor,
    weights: list[Tensor],
    tau: float,
    training: bool,
) -> list[Tensor]:
    """Gradients of x, y and every weight (zeros for the running statistics), by differentiation."""
    function = lambda x, y, weights: task_interaction(x, y, weights, tau, training)[:4]  # noqa: E731
    cotangents = (grad_x_out, grad_y_out, grad_gates, grad_signals)
    grad_x, grad_y, grad_weights = vjp(function, (x, y, list(weights)), cotangents)
    return [grad_x, grad_y, *grad_weights]


def _normalise(v: Tensor) -> Tensor:
    return v * torch.rsqrt((v * v).sum(1, keepdim=True).clamp(min=1e-12))
