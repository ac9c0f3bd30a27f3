"""The operator gated_fusion: entropy and both gated exchanges in one pass over the segmentation features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bti_fast._export import exportable
from bti_fast.ops.backends import (
    compiled_backend,
    narrower_than_float64,
    reference_backend,
    triton_backend,
)
from bti_fast.ops.checks import check_device, check_map, check_shape, check_tau, check_tensor
from bti_fast.ops.dispatch import Operator, like
from bti_fast.reference import gated_fusion as reference
from bti_fast.reference import gated_fusion_backward as reference_backward
from bti_fast.reference.numerics import accumulate_dtype


@exportable
class GatedFusion(NamedTuple):
    """What gated_fusion returns."""

    x: Tensor  # (B, C, *spatial), dtype and memory format of x
    pooled: Tensor  # (B, C), float32
    mean_uncertainty: Tensor  # (B,), float32, in [0, 1]
    uncertainty: Tensor  # (B, *spatial), float32, in [0, 1]


def _fake(x, seg_logits, prior, cls_uncertainty, coeffs, tau):
    dtype = accumulate_dtype(x)
    return (
        torch.empty_like(x),
        x.new_empty(x.shape[:2], dtype=dtype),
        x.new_empty(x.shape[:1], dtype=dtype),
        x.new_empty(x.shape[:1] + x.shape[2:], dtype=dtype),
    )


def _fake_backward(grad_x, grad_pooled, grad_mean, grad_u, *saved):
    return tuple(torch.empty_like(value) for value in saved[:5])


def _reference_forward(x, *rest):
    x_out, pooled, mean, u = reference(x, *rest)
    return like(x_out, x), pooled, mean, u.contiguous()


def _reference_backward(*args):
    *inputs, _pooled, _mean, tau = args
    grads = reference_backward(*inputs, tau)
    return tuple(like(grad, value) for grad, value in zip(grads, args[4:9], strict=True))


OPERATOR = Operator(
    name="gated_fusion",
    schema="(Tensor x, Tensor seg_logits, Tensor prior, Tensor cls_uncertainty, Tensor coeffs, float tau)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad_x, Tensor grad_pooled, Tensor grad_mean, Tensor grad_u, Tensor x,"
    " Tensor seg_logits, Tensor prior, Tensor cls_uncertainty, Tensor coeffs, Tensor pooled,"
    " Tensor mean_uncertainty, float tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    # The pooled sums and the mean uncertainty are vectors, and spare a backward pass a second look at x.
    saves=lambda inputs, outputs: (*inputs[:5], outputs[1], outputs[2], inputs[5]),
    primals=lambda args: (*args[4:9], args[11]),
    gradients=lambda result: (*result, None),
    differentiable=4,
)
OPERATOR.add(reference_backend(_reference_forward, _reference_backward))
OPERATOR.add(compiled_backend("cpu", "gated_fusion", narrower_than_float64))
OPERATOR.add(triton_backend("gated_fusion", narrower_than_float64))


def gated_fusion(
    x: Tensor, seg_logits: Tensor, prior: Tensor, cls_uncertainty: Tensor, coeffs: Tensor, *, tau: float = 0.7
) -> GatedFusion:
    """Lets the class branch modulate x where the mask is uncertain, and pools x where the mask is certain.

    Args:
        x: (B, C, *spatial) segmentation features, 1 to 3 spatial axes, any strides.
        seg_logits: (B, K, *spatial) mask logits; K = 1 is one Bernoulli logit.
        prior: (B, C) semantic prior of the class branch, in (0, 1).
        cls_uncertainty: (B,) uncertainty of the class prediction, in [0, 1].
        coeffs: (3,) gate coefficients alpha (mask uncertainty), beta (class certainty), gamma (bias).
        tau: strength of the modulation.

    Returns:
        GatedFusion(x, pooled, mean_uncertainty, uncertainty).

    Raises:
        TypeError: an argument is not a floating-point tensor, or tau not a number.
        ValueError: a shape or a device does not fit x.

    Source: SPEC 1.2.
    """
    name = "gated_fusion"
    check_map(name, "x", x)
    check_map(name, "seg_logits", seg_logits)
    for argument, value in (("prior", prior), ("cls_uncertainty", cls_uncertainty), ("coeffs", coeffs)):
        check_tensor(name, argument, value)
        check_device(name, argument, value, "x", x)
    check_device(name, "seg_logits", seg_logits, "x", x)
    check_tau(name, tau)
    batch, channels, spatial = x.shape[0], x.shape[1], x.shape[2:]
    check_shape(
        name, "seg_logits", seg_logits, (batch, seg_logits.shape[1], *spatial), "(B, K, *spatial of x)"
    )
    check_shape(name, "prior", prior, (batch, channels), "(B, C)")
    check_shape(name, "cls_uncertainty", cls_uncertainty, (batch,), "(B,)")
    check_shape(name, "coeffs", coeffs, (3,), "(3,)")
    return GatedFusion(*OPERATOR(x, seg_logits, prior, cls_uncertainty, coeffs, float(tau)))
