"""Reference of gated_fusion: entropy, gate, modulation and uncertainty-weighted pooling, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from bti_fast.reference.entropy_uncertainty import entropy_uncertainty
from bti_fast.reference.numerics import accumulate_dtype, vjp


def gated_fusion(
    x: Tensor,  # (B, C, *spatial)
    seg_logits: Tensor,  # (B, K, *spatial)
    prior: Tensor,  # (B, C)
    cls_uncertainty: Tensor,  # (B,)
    coeffs: Tensor,  # (3,)
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (B, C, *spatial), pooled (B, C), mean uncertainty (B,) and uncertainty (B, *spatial). SPEC 1.2."""
    dtype = accumulate_dtype(x)
    wide = x.to(dtype)
    u = entropy_uncertainty(seg_logits.to(dtype))
    alpha, beta, gamma = coeffs.to(dtype)
    per_sample = (-1, *[1] * (u.dim() - 1))
    certainty = (1 - cls_uncertainty.to(dtype)).view(per_sample)
    gate = (alpha * u + beta * certainty + gamma).sigmoid().unsqueeze(1)
    channel_prior = prior.to(dtype).view(*prior.shape, *per_sample[1:])
    x_out = wide * (1 + tau * gate * channel_prior)
    confidence = (1 - u + 1e-3).flatten(1)
    pooled = (wide.flatten(2) * confidence.unsqueeze(1)).sum(2) / confidence.sum(1, keepdim=True)
    return x_out.to(x.dtype), pooled, u.flatten(1).mean(1), u


def gated_fusion_backward(
    grad_x_out: Tensor,
    grad_pooled: Tensor,
    grad_mean: Tensor,
    grad_u: Tensor,
    x: Tensor,
    seg_logits: Tensor,
    prior: Tensor,
    cls_uncertainty: Tensor,
    coeffs: Tensor,
    tau: float,
) -> tuple[Tensor, ...]:
    """Gradients of x, seg_logits, prior, cls_uncertainty and coeffs, by differentiating the reference."""
    primals = (x, seg_logits, prior, cls_uncertainty, coeffs)
    return vjp(
        lambda *inputs: gated_fusion(*inputs, tau), primals, (grad_x_out, grad_pooled, grad_mean, grad_u)
    )
