"""What both directions of gated_fusion make of the logits at a position: its gate and its pooling weight."""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-3)  # of the pooling weights, so that total ignorance still pools


@triton.jit
def gate_of(u, doubt, coeffs):
    """r of positions with entropy u; doubt, coeffs: pointers to the sample's uncertainty and to 3 values."""
    alpha = tl.load(coeffs).to(tl.float32)
    beta = tl.load(coeffs + 1).to(tl.float32)
    gamma = tl.load(coeffs + 2).to(tl.float32)
    certainty = 1.0 - tl.load(doubt).to(tl.float32)
    return tl.sigmoid(alpha * u + beta * certainty + gamma)


@triton.jit
def pooling_weight(u):
    """omega, the weight of a position with entropy u; of the mean entropy, the mean weight."""
    return 1.0 - u + FLOOR
