"""The operator entropy_uncertainty: how unsure a prediction is, per pixel or per image."""

from __future__ import annotations

import torch
from torch import Tensor

from bti_fast.ops.backends import (
    compiled_backend,
    narrower_than_float64,
    no_limits,
    reference_backend,
    triton_backend,
)
from bti_fast.ops.checks import check_rank, check_tensor
from bti_fast.ops.dispatch import Operator, like
from bti_fast.reference import entropy_uncertainty as reference
from bti_fast.reference import entropy_uncertainty_backward as reference_backward
from bti_fast.reference.numerics import accumulate_dtype


def _fake(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1] + logits.shape[2:], dtype=accumulate_dtype(logits))


def _fake_backward(grad_u: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(logits)


OPERATOR = Operator(
    name="entropy_uncertainty",
    schema="(Tensor logits) -> Tensor",
    backward_schema="(Tensor grad_u, Tensor logits) -> Tensor",
    fake=_fake,
    fake_backward=_fake_backward,
    saves=lambda inputs, outputs: inputs,
    primals=lambda args: args[1:],
    gradients=lambda result: (result,),
    differentiable=1,
)
OPERATOR.add(
    reference_backend(
        lambda logits: reference(logits).contiguous(),
        lambda grad_u, logits: like(reference_backward(grad_u, logits), logits),
    )
)
OPERATOR.add(compiled_backend("cpu", "entropy_uncertainty", no_limits))
OPERATOR.add(compiled_backend("cuda", "entropy_uncertainty", no_limits))
OPERATOR.add(triton_backend("entropy_uncertainty", narrower_than_float64))


def entropy_uncertainty(logits: Tensor) -> Tensor:
    """Shannon entropy of a prediction, normalised to [0, 1]: 0 is certain, 1 knows nothing.

    Args:
        logits: (B, K, *spatial) or (B, L), classes on axis 1; K = 1 is one Bernoulli logit (a binary mask).
            float32, float16, bfloat16 or float64, any strides.

    Returns:
        u, the shape of logits without axis 1: float32 (float64 for float64 logits), contiguous.

    Raises:
        TypeError: logits is not a floating-point tensor.
        ValueError: logits has fewer than 2 or more than 5 dimensions, or no class.

    Source: SPEC 1.1; BTI-Net (arXiv 2606.29102).
    """
    check_tensor("entropy_uncertainty", "logits", logits)
    check_rank("entropy_uncertainty", "logits", logits, 2, 5, "(B, K, *spatial) or (B, L)")
    if logits.shape[1] < 1:
        raise ValueError(
            f"entropy_uncertainty: logits needs at least one class (axis 1), got {tuple(logits.shape)}"
        )
    return OPERATOR(logits)
