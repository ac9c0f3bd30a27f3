"""cross_attention at (dense tokens N, class tokens M) that the paper's levels and token decoders have."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from bti_fast import ops, reference

from .harness import Benchmark

SIZES = ((196, 1), (784, 16), (3136, 64), (12544, 64), (12544, 256))


def benchmarks(batch: int = 2, heads: int = 4, dim: int = 32) -> list[Benchmark]:
    """One benchmark a size: (batch, heads, N, dim) float32 against (batch, heads, M, dim)."""
    return [_benchmark(batch, heads, dim, n, m) for n, m in SIZES]


def _two_calls(q, k, v_q, v_k):
    """What people use: one attention call for each direction, with the roles swapped."""
    return scaled_dot_product_attention(q, k, v_k), scaled_dot_product_attention(k, q, v_q)


def _benchmark(batch: int, heads: int, dim: int, n: int, m: int) -> Benchmark:
    scale = dim**-0.5
    eager = lambda *tokens: reference.cross_attention(*tokens, None, None, scale)[:2]  # noqa: E731
    dense = 4.0 * batch * heads * n * dim
    product = 2.0 * batch * heads * n * m * dim

    def fast(*tokens):
        return tuple(ops.cross_attention(*tokens))

    shapes = ((batch, heads, n, dim), (batch, heads, m, dim)) * 2
    return Benchmark(
        operator="cross_attention",
        size=f"{batch}x{heads}, N={n}, M={m}, d={dim}",
        inputs=lambda: [torch.randn(shape) for shape in shapes],
        providers={"eager": eager, "compile": torch.compile(eager), "sdpa": _two_calls, "bti_fast": fast},
        traffic={"forward": 3 * dense, "forward+backward": 8 * dense},
        flop={"forward": 3 * product, "forward+backward": 10 * product},
    )
