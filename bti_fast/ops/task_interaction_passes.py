"""task_interaction out of Triton's passes over x and, between them, the gate algebra on vectors."""

from __future__ import annotations

import importlib

from torch import Tensor

from bti_fast.ops.dispatch import like
from bti_fast.reference import TaskInteractionWeights, task_interaction, task_interaction_backward


def forward(x: Tensor, y: Tensor, weights: list[Tensor], tau: float, training: bool) -> tuple[Tensor, ...]:
    """What the reference of the same name returns, from two reads of x and one write."""
    if x.numel() == 0:
        x_out, y_out, gates, signals, mean, var, summary = task_interaction(x, y, weights, tau, training)
        return like(x_out, x), y_out.contiguous(), gates, signals, mean.clone(), var.clone(), summary
    kernels = importlib.import_module("bti_fast.kernels.task_interaction")
    w = TaskInteractionWeights(*weights)
    vectors = importlib.import_module("bti_fast.kernels.gate_algebra")
    summary = kernels.statistics(x, w.conv_weight, w.conv_bias)
    scale, *rest = vectors.gate_algebra(summary, y, weights[2:], tau, training)
    return kernels.modulate(x, scale), *rest, summary


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
    kernels = importlib.import_module("bti_fast.kernels.task_interaction_backward")
    conv_weight, conv_bias = weights[:2]
    grad_scale, signs = kernels.reduce_gradient(grad_x_out, x, conv_weight, conv_bias)

    vectors = importlib.import_module("bti_fast.kernels.gate_algebra_backward")
    cotangents = grad_scale, grad_y_out, grad_gates, grad_signals
    scale, grad_summary, grad_y, grad_rest = vectors.gate_algebra_backward(
        *cotangents, summary, y, weights[2:], tau, training
    )
    grad_x, grad_weight, grad_bias = kernels.input_gradient(
        grad_x_out, x, conv_weight, signs, scale, grad_summary, conv_bias.dtype
    )
    grads = [grad_x, grad_y, grad_weight, grad_bias, *grad_rest]
    return [like(grad, value) for grad, value in zip(grads, (x, y, *weights), strict=True)]
