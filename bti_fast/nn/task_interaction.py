"""The paper's task interaction (TIM) and uncertainty proxy attention (UPA), in plain PyTorch (SPEC 1.3).

Both hold the parameters that `bti_fast.ops.task_interaction` computes from in fewer passes over the map:
`operator_weights` hands them over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast._export import exportable
from bti_fast.nn.blocks import BN_EPS, BN_MOMENTUM
from bti_fast.nn.checks import check_count, check_features, check_like_weight, check_map
from bti_fast.nn.pointwise import pointwise

PROJECTION = 64  # width of the space in which the two updates are compared
GATE_HIDDEN = 32
MIN_ROWS = 8  # below this many rows scene complexity counts as zero


@exportable
class TaskInteractionOutput(NamedTuple):
    """The two updated features, and the channel mask m (B, C) with which seg was multiplied as 1 + m."""

    seg: Tensor
    cls: Tensor
    mask: Tensor


@exportable
class UncertaintyProxyOutput(NamedTuple):
    """Gated features, gates (B, 2) = [w_seg, w_cls], signals (B, 3) = [alignment, complexity, confidence]."""

    seg: Tensor
    cls: Tensor
    gates: Tensor
    signals: Tensor


class TaskInteraction(nn.Module):
    """Bidirectional exchange between a segmentation map and a classification vector (TIM).

    seg (B, C, *spatial), 1 to 3 spatial axes, C at least 2; cls (B, F). Both keep their shapes.
    Raises TypeError or ValueError naming the argument, what was found and what is needed.
    """

    def __init__(self, seg_channels: int, cls_features: int = 256, *, tau: float = 0.7) -> None:
        super().__init__()
        check_count("seg_channels", seg_channels, 2)
        check_count("cls_features", cls_features, 1)
        self.seg_channels = seg_channels
        self.cls_features = cls_features
        self.tau = tau
        self.s2c_conv = nn.Linear(seg_channels, seg_channels // 2)  # at every position: a 1x1 convolution
        self.s2c_fc = nn.Linear(seg_channels // 2, cls_features)
        self.s2c_bn = nn.BatchNorm1d(cls_features, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.clf_gate = nn.Linear(cls_features, cls_features)
        self.c2s_fc = nn.Linear(cls_features, seg_channels)
        self.seg_gate = nn.Linear(seg_channels, seg_channels)

    def forward(self, seg: Tensor, cls: Tensor) -> TaskInteractionOutput:
        check_map("seg", seg, self.seg_channels)
        check_features("cls", cls, seg, self.cls_features)
        check_like_weight("seg", seg, self.s2c_conv.weight)
        check_like_weight("cls", cls, self.c2s_fc.weight)
        hidden = F.relu(pointwise(self.s2c_conv, seg)).flatten(2)  # [B, C/2, P]
        context = self.s2c_bn(F.relu(self.s2c_fc(hidden.mean(2))))  # [B, F]
        cls_out = cls + self.clf_gate(context).sigmoid() * context
        mean = seg.flatten(2).mean(2)  # [B, C]
        mask = self.tau * self.seg_gate(mean).sigmoid() * self.c2s_fc(cls).sigmoid()  # [B, C]
        seg_out = seg * (1 + _over_positions(mask, seg))
        return TaskInteractionOutput(seg_out, cls_out, mask)


class UncertaintyProxyAttention(nn.Module):
    """Scales what the exchange changed by two gates computed from three proxies of uncertainty (UPA).

    seg_base, seg_enhanced (B, C, *spatial), 1 to 3 spatial axes; cls_base, cls_enhanced (B, F).
    Scene complexity is zero where the rows (second to last axis; the only one of a sequence) are below 8.
    """

    def __init__(self, seg_channels: int, cls_features: int = 256) -> None:
        super().__init__()
        self.seg_channels = seg_channels
        self.cls_features = cls_features
        self.seg_proj = nn.Linear(seg_channels, PROJECTION, bias=False)
        self.clf_proj = nn.Linear(cls_features, PROJECTION, bias=False)
        self.wn_fc1 = nn.Linear(3, GATE_HIDDEN)
        self.wn_fc2 = nn.Linear(GATE_HIDDEN, 2)

    def forward(
        self, seg_base: Tensor, seg_enhanced: Tensor, cls_base: Tensor, cls_enhanced: Tensor
    ) -> UncertaintyProxyOutput:
        check_map("seg_base", seg_base, self.seg_channels)
        if seg_enhanced.shape != seg_base.shape:
            raise ValueError(
                f"seg_enhanced: found shape {tuple(seg_enhanced.shape)}, "
                f"needed {tuple(seg_base.shape)} like seg_base"
            )
        check_features("cls_base", cls_base, seg_base, self.cls_features)
        check_features("cls_enhanced", cls_enhanced, seg_base, self.cls_features)
        seg_change = seg_enhanced - seg_base
        cls_change = cls_enhanced - cls_base
        alignment = _cosine(self.seg_proj(seg_change.flatten(2).mean(2)), self.clf_proj(cls_change))
        confidence = torch.log1p(cls_enhanced.var(1, correction=0))
        signals = torch.stack((alignment, scene_complexity(seg_base), confidence), 1)  # [B, 3]
        gates = self.wn_fc2(F.relu(self.wn_fc1(signals))).sigmoid()  # [B, 2]
        seg = seg_base + _over_positions(gates[:, :1], seg_base) * seg_change
        cls = cls_base + gates[:, 1:] * cls_change
        return UncertaintyProxyOutput(seg, cls, gates, signals)


def scene_complexity(x: Tensor) -> Tensor:  # [B, C, *spatial] -> [B]
    """Mean absolute forward differences along the spatial axes, summed over the axes (UPA signal 2).

    The missing last difference counts as zero in a mean over all C·P; zero for fewer than 8 rows.
    """
    rows = x.shape[-2] if x.ndim > 3 else x.shape[-1]
    total = x.new_zeros(x.shape[0])
    if rows < MIN_ROWS:
        return total
    for axis in range(2, x.ndim):
        total = total + x.diff(dim=axis).abs().flatten(1).sum(1)
    return total / x[0].numel()


def operator_weights(tim: TaskInteraction, upa: UncertaintyProxyAttention):
    """The parameters of both modules as `bti_fast.ops.task_interaction` takes them."""
    from bti_fast.ops import TaskInteractionWeights

    return TaskInteractionWeights(
        conv_weight=tim.s2c_conv.weight,
        conv_bias=tim.s2c_conv.bias,
        fc_weight=tim.s2c_fc.weight,
        fc_bias=tim.s2c_fc.bias,
        bn_weight=tim.s2c_bn.weight,
        bn_bias=tim.s2c_bn.bias,
        bn_mean=tim.s2c_bn.running_mean,
        bn_var=tim.s2c_bn.running_var,
        cls_gate_weight=tim.clf_gate.weight,
        cls_gate_bias=tim.clf_gate.bias,
        prior_weight=tim.c2s_fc.weight,
        prior_bias=tim.c2s_fc.bias,
        seg_gate_weight=tim.seg_gate.weight,
        seg_gate_bias=tim.seg_gate.bias,
        seg_proj=upa.seg_proj.weight,
        cls_proj=upa.clf_proj.weight,
        gate1_weight=upa.wn_fc1.weight,
        gate1_bias=upa.wn_fc1.bias,
        gate2_weight=upa.wn_fc2.weight,
        gate2_bias=upa.wn_fc2.bias,
    )


def _over_positions(v: Tensor, like: Tensor) -> Tensor:
    """A (B, C) vector shaped so that it multiplies every position of the map `like`."""
    return v.reshape(*v.shape, *([1] * (like.ndim - 2)))


def _cosine(
    a: Tensor, b: Tensor
) -> Tensor:  # [B, D], [B, D] -> [B]; zero vectors give zero, as l2_normalize does
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    a_norm = a * (a * a).sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
    b_norm = b * (b * b).sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
    return (a_norm * b_norm).sum(1)
