"""task_interaction: the paper's message passing and its three-signal gates."""

from __future__ import annotations

import math

import torch

from bti_fast import ops, reference

from .harness import Case

TAU = 0.7
FEATURES = 256


def case(
    batch: int,
    channels: int,
    spatial: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> Case:
    """Features (batch, channels, *spatial) and (batch, 256), in evaluation."""
    shape = (batch, channels, *spatial)
    features = math.prod(shape) * dtype.itemsize
    product = float(math.prod(shape) * channels)  # 2 flop for each of C * C/2 * P
    bn_mean = 2 + ops.TaskInteractionWeights._fields.index("bn_mean")

    def ours(x, y, *weights):
        return tuple(ops.task_interaction(x, y, ops.TaskInteractionWeights(*weights), tau=TAU))

    return Case(
        kernel="task_interaction",
        size="x".join(map(str, shape)),
        inputs=lambda: [torch.randn(shape), torch.randn(batch, FEATURES), *_weights(channels, FEATURES)],
        reference=lambda x, y, *weights: reference.task_interaction(x, y, list(weights), TAU, False)[:4],
        ours=ours,
        traffic={"forward": 3 * features, "forward+backward": 8 * features},
        flop={"forward": product, "forward+backward": 4 * product},
        constant=(bn_mean, bn_mean + 1),
        dtype=dtype,
        layout=layout,
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
