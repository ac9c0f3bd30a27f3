"""Inference-only forms of layers: batch normalisation and chains of linear maps merged into fewer products.

Everything here computes what the layers it is made of compute in evaluation mode, up to rounding.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bti_fast.nn.dilated_depthwise import depthwise
from bti_fast.nn.recomputed import maps_of, mixed_scales, rows_of


def fold(module: nn.Module) -> nn.Module:
    """A copy of `module` in evaluation mode in which every part that has a `fold_` method is folded.

    The copy is for inference: it has no gradients, and its parameters are no longer those of `module`.
    """
    folded = copy.deepcopy(module).eval().requires_grad_(False)
    for part in list(folded.modules()):
        if hasattr(part, "fold_"):
            part.fold_()
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

    (B, C, H, W) -> (B, C, H, W): three products instead of four.
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
        self.register_buffer("matrices", torch.stack(products).to(like))  # [3, C, C]
        self.register_buffer("biases", torch.stack(biases).to(like))
        self.register_buffer("bias", msf.fusion.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scale_fc2(F.relu(self.scale_fc1(x.mean((2, 3))))).softmax(1)  # [B, 3]
        bias = weights @ self.biases + self.bias  # [B, C]
        if x.shape[2] * x.shape[3] >= x.shape[1]:  # scale the matrices, which are smaller than the maps
            kernels = [conv.weight for conv in self.depthwise]
            return mixed_scales(x, kernels, weights[:, :, None, None] * self.matrices, bias)
        mixed = bias.repeat_interleave(x.shape[2] * x.shape[3], 0)  # [B·P, C]
        for number, conv in enumerate(self.depthwise):
            rows = rows_of(depthwise(conv, x)) * weights[:, number, None, None]
            mixed = mixed.addmm_(rows.flatten(0, 1), self.matrices[number].T)
        return maps_of(mixed.unflatten(0, (x.shape[0], -1)), x)
