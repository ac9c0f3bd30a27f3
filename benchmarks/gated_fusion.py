"""gated_fusion: entropy and both gated exchanges in one pass over the features."""

from __future__ import annotations

import math

import torch

from bti_fast import ops, reference

from .harness import Case

TAU = 0.7


def case(
    batch: int,
    channels: int,
    spatial: tuple[int, ...],
    classes: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> Case:
    """Features (batch, channels, *spatial) and ``classes`` mask logits."""
    shape = (batch, channels, *spatial)
    features = math.prod(shape) * dtype.itemsize
    logits = features // channels * classes
    return Case(
        kernel="gated_fusion",
        size=f"{'x'.join(map(str, shape))} K={classes}",
        inputs=lambda: [
            torch.randn(shape),
            torch.randn(batch, classes, *spatial),
            torch.rand(batch, channels),
            torch.rand(batch),
            torch.tensor([1.0, 0.5, -0.2]),
        ],
        reference=lambda *inputs: reference.gated_fusion(*inputs, TAU),
        ours=lambda *inputs: tuple(ops.gated_fusion(*inputs, tau=TAU)),
        traffic={
            "forward": 2 * features + logits,
            "forward+backward": 5 * features + 3 * logits,
        },
        flop={"forward": 4.0 * math.prod(shape), "forward+backward": 16.0 * math.prod(shape)},
        dtype=dtype,
        layout=layout,
    )
