"""Linear maps at every position of a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.ops.straight import is_transformed

FEW_POSITIONS = 64


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear at every position of x (B, C, *spatial): (B, linear.out_features, *spatial), channel-major.

    The same as a 1x1 convolution, but read where the map lies: for a single output, as of a mask head, the
    convolution of a CPU takes several times as long.
    """
    weight = linear.weight.expand(x.shape[0], -1, -1)  # [B, K, C]
    return torch.baddbmm(linear.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


def conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for a 1x1 convolution of stride 1; x (B, C, H, W) -> (B, K, H, W)."""
    if type(conv) is not nn.Conv2d or not by_product(x):
        return conv(x)
    return product(x, conv.weight, conv.bias)


def by_product(x: Tensor) -> bool:
    """Whether a 1x1 convolution of x (B, C, H, W) is better computed as a product.

    Of few positions, as in the deepest maps of one image or behind a pooling, a CPU does so faster: there the
    weights are the larger operand, which the convolution would pack anew in every call.
    """
    return (
        x.ndim == 4
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_transformed()  # vmap does not know layouts
        and x.shape[0] * x.shape[2] * x.shape[3] <= FEW_POSITIONS
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of x (B, C, H, W) by weight (K, C, 1, 1) and bias (K,): (B, K, H, W), channels_last."""
    rows = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias)  # [B, H, W, K]
    return rows.permute(0, 3, 1, 2)
