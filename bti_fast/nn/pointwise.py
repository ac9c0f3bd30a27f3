"""A linear layer at every position of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear at every position of x (B, C, *spatial): (B, linear.out_features, *spatial), channel-major.

    The same as a 1x1 convolution, but read where the map lies: for a single output, as of a mask head, the
    convolution of a CPU takes several times as long.
    """
    weight = linear.weight.expand(x.shape[0], -1, -1)  # [B, K, C]
    return torch.baddbmm(linear.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])
