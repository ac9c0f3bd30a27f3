"""Inference-only forms of layers: batch normalisation and chains of linear maps merged into fewer products,
each of them one pass over its maps on a CPU.

Everything here computes what the layers it is made of compute in evaluation mode, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bti_fast.nn.normalised_silu import line_of
from bti_fast.nn.separable_product import SeparableProduct, Source


def fold(module: nn.Module) -> nn.Module:
    """A copy of `module` in evaluation mode, every part that has a `folded_form` method in that form.

    The copy is for inference: it has no gradients, and its parameters are no longer those of `module`.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _folded(copy.deepcopy(module).eval().requires_grad_(False), {})


def _folded(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with its parts, a part that stands in two places once."""
    if module not in known:
        if hasattr(module, "folded_form"):
            known[module] = module.folded_form().eval().requires_grad_(False)
        else:
            known[module] = module
            for name, child in module.named_children():
                setattr(module, name, _folded(child, known))
    return known[module]


def matrix_of(conv: nn.Conv2d) -> Tensor:
    """The weight (K, C) of a 1x1 convolution."""
    return conv.weight.flatten(1)


def folded_conv1x1(conv: nn.Conv2d, norm: nn.Module, *, silu: bool = False) -> SeparableProduct:
    """A 1x1 convolution and the batch normalisation after it, then silu where asked for."""
    merged = fuse_conv_bn_eval(conv, norm)
    return SeparableProduct([Source(merged.in_channels)], matrix_of(merged), merged.bias, silu=silu)


class FoldedResidualBlock(nn.Module):
    """ResidualBlock as three products, in which its depthwise convolutions, both batch normalisations, relus
    and the skip's convolution disappear.

    maps (B, C_i, H, W), whose channels together are the block's -> (B, Cout, H, W).
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        channels = block.in_channels
        kernels = block.conv1.depthwise.weight.split(channels)
        scale, shift = line_of(block.bn1)
        infinity = torch.full_like(shift, torch.inf)
        pointwise = block.conv1.pointwise
        # With scale s and shift t, s·relu(z) + t is s·z + t, kept above t where s is positive and below t
        # where it is negative.
        self.first = SeparableProduct(
            [Source(*pair) for pair in zip(channels, kernels, strict=True)],
            matrix_of(pointwise) * scale[:, None],
            pointwise.bias * scale + shift,
            lower=torch.where(scale < 0, -infinity, shift),
            upper=torch.where(scale > 0, infinity, shift),
        )
        second = fuse_conv_bn_eval(block.conv2.pointwise, block.bn2)
        self.second = SeparableProduct(
            [Source(second.in_channels, block.conv2.depthwise.weight)], matrix_of(second), second.bias
        )
        self.att = block.att
        self.proj = None
        if isinstance(block.proj, nn.Identity):
            self.fusion = FoldedContextFusion(block.msf, relu=block.att is None)
        elif block.att is None:
            self.fusion = FoldedContextFusion(block.msf, relu=True, proj=block.proj, channels=channels)
        else:
            self.fusion = FoldedContextFusion(block.msf)
            self.proj = SeparableProduct(
                [Source(c) for c in channels], matrix_of(block.proj), block.proj.bias
            )

    def forward(self, *maps: Tensor) -> Tensor:
        y = self.second(self.first(*maps))
        if self.fusion.has_proj:
            return self.fusion(y, *maps)
        if self.proj is not None:
            skip = self.proj(*maps)
        else:
            skip = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        return self.fusion(y, skip=skip) if self.att is None else self.att(self.fusion(y), skip)


class FoldedContextFusion(nn.Module):
    """MultiScaleContextFusion with each pointwise half and the fusion multiplied out beforehand: one product
    of three times the depth, to which a skip's convolution may be added.

    y (B, C, H, W) and, with proj, the maps (B, C_i, H, W) that it convolves -> (B, C, H, W), of which relu
    takes the positive part.
    """

    def __init__(
        self,
        msf: nn.Module,
        *,
        relu: bool = False,
        proj: nn.Conv2d | None = None,
        channels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        branches = (msf.sep_d1, msf.sep_d2, msf.sep_d4)
        self.scale_fc1, self.scale_fc2 = msf.scale_fc1, msf.scale_fc2
        self.has_proj = proj is not None
        width = msf.fusion.in_channels
        sources = [Source(width, b.depthwise.weight, b.depthwise.dilation[0]) for b in branches]
        fusion = matrix_of(msf.fusion)
        products = [fusion @ matrix_of(branch.pointwise) for branch in branches]
        biases = torch.stack([fusion @ branch.pointwise.bias for branch in branches])
        bias = msf.fusion.bias
        if proj is not None:
            sources += [Source(c) for c in channels]
            products.append(matrix_of(proj))
            bias = bias + proj.bias
        self.product = SeparableProduct(
            sources,
            torch.cat(products, 1),
            lower=torch.zeros_like(bias) if relu else None,
        )
        self.register_buffer("biases", biases)
        self.register_buffer("shared_bias", bias.detach())
        self.register_buffer("ones", bias.new_ones(1, sum(channels)) if self.has_proj else None)

    def forward(self, y: Tensor, *maps: Tensor, skip: Tensor | None = None) -> Tensor:
        weights = self.scale_fc2(F.relu(self.scale_fc1(y.mean((2, 3))))).softmax(1)  # [B, 3]
        factor = weights.repeat_interleave(y.shape[1], 1)
        if self.has_proj:
            factor = torch.cat((factor, self.ones.expand(len(y), -1)), 1)
        bias = torch.addmm(self.shared_bias, weights, self.biases)  # [B, C]
        return self.product(y, y, y, *maps, factor=factor, bias=bias, skip=skip)


class FoldedAttentionGate(nn.Module):
    """AttentionGate with its last two 1x1 convolutions as one, to a single channel.

    x (B, Cx, H, W), g (B, Cg, h, w) -> (B, Cx, H, W).
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        of_x, of_g, inner, outer = gate.x_transform, gate.g_transform, gate.ctx_sep_d1, gate.ctx_sep_d2
        self.both = SeparableProduct(
            [Source(of_x.in_channels), Source(of_g.in_channels)],
            torch.cat((matrix_of(of_x), matrix_of(of_g)), 1),
            of_x.bias + of_g.bias,
            lower=torch.zeros_like(of_x.bias),
        )
        self.inner = SeparableProduct(
            [Source(inner.depthwise.in_channels, inner.depthwise.weight, inner.depthwise.dilation[0])],
            matrix_of(inner.pointwise),
            inner.pointwise.bias,
        )
        last = matrix_of(gate.ctx_out)
        self.outer = SeparableProduct(
            [Source(outer.depthwise.in_channels, outer.depthwise.weight, outer.depthwise.dilation[0])],
            last @ matrix_of(outer.pointwise),
            last @ outer.pointwise.bias + gate.ctx_out.bias,
        )

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        if g.shape[2:] != x.shape[2:]:  # the interpolation's weights add up to 1: it may as well come first
            g = F.interpolate(g, size=x.shape[2:], mode="bilinear", align_corners=False, antialias=False)
        return x * self.outer(self.inner(self.both(x, g))).sigmoid()
