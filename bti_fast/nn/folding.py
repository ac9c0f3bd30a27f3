"""Inference-only forms of layers: batch normalisation and chains of linear maps merged into fewer products,
weights laid out for them.

Everything here computes what the layers it is made of compute in evaluation mode, up to rounding.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bti_fast.nn.dilated_depthwise import depthwise
from bti_fast.nn.packed import PackedConv1x1, pack_
from bti_fast.nn.recomputed import mixed_scales


def fold(module: nn.Module) -> nn.Module:
    """A copy of `module` in evaluation mode in which every part that has a `fold_` method is folded.

    The copy is for inference: it has no gradients, and its parameters are no longer those of `module`.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be packed
        folded = copy.deepcopy(module).eval().requires_grad_(False)
        for part in list(folded.modules()):
            if hasattr(part, "fold_"):
                part.fold_()
        pack_(folded)
    return folded


def fold_conv(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Convolution and the batch normalisation after it, as one convolution and an identity."""
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def fold_relu(conv: nn.Module, norm: nn.BatchNorm2d) -> tuple[nn.Module, BoundedMap]:
    """Convolution, relu and batch normalisation, as one convolution and a clamp.

    With scale s and shift t of the normalisation, s·relu(z) + t is s·z + t, kept above t where s is positive
    and below t where it is negative.
    """
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    folded = copy.deepcopy(conv)
    folded.weight.data = conv.weight * scale[:, None, None, None]
    folded.bias.data = conv.bias * scale + shift
    infinity = torch.full_like(shift, torch.inf)
    return folded, BoundedMap(
        torch.where(scale < 0, -infinity, shift), torch.where(scale > 0, infinity, shift)
    )


class BoundedMap(nn.Module):
    """(B, C, H, W) clamped to bounds (C,) of each channel."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        super().__init__()
        self.register_buffer("lower", lower[:, None, None])
        self.register_buffer("upper", upper[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(self.lower, self.upper)


class FoldedContextFusion(nn.Module):
    """MultiScaleContextFusion with each pointwise half and the fusion multiplied out beforehand.

    (B, C, H, W) -> (B, C, H, W): three products instead of four, or one of three times the depth.
    """

    def __init__(self, msf: nn.Module) -> None:
        super().__init__()
        branches = (msf.sep_d1, msf.sep_d2, msf.sep_d4)
        self.depthwise = nn.ModuleList(branch.depthwise for branch in branches)
        self.scale_fc1, self.scale_fc2 = msf.scale_fc1, msf.scale_fc2
        fusion = msf.fusion.weight.flatten(1).double()
        products = [fusion @ branch.pointwise.weight.flatten(1).double() for branch in branches]
        biases = [fusion @ branch.pointwise.bias.double() for branch in branches]
        like = msf.fusion.weight
        self.fusion = PackedConv1x1(torch.cat(products, 1)[:, :, None, None].to(like), None)  # [C, 3·C, 1, 1]
        self.register_buffer("biases", torch.stack(biases).to(like))
        self.register_buffer("bias", msf.fusion.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scale_fc2(F.relu(self.scale_fc1(x.mean((2, 3))))).softmax(1)  # [B, 3]
        bias = weights @ self.biases + self.bias  # [B, C]
        if x.shape[2] * x.shape[3] >= x.shape[1]:  # scale the matrices, which are smaller than the maps
            kernels = [conv.weight for conv in self.depthwise]
            matrices = self.fusion.weight.view(x.shape[1], 3, x.shape[1]).transpose(0, 1)
            return mixed_scales(x, kernels, weights[:, :, None, None] * matrices, bias)
        maps = [
            depthwise(conv, x) * weight[:, None, None, None]
            for conv, weight in zip(self.depthwise, weights.unbind(1), strict=True)
        ]
        return self.fusion(torch.cat(maps, 1)).add_(bias[:, :, None, None])
