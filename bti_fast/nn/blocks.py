"""The paper's convolutional blocks (2D), computed as the published code computes them (SPEC section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.nn.dilated_depthwise import depthwise
from bti_fast.nn.dual_path import gated, summarised
from bti_fast.nn.folding import FoldedAttentionGate, FoldedContextFusion, FoldedResidualBlock
from bti_fast.nn.pointwise import conv1x1
from bti_fast.nn.recomputed import mixed_scales

BN_EPS = 1e-3
BN_MOMENTUM = 0.01  # what Keras calls 0.99


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with the published epsilon and momentum."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


class ReluBatchNorm(nn.BatchNorm2d):
    """Relu, then batch normalisation: the published order. Overwrites its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu_(x))


class SeparableConv(nn.Module):
    """Depthwise convolution without bias, then a pointwise one with bias, at "same" padding.

    (B, Cin, H, W) -> (B, Cout, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: found {kernel_size}, needed an odd number for 'same' padding")
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, Cout, H, W]
        return conv1x1(self.pointwise, depthwise(self.depthwise, x))


class MultiScaleContextFusion(nn.Module):
    """Three dilated separable convolutions mixed by softmax weights of the pooled input; no skip inside.

    (B, C, H, W) -> (B, C, H, W); C at least `reduction`.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = channels // reduction
        if hidden < 1:
            raise ValueError(f"channels: found {channels}, needed at least reduction={reduction}")
        self.sep_d1 = SeparableConv(channels, channels, dilation=1)
        self.sep_d2 = SeparableConv(channels, channels, dilation=2)
        self.sep_d4 = SeparableConv(channels, channels, dilation=4)
        self.scale_fc1 = nn.Linear(channels, hidden)
        self.scale_fc2 = nn.Linear(hidden, 3)
        self.fusion = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scale_fc2(F.relu(self.scale_fc1(x.mean((2, 3))))).softmax(1)  # [B, 3]
        if x.shape[2] * x.shape[3] >= x.shape[1]:
            return self._multiplied_out(x, weights)
        w1, w2, w4 = weights[:, :, None, None, None].unbind(1)  # each [B, 1, 1, 1]
        return conv1x1(self.fusion, w1 * self.sep_d1(x) + w2 * self.sep_d2(x) + w4 * self.sep_d4(x))

    def folded_form(self) -> nn.Module:
        """The same for inference, see bti_fast.nn.folding."""
        return FoldedContextFusion(self)

    def _multiplied_out(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same with fusion, mixing and the pointwise halves folded into one matrix per sample.

        After the depthwise halves everything is linear. On maps of more positions than channels this saves
        one of four large products, and every map between them.
        """
        branches = (self.sep_d1, self.sep_d2, self.sep_d4)
        fusion = self.fusion.weight.flatten(1)  # [C, C]
        pointwise = torch.stack([branch.pointwise.weight.flatten(1) for branch in branches])  # [3, C, C]
        biases = torch.stack([branch.pointwise.bias for branch in branches])  # [3, C]
        matrices = weights[:, :, None, None] * (fusion @ pointwise)  # [B, 3, C, C]
        bias = F.linear(weights @ biases, fusion, self.fusion.bias)  # [B, C]
        kernels = [branch.depthwise.weight for branch in branches]
        return mixed_scales(x, kernels, matrices, bias)


class DualPathAttention(nn.Module):
    """Channel attention from the pooled input times spatial attention from [max, mean] over channels.

    (B, C, H, W) -> (B, C, H, W). Ties of the maximum share its gradient equally (`amax`). With `skip`, a map
    like x, it gives relu(attention(x) + skip).
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(8, channels // reduction)
        self.channel_fc1 = nn.Linear(channels, hidden)
        self.channel_fc2 = nn.Linear(hidden, channels)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x, pooled, summary = summarised(x)
        channel = self.channel_fc2(F.relu(self.channel_fc1(pooled))).sigmoid()  # [B, C]
        return gated(x, channel, self.spatial(summary).sigmoid(), skip)


class ResidualBlock(nn.Module):
    """Two separable convolutions, multi-scale fusion and optional attention around a skip connection.

    (B, Cin, H, W) -> (B, Cout, H, W); with several in_channels, a map of each, which are concatenated. The
    skip is a 1x1 convolution where the channel counts differ.
    """

    def __init__(
        self, in_channels: int | Sequence[int], out_channels: int, *, attention: bool = False
    ) -> None:
        super().__init__()
        self.in_channels = (in_channels,) if isinstance(in_channels, int) else tuple(in_channels)
        total = sum(self.in_channels)
        self.conv1 = SeparableConv(total, out_channels)
        self.bn1 = ReluBatchNorm(out_channels, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.conv2 = SeparableConv(out_channels, out_channels)
        self.bn2 = batch_norm(out_channels)
        self.msf = MultiScaleContextFusion(out_channels)
        self.att = DualPathAttention(out_channels) if attention else None
        self.proj = nn.Conv2d(total, out_channels, 1) if total != out_channels else nn.Identity()

    def forward(self, *maps: Tensor) -> Tensor:
        x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        y = self.bn1(self.conv1(x))
        y = self.msf(self.bn2(self.conv2(y)))
        skip = x if isinstance(self.proj, nn.Identity) else conv1x1(self.proj, x)
        return F.relu_(y + skip) if self.att is None else self.att(y, skip)

    def folded_form(self) -> nn.Module:
        """The same for inference, see bti_fast.nn.folding."""
        return FoldedResidualBlock(self)


class AttentionGate(nn.Module):
    """Gates the skip map x by a spatial mask computed from x and the decoder map g.

    x (B, Cx, H, W), g (B, Cg, h, w) -> (B, Cx, H, W). g is brought to x's size by bilinear interpolation
    (half-pixel centres, no antialiasing), only where the sizes differ.
    """

    def __init__(self, x_channels: int, g_channels: int, inter_channels: int) -> None:
        super().__init__()
        self.x_transform = nn.Conv2d(x_channels, inter_channels, 1)
        self.g_transform = nn.Conv2d(g_channels, inter_channels, 1)
        self.ctx_sep_d1 = SeparableConv(inter_channels, inter_channels, dilation=1)
        self.ctx_sep_d2 = SeparableConv(inter_channels, inter_channels, dilation=2)
        self.ctx_out = nn.Conv2d(inter_channels, 1, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        g = conv1x1(self.g_transform, g)
        if g.shape[2:] != x.shape[2:]:
            g = F.interpolate(g, size=x.shape[2:], mode="bilinear", align_corners=False, antialias=False)
        both = F.relu_(conv1x1(self.x_transform, x) + g)
        return x * self.ctx_out(self.ctx_sep_d2(self.ctx_sep_d1(both))).sigmoid()

    def folded_form(self) -> nn.Module:
        """The same for inference, see bti_fast.nn.folding."""
        return FoldedAttentionGate(self)
