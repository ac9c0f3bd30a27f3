"""Gated fusion by the logits of a linear head on the same map: the head within the fusion's passes (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bti_fast import _library, ops
from bti_fast.nn.pointwise import pointwise
from bti_fast.ops.dispatch import forced
from bti_fast.ops.gated_fusion import GatedFusion
from bti_fast.ops.straight import is_ordinary


def headed_fusion(
    head: nn.Linear, x: Tensor, prior: Tensor, cls_uncertainty: Tensor, coeffs: Tensor, tau: float
) -> tuple[GatedFusion, Tensor]:
    """ops.gated_fusion of x (B, C, *spatial) by the logits that `head` gives at every position, and those
    logits (B, K, *spatial)."""
    tensors = x, head.weight, head.bias, prior, cls_uncertainty, coeffs
    if not _is_compiled(*tensors):
        return one_by_one(head, x, prior, cls_uncertainty, coeffs, tau)
    *fused, logits = _HeadedFusion.apply(*tensors, float(tau))
    return GatedFusion(*fused), logits


def one_by_one(
    head: nn.Linear, x: Tensor, prior: Tensor, cls_uncertainty: Tensor, coeffs: Tensor, tau: float
) -> tuple[GatedFusion, Tensor]:
    """The same as the head and then the operator."""
    logits = pointwise(head, x)
    return ops.gated_fusion(x, logits, prior, cls_uncertainty, coeffs, tau=tau), logits


def _is_compiled(*tensors: Tensor) -> bool:
    return (
        is_ordinary(tensors)  # first: a compiler follows nothing after it
        and forced() in (None, "cpu")
        and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)
        and _library.load("cpu") is None
    )


class _HeadedFusion(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, prior, cls_uncertainty, coeffs, tau):
        return torch.ops.bti_fast_cpu.headed_gated_fusion(
            x, weight, bias, prior, cls_uncertainty, coeffs, tau
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.tau = inputs
        _, pooled, mean, _, logits = output
        ctx.save_for_backward(*tensors, logits, pooled, mean)

    @staticmethod
    def backward(ctx, *grads):
        x, weight, bias, prior, cls_uncertainty, coeffs, *outputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            tensors = x, weight, bias, prior, cls_uncertainty, coeffs
            logits = _logits(x, weight, bias)
            fused = ops.gated_fusion(x, logits, prior, cls_uncertainty, coeffs, tau=ctx.tau)
            wanted = [value for value in tensors if value.requires_grad]
            found = iter(torch.autograd.grad((*fused, logits), wanted, grads, create_graph=True))
            return *(next(found) if value.requires_grad else None for value in tensors), None
        found = torch.ops.bti_fast_cpu.headed_gated_fusion_backward(
            *grads, x, weight, bias, outputs[0], prior, cls_uncertainty, coeffs, *outputs[1:], ctx.tau
        )
        return *found, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("kc,bcp->bkp", weight, x.flatten(2)).add(bias[:, None]).unflatten(2, x.shape[2:])
