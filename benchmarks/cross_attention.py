"""cross_attention of N dense tokens and M class tokens, beside two attention calls with the roles swapped."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bti_fast import ops, reference

from .harness import Case

# (N, M): the paper's levels with few class tokens, and larger token decoders.
SIZES = ((196, 1), (784, 16), (3136, 64), (12544, 64), (12544, 256))
PINNED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
GPU_ONLY = "this backend of scaled_dot_product_attention exists for CUDA tensors only"


def case(
    batch: int,
    tokens: int,
    class_tokens: int,
    heads: int = 4,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
) -> Case:
    """Queries and values (batch, heads, tokens, dim) against (batch, heads, class_tokens, dim)."""
    dense = float(batch * heads * tokens * dim * dtype.itemsize)
    product = 2.0 * batch * heads * tokens * class_tokens * dim
    shapes = ((batch, heads, tokens, dim), (batch, heads, class_tokens, dim)) * 2
    return Case(
        kernel="cross_attention",
        size=f"{batch}x{heads}x{tokens}x{dim} M={class_tokens}",
        inputs=lambda: [torch.randn(shape) for shape in shapes],
        reference=lambda *qkv: reference.cross_attention(*qkv, None, None, dim**-0.5)[:2],
        ours=lambda *qkv: tuple(ops.cross_attention(*qkv)),
        traffic={"forward": 3 * dense, "forward+backward": 8 * dense},
        flop={"forward": 3 * product, "forward+backward": 10 * product},
        peers={"sdpa": (_two_calls, nullcontext), **{f"sdpa {k}": _pinned(k, device) for k in PINNED}},
        dtype=dtype,
        layout=layout,
    )


def _two_calls(q, k, v_q, v_k):
    """What people use: one attention call for each direction, with the roles swapped.

    The fused ones want token-major tensors; a channel-major map is copied for them.
    """
    q, k, v_q, v_k = (value.contiguous() for value in (q, k, v_q, v_k))
    return scaled_dot_product_attention(q, k, v_k), scaled_dot_product_attention(k, q, v_q)


def _pinned(name: str, device: str):
    if device == "cpu" and name in ("efficient", "cudnn"):
        return GPU_ONLY
    return _two_calls, lambda: sdpa_kernel(PINNED[name])
