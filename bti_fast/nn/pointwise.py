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
    """conv(x) for a 1x1 convolution of stride 1; x (B, C, H, W) -> (B, K, H, W).

    Of few positions, as in the deepest maps of one image or behind a pooling, a CPU computes it faster as a
    product: there the weights are the larger operand, which the convolution would pack anew in every call.
    """
    if (
        type(conv) is not nn.Conv2d
        or x.ndim != 4
        or x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or is_transformed()  # vmap does not know layouts
        or x.shape[0] * x.shape[2] * x.shape[3] > FEW_POSITIONS
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return conv(x)
    rows = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)  # [B, H, W, K]
    return rows.permute(0, 3, 1, 2)
