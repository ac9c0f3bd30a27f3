"""The operator task_interaction: the paper's two-way message passing and its uncertainty-proxy gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bti_fast._export import exportable
from bti_fast.ops import task_interaction_passes as passes
from bti_fast.ops.backends import compiled_backend, narrower_than_float64, reference_backend, triton_backend
from bti_fast.ops.checks import check_device, check_map, check_rank, check_shape, check_tau, check_tensor
from bti_fast.ops.dispatch import Operator, like
from bti_fast.reference import TaskInteractionWeights
from bti_fast.reference import task_interaction as reference
from bti_fast.reference import task_interaction_backward as reference_backward
from bti_fast.reference.numerics import accumulate_dtype

MOMENTUM = 0.01  # of the running statistics; the published 0.99 in Keras' convention


@exportable
class TaskInteraction(NamedTuple):
    """What task_interaction returns."""

    x: Tensor  # (B, C, *spatial), dtype and memory format of x
    y: Tensor  # (B, F), dtype of y
    gates: Tensor  # (B, 2), w_seg and w_cls in (0, 1), float32
    signals: Tensor  # (B, 3), alignment, scene complexity, confidence, float32


def _fake(x, y, weights, tau, training):
    dtype = accumulate_dtype(x)
    batch, hidden = x.shape[0], weights[0].shape[0]
    vector = (weights[2].shape[0],)
    return (
        torch.empty_like(x),
        y.new_empty(y.shape),
        x.new_empty((batch, 2), dtype=dtype),
        x.new_empty((batch, 3), dtype=dtype),
        x.new_empty(vector, dtype=dtype),
        x.new_empty(vector, dtype=dtype),
        x.new_empty((batch, x.shape[1] + hidden + 1), dtype=dtype),
    )


def _fake_backward(grad_x, grad_y, grad_gates, grad_signals, x, y, summary, weights, tau, training):
    return [torch.empty_like(value) for value in (x, y, *weights)]


def _saves(inputs, outputs):
    # The running statistics move in place after the forward pass; the outputs hold what it used.
    weights = TaskInteractionWeights(*inputs[2])._replace(bn_mean=outputs[4], bn_var=outputs[5])
    return inputs[0], inputs[1], outputs[6], list(weights), *inputs[3:]


def _reference_forward(x, y, weights, tau, training):
    x_out, y_out, gates, signals, mean, var, summary = reference(x, y, weights, tau, training)
    # An operator's outputs may not be its inputs: in evaluation mean and variance are the running ones.
    return like(x_out, x), y_out.contiguous(), gates, signals, mean.clone(), var.clone(), summary


def _reference_backward(*args):
    x, y, _, weights = args[4:8]
    grads = reference_backward(*args)
    return [like(grad, value) for grad, value in zip(grads, (x, y, *weights), strict=True)]


OPERATOR = Operator(
    name="task_interaction",
    schema="(Tensor x, Tensor y, Tensor[] weights, float tau, bool training)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad_x, Tensor grad_y, Tensor grad_gates, Tensor grad_signals, Tensor x,"
    " Tensor y, Tensor summary, Tensor[] weights, float tau, bool training) -> Tensor[]",
    fake=_fake,
    fake_backward=_fake_backward,
    saves=_saves,
    primals=lambda args: (args[4], args[5], *args[7:]),
    gradients=lambda result: (result[0], result[1], list(result[2:]), None, None),
    differentiable=4,
)
OPERATOR.add(reference_backend(_reference_forward, _reference_backward))
OPERATOR.add(compiled_backend("cpu", "task_interaction", narrower_than_float64))
OPERATOR.add(triton_backend("task_interaction", narrower_than_float64, passes.forward, passes.backward))


def task_interaction(
    x: Tensor,
    y: Tensor,
    weights: TaskInteractionWeights,
    *,
    tau: float = 0.7,
    training: bool = False,
    momentum: float = MOMENTUM,
) -> TaskInteraction:
    """One level's exchange between the segmentation and the classification decoder (TIM, then UPA).

    Args:
        x: (B, C, *spatial) segmentation features, 1 to 3 spatial axes, any strides.
        y: (B, F) classification features.
        weights: a TaskInteractionWeights, which lists every shape.
        tau: strength of the modulation.
        training: True normalises with the batch's statistics and moves ``weights.bn_mean`` and
            ``weights.bn_var`` towards them in place (unbiased variance).
        momentum: how far they are moved, in [0, 1]; the published value by default.

    Returns:
        TaskInteraction(x, y, gates, signals).

    Raises:
        TypeError: an argument is not a floating-point tensor, weights not a TaskInteractionWeights, tau not a
            number.
        ValueError: a shape or a device does not fit, momentum is out of range, or training is asked for with
            a batch of one.

    Source: SPEC 1.3; BTI-Net (arXiv 2606.29102), task interaction module and uncertainty-proxy attention.
    """
    _check(x, y, weights, tau)
    if not 0 <= momentum <= 1:
        raise ValueError(f"task_interaction: momentum must lie in [0, 1], got {momentum}")
    if training and x.shape[0] == 1:
        raise ValueError(
            "task_interaction: training=True needs at least 2 samples for batch statistics, got a batch of 1"
        )
    # An empty batch has no statistics; it leaves the running ones alone.
    training = bool(training) and x.shape[0] > 0
    result = OPERATOR(x, y, list(weights), float(tau), training)
    if training:
        with torch.no_grad():
            weights.bn_mean.lerp_(result[4].to(weights.bn_mean.dtype), momentum)
            weights.bn_var.lerp_(result[5].to(weights.bn_var.dtype), momentum)
    return TaskInteraction(*result[:4])


def _check(x: Tensor, y: Tensor, weights: TaskInteractionWeights, tau: float) -> None:
    name = "task_interaction"
    check_map(name, "x", x)
    check_tensor(name, "y", y)
    check_tau(name, tau)
    if not isinstance(weights, TaskInteractionWeights):
        raise TypeError(f"{name}: weights must be a TaskInteractionWeights, got {type(weights).__name__}")
    check_rank(name, "y", y, 2, 2, "(B, F)")
    check_device(name, "y", y, "x", x)
    batch, channels, features = x.shape[0], x.shape[1], y.shape[1]
    check_shape(name, "y", y, (batch, features), "(B, F)")
    check_rank(name, "weights.conv_weight", weights.conv_weight, 2, 2, "(C/2, C)")
    check_rank(name, "weights.seg_proj", weights.seg_proj, 2, 2, "(64, C)")
    check_rank(name, "weights.gate1_weight", weights.gate1_weight, 2, 2, "(32, 3)")
    hidden, align, gate = (
        weights.conv_weight.shape[0],
        weights.seg_proj.shape[0],
        weights.gate1_weight.shape[0],
    )
    shapes = {
        "conv_weight": ((hidden, channels), "(C/2, C)"),
        "conv_bias": ((hidden,), "(C/2,)"),
        "fc_weight": ((features, hidden), "(F, C/2)"),
        "fc_bias": ((features,), "(F,)"),
        "bn_weight": ((features,), "(F,)"),
        "bn_bias": ((features,), "(F,)"),
        "bn_mean": ((features,), "(F,)"),
        "bn_var": ((features,), "(F,)"),
        "cls_gate_weight": ((features, features), "(F, F)"),
        "cls_gate_bias": ((features,), "(F,)"),
        "prior_weight": ((channels, features), "(C, F)"),
        "prior_bias": ((channels,), "(C,)"),
        "seg_gate_weight": ((channels, channels), "(C, C)"),
        "seg_gate_bias": ((channels,), "(C,)"),
        "seg_proj": ((align, channels), "(64, C)"),
        "cls_proj": ((align, features), "(64, F)"),
        "gate1_weight": ((gate, 3), "(32, 3)"),
        "gate1_bias": ((gate,), "(32,)"),
        "gate2_weight": ((2, gate), "(2, 32)"),
        "gate2_bias": ((2,), "(2,)"),
    }
    for field, (shape, meaning) in shapes.items():
        value = getattr(weights, field)
        check_tensor(name, f"weights.{field}", value)
        check_device(name, f"weights.{field}", value, "x", x)
        check_shape(name, f"weights.{field}", value, shape, meaning)
