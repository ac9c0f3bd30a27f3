"""entropy_uncertainty of mask logits."""

from __future__ import annotations

import math

import torch

from bti_fast import ops, reference

from .harness import Case


def case(batch: int, classes: int, spatial: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    """Logits (batch, classes, *spatial)."""
    shape = (batch, classes, *spatial)
    pixels, logits = batch * math.prod(spatial), math.prod(shape)
    forward = logits * dtype.itemsize + 4 * pixels  # the result is float32 in every dtype
    return Case(
        kernel="entropy_uncertainty",
        size="x".join(map(str, shape)),
        inputs=lambda: [torch.randn(shape)],
        reference=lambda logits: (reference.entropy_uncertainty(logits),),
        ours=lambda logits: (ops.entropy_uncertainty(logits),),
        traffic={
            "forward": forward,
            "forward+backward": 2 * forward + logits * dtype.itemsize,
        },
        flop={"forward": 6.0 * logits, "forward+backward": 16.0 * logits},
        dtype=dtype,
    )
