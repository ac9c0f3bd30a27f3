"""gated_fusion at the paper's four levels."""

from __future__ import annotations

import torch

from bti_fast import ops, reference

from .harness import PAPER_LEVELS, Benchmark

TAU = 0.7


def benchmarks(batch: int = 8, classes: int = 1) -> list[Benchmark]:
    """One benchmark a level: (batch, channels, side, side) float32 features, ``classes`` mask logits."""
    return [_benchmark(batch, classes, channels, side) for channels, side in PAPER_LEVELS]


def _benchmark(batch: int, classes: int, channels: int, side: int) -> Benchmark:
    eager = lambda *inputs: reference.gated_fusion(*inputs, TAU)  # noqa: E731
    features = 4.0 * batch * channels * side * side
    logits = 4.0 * batch * classes * side * side
    return Benchmark(
        operator="gated_fusion",
        size=f"{batch}x{channels}x{side}x{side}, K={classes}",
        inputs=lambda: [
            torch.randn(batch, channels, side, side),
            torch.randn(batch, classes, side, side),
            torch.rand(batch, channels),
            torch.rand(batch),
            torch.tensor([1.0, 0.5, -0.2]),
        ],
        providers={
            "eager": eager,
            "compile": torch.compile(eager),
            "bti_fast": lambda *inputs: tuple(ops.gated_fusion(*inputs, tau=TAU)),
        },
        traffic={
            "forward": 2 * features + logits,
            "forward+backward": 5 * features + 3 * logits,
        },
        flop={"forward": features, "forward+backward": 4 * features},
    )
