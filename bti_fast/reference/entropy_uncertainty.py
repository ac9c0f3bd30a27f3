"""Reference of entropy_uncertainty: normalised Shannon entropy of a prediction, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bti_fast.reference.numerics import accumulate_dtype, vjp


def entropy_uncertainty(logits: Tensor) -> Tensor:
    """Shannon entropy over axis 1, divided by its maximum.

    Args:
        logits: (B, K, *spatial) or (B, L); K = 1 means one Bernoulli logit.

    Returns:
        u: logits' shape without axis 1, in [0, 1]; float32 (float64 for float64 logits).

    Every term is a sum of non-negative parts, so that saturated logits give exactly 0. SPEC 1.1.
    """
    a = logits.to(accumulate_dtype(logits))
    if logits.shape[1] == 1:
        magnitude = a.squeeze(1).abs()
        entropy = torch.log1p(torch.exp(-magnitude)) + magnitude * torch.sigmoid(-magnitude)
        return (entropy / math.log(2)).clamp(max=1.0)
    z = a - a.amax(1, keepdim=True).detach()
    e = torch.exp(z)
    total = e.sum(1)
    entropy = torch.log(total) - (e * z).sum(1) / total
    return (entropy / math.log(logits.shape[1])).clamp(min=0.0, max=1.0)


def entropy_uncertainty_backward(grad_u: Tensor, logits: Tensor) -> Tensor:
    """Gradient of the logits, by differentiating the reference."""
    return vjp(entropy_uncertainty, (logits,), grad_u)[0]
