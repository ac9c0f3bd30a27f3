"""task_interaction at the paper's four levels."""

from __future__ import annotations

import torch

from bti_fast import ops, reference

from .harness import PAPER_LEVELS, Benchmark

TAU = 0.7
FEATURES = 256


def benchmarks(batch: int = 8) -> list[Benchmark]:
    """One benchmark a level: (batch, channels, side, side) float32 features, 256 classification features."""
    return [_benchmark(batch, channels, side) for channels, side in PAPER_LEVELS]


def _benchmark(batch: int, channels: int, side: int) -> Benchmark:
    eager = lambda x, y, *weights: reference.task_interaction(x, y, list(weights), TAU, False)[:4]  # noqa: E731
    features = 4.0 * batch * channels * side * side
    product = batch * channels * channels * side * side  # 2 flop for each of C * C/2 * P
    bn_mean = 2 + ops.TaskInteractionWeights._fields.index("bn_mean")

    def fast(x, y, *weights):
        return tuple(ops.task_interaction(x, y, ops.TaskInteractionWeights(*weights), tau=TAU))

    return Benchmark(
        operator="task_interaction",
        size=f"{batch}x{channels}x{side}x{side}",
        inputs=lambda: [
            torch.randn(batch, channels, side, side),
            torch.randn(batch, FEATURES),
            *_weights(channels, FEATURES),
        ],
        providers={"eager": eager, "compile": torch.compile(eager), "bti_fast": fast},
        traffic={"forward": 3 * features, "forward+backward": 8 * features},
        flop={"forward": product, "forward+backward": 4 * product},
        constant=(bn_mean, bn_mean + 1),
    )


def _weights(channels: int, features: int) -> list[torch.Tensor]:
    hidden = channels // 2
    matrices = {
        "conv": (hidden, channels),
        "fc": (features, hidden),
        "cls_gate": (features, features),
        "prior": (channels, features),
        "seg_gate": (channels, channels),
        "gate1": (32, 3),
        "gate2": (2, 32),
    }
    made = {f"{name}_weight": torch.randn(shape) * shape[1] ** -0.5 for name, shape in matrices.items()}
    made |= {f"{name}_bias": 0.1 * torch.randn(shape[0]) for name, shape in matrices.items()}
    made |= {"seg_proj": torch.randn(64, channels) * channels**-0.5}
    made |= {"cls_proj": torch.randn(64, features) * features**-0.5}
    made |= {"bn_weight": torch.ones(features), "bn_bias": torch.zeros(features)}
    made |= {"bn_mean": torch.zeros(features), "bn_var": torch.ones(features)}
    return [made[field] for field in ops.TaskInteractionWeights._fields]
