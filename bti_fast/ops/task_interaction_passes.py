"""task_interaction out of Triton's passes over x and, between them, the gate algebra on vectors."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from bti_fast.ops.backends import narrower_than_float64
from bti_fast.ops.dispatch import like
from bti_fast.reference import TaskInteractionWeights, task_interaction, task_interaction_backward
from bti_fast.reference.task_interaction import gate_algebra

MAX_HIDDEN = 256  # what the kernels hold of the hidden map's channels at once


def limits(x: Tensor, y: Tensor, weights: list[Tensor], tau: float, training: bool) -> str | None:
    """Why the kernels cannot run this call, or None."""
    if weights[0].shape[0] > MAX_HIDDEN:
        return f"needs at most {MAX_HIDDEN} hidden channels (C/2), got {weights[0].shape[0]}"
    return narrower_than_float64(x, y, weights)


def forward(x: Tensor, y: Tensor, weights: list[Tensor], tau: float, training: bool) -> tuple[Tensor, ...]:
    """What the reference of the same name returns, from two reads of x and one write."""
    if x.numel() == 0:
        x_out, y_out, gates, signals, mean, var, summary = task_interaction(x, y, weights, tau, training)
        return like(x_out, x), y_out.contiguous(), gates, signals, mean.clone(), var.clone(), summary
    kernels = importlib.import_module("bti_fast.kernels.task_interaction")
    w = TaskInteractionWeights(*weights)
    summary = kernels.statistics(x, w.conv_weight, w.conv_bias)
    if not training:
        vectors = importlib.import_module("bti_fast.kernels.gate_algebra")
        scale, y_out, gates, signals = vectors.gate_algebra(summary, y, weights[2:], tau)
        # An operator's outputs may not be its inputs: the backward pass reads these.
        running = [value.to(torch.float32, copy=True) for value in (w.bn_mean, w.bn_var)]
        return kernels.modulate(x, scale), y_out, gates, signals, *running, summary
    algebra = gate_algebra(summary, y, w, tau, training)
    return (
        kernels.modulate(x, algebra.scale),
        algebra.y.to(y.dtype).contiguous(),
        algebra.gates,
        algebra.signals,
        algebra.batch_mean,
        algebra.batch_var,
        summary,
    )


def backward(
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
    """Gradients of x, y and every weight: four reads of x's size, one write, and one bit a hidden value."""
    if x.numel() == 0:
        args = (grad_x_out, grad_y_out, grad_gates, grad_signals, x, y, summary, weights, tau, training)
        grads = task_interaction_backward(*args)
        return [like(grad, value) for grad, value in zip(grads, (x, y, *weights), strict=True)]
    kernels = importlib.import_module("bti_fast.kernels.task_interaction")
    conv_weight, conv_bias = weights[:2]
    grad_scale, signs = kernels.reduce_gradient(grad_x_out, x, conv_weight, conv_bias)

    def algebra(summary: Tensor, y: Tensor, rest: list[Tensor]) -> tuple[Tensor, ...]:
        return gate_algebra(summary, y, TaskInteractionWeights(*weights[:2], *rest), tau, training)[:4]

    (scale, y_out, *_), pull_back = torch.func.vjp(algebra, summary, y, list(weights[2:]))
    cotangents = (grad_scale, grad_y_out.to(y_out.dtype), grad_gates, grad_signals)
    grad_summary, grad_y, grad_rest = pull_back(cotangents)
    grad_x, grad_weight, grad_bias = kernels.input_gradient(
        grad_x_out, x, conv_weight, signs, scale, grad_summary
    )
    grads = [grad_x, grad_y, grad_weight.to(conv_weight.dtype), grad_bias.to(conv_bias.dtype), *grad_rest]
    return [like(grad, value) for grad, value in zip(grads, (x, y, *weights), strict=True)]
