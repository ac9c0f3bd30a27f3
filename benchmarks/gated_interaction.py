"""The module GatedInteraction: the operators with the linear layers around them, parameters included."""

from __future__ import annotations

import math

import torch
from torch import nn

from bti_fast.nn import GatedInteraction

from .harness import Case, plain_operators

FEATURES = 256


def case(batch: int, channels: int, spatial: tuple[int, ...], kind: str) -> Case:
    """A module of one kind ("proxy", "entropy" or "attention") in evaluation; with backward in training."""
    shape = (batch, channels, *spatial)
    features = 4.0 * math.prod(shape)
    # At every position channels -> channels / 2, or -> one logit of the module's own head.
    product = float(math.prod(shape)) * (2 if kind == "entropy" else channels)
    inner = 128  # four heads of 32

    def made() -> nn.Module:
        if kind == "entropy":
            return GatedInteraction(channels, FEATURES, uncertainty="entropy", cls_classes=3)
        return GatedInteraction(channels, FEATURES, attention_heads=4 if kind == "attention" else 0)

    def call(module, seg, cls):
        return tuple(value for value in module(seg, cls) if value is not None)

    if kind == "attention":  # projections of q and v, and back, beside the proxy module's own product
        product += 2.0 * 3 * batch * math.prod(spatial) * channels * inner
    return Case(
        kernel=f"GatedInteraction {kind}",
        size="x".join(map(str, shape)),
        inputs=lambda: [torch.randn(shape), torch.randn(batch, FEATURES)],
        module=made,
        reference=call,
        within=plain_operators,
        ours=call,
        traffic={"forward": 2 * features, "forward+backward": 5 * features},
        flop={"forward": product, "forward+backward": 3 * product},
    )
