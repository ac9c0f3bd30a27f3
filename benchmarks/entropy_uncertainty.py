"""entropy_uncertainty at the mask sizes of the paper's four levels."""

from __future__ import annotations

import torch

from bti_fast import ops, reference

from .harness import PAPER_LEVELS, Benchmark


def benchmarks(batch: int = 8, classes: int = 4) -> list[Benchmark]:
    """One benchmark a level: (batch, classes, side, side) float32 logits."""
    return [_benchmark(batch, classes, side) for _, side in PAPER_LEVELS]


def _benchmark(batch: int, classes: int, side: int) -> Benchmark:
    pixels = batch * side * side
    eager = lambda logits: (reference.entropy_uncertainty(logits),)  # noqa: E731
    forward = 4.0 * pixels * (classes + 1)
    return Benchmark(
        operator="entropy_uncertainty",
        size=f"{batch}x{classes}x{side}x{side}",
        inputs=lambda: [torch.randn(batch, classes, side, side)],
        providers={
            "eager": eager,
            "compile": torch.compile(eager),
            "bti_fast": lambda logits: (ops.entropy_uncertainty(logits),),
        },
        traffic={"forward": forward, "forward+backward": forward + 4.0 * pixels * (2 * classes + 1)},
        flop={"forward": 6.0 * pixels * classes, "forward+backward": 16.0 * pixels * classes},
    )
