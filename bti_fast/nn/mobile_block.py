"""The block that EfficientNet consists of, folded for inference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bti_fast.nn.dilated_depthwise import takes_kernels
from bti_fast.nn.folding import folded_conv1x1, matrix_of


class FoldedMobileBlock(nn.Module):
    """EfficientNet's inverted bottleneck, MONAI's MBConvBlock, for inference: (B, C, H, W) -> its output, and
    the activation after the expansion.

    1x1 expansion, depthwise convolution of stride 1 or 2, squeeze-and-excitation and 1x1 projection, with the
    normalisations in the convolutions.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.expand = None
        if block.expand_ratio != 1:
            self.expand = folded_conv1x1(block._expand_conv, block._bn0, silu=True)
        depthwise = fuse_conv_bn_eval(block._depthwise_conv, block._bn1)
        self.stride = depthwise.stride[0]
        self.register_buffer("taps", depthwise.weight.detach().flatten(1).T.contiguous())  # [k·k, C]
        self.register_buffer("taps_bias", depthwise.bias.detach())
        self.has_se = block.has_se
        if block.has_se:
            self.register_buffer("reduce", matrix_of(block._se_reduce).detach().contiguous())  # [R, C]
            self.register_buffer("reduce_bias", block._se_reduce.bias.detach())
            self.register_buffer("excite", matrix_of(block._se_expand).detach().T.contiguous())  # [R, C]
            self.register_buffer("excite_bias", block._se_expand.bias.detach())
        self.project = folded_conv1x1(block._project_conv, block._bn2)
        self.skips = block.id_skip and block.stride == 1 and block.in_channels == block.out_channels

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        squeeze = [self.reduce, self.reduce_bias, self.excite, self.excite_bias] if self.has_se else []
        if not takes_kernels(inputs, self.taps) or (torch.is_grad_enabled() and inputs.requires_grad):
            return self._plain(inputs, *squeeze)
        y, *expanded = torch.ops.bti_fast_cpu.mobile_block(
            inputs,
            [] if self.expand is None else [self.expand.matrix, self.expand.bias],
            self.taps,
            self.taps_bias,
            self.stride,
            squeeze,
            self.project.matrix,
            self.project.bias,
            self.skips,
        )
        return y, expanded[0] if expanded else inputs

    def _plain(self, inputs: Tensor, *squeeze: Tensor) -> tuple[Tensor, Tensor]:
        """The same by torch's layers."""
        expanded = inputs if self.expand is None else self.expand(inputs)
        size = math.isqrt(len(self.taps))
        kernel = self.taps.T.unflatten(1, (1, size, size))
        if self.stride == 1:
            x = F.conv2d(expanded, kernel, self.taps_bias, padding=size // 2, groups=len(kernel))
        else:
            x = F.conv2d(padded(expanded, size), kernel, self.taps_bias, 2, groups=len(kernel))
        x = F.silu(x)
        gate = None
        if squeeze:
            reduce, reduce_bias, excite, excite_bias = squeeze
            gate = F.silu(F.linear(x.mean((2, 3)), reduce, reduce_bias))
            gate = F.linear(gate, excite.T, excite_bias).sigmoid()
        return self.project(x, factor=gate, skip=inputs if self.skips else None), expanded


def padded(x: Tensor, size: int) -> Tensor:
    """For a convolution of stride 2 by a kernel of that size, as the published encoder pads: size//2 - 1
    before and size//2 after where the map is even, size//2 on both sides where odd."""
    height, width = x.shape[-2:]
    reach = size // 2
    return F.pad(x, (reach - 1 + width % 2, reach, reach - 1 + height % 2, reach))
