"""The drop-in exchange between a segmentation decoder and a classification decoder, gated by uncertainty."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast import ops
from bti_fast._export import exportable
from bti_fast.nn.checks import check_count, check_features, check_like_weight, check_logits, check_map
from bti_fast.nn.cross_decoder_attention import CrossDecoderAttention
from bti_fast.nn.headed_fusion import headed_fusion
from bti_fast.nn.running_statistics import counted_share
from bti_fast.nn.synchronised import synchronises
from bti_fast.nn.task_interaction import TaskInteraction, UncertaintyProxyAttention, operator_weights


@exportable
class GatedInteractionOutput(NamedTuple):
    """What an interaction returns.

    seg and cls in the shapes of the inputs; gates (B, 2) = [w_seg, w_cls] in [0, 1]; uncertainty: the three
    signals (B, 3), or the entropy map (B, *spatial), or None; seg_logits (B, K, *spatial) and cls_logits
    (B, L) are the module's own auxiliary logits, or None.
    """

    seg: Tensor
    cls: Tensor
    gates: Tensor
    uncertainty: Tensor | None
    seg_logits: Tensor | None
    cls_logits: Tensor | None


class FixedInteraction(nn.Module):
    """The paper's task interaction without gates: both weights are one (an ablation row)."""

    def __init__(self, seg_channels: int, cls_features: int = 256, *, tau: float = 0.7) -> None:
        super().__init__()
        self.tim = TaskInteraction(seg_channels, cls_features, tau=tau)

    def forward(self, seg: Tensor, cls: Tensor) -> GatedInteractionOutput:
        out = self.tim(seg, cls)
        gates = torch.ones(seg.shape[0], 2, dtype=torch.float32, device=seg.device)
        return GatedInteractionOutput(out.seg, out.cls, gates, None, None, None)


class EntropyExchange(nn.Module):
    """Exchange gated by the entropy of the two predictions (SPEC 1.2 and 3).

    The weights of uncertainty itself are kept positive, so that more uncertainty never lets less through.
    """

    def __init__(self, seg_channels: int, cls_features: int, *, tau: float = 0.7) -> None:
        super().__init__()
        self.tau = tau
        self.prior = nn.Linear(cls_features, seg_channels)
        self.context = nn.Linear(seg_channels, cls_features)
        self.context_gate = nn.Linear(cls_features, cls_features)
        one = torch.tensor(1.0)
        self.raw_alpha = nn.Parameter(torch.log(torch.expm1(one)).repeat(2))  # softplus of it is 1
        self.beta = nn.Parameter(torch.zeros(2))  # [towards seg, towards cls]
        self.gamma = nn.Parameter(torch.zeros(2))

    def forward(
        self, seg: Tensor, cls: Tensor, seg_logits: Tensor | nn.Linear, cls_logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """seg' (B, C, *spatial), cls' (B, F), gates (B, 2), the entropy map (B, *spatial) and the mask logits
        (B, K, *spatial): those given, or those of the head given in their place."""
        coeffs = torch.stack((F.softplus(self.raw_alpha), self.beta, self.gamma), 1)
        to_seg, to_cls = coeffs.unbind()  # each alpha, beta, gamma
        cls_uncertainty = ops.entropy_uncertainty(cls_logits)  # [B]
        prior = self.prior(cls).sigmoid()  # [B, C]
        if isinstance(seg_logits, nn.Linear):
            fused, seg_logits = headed_fusion(seg_logits, seg, prior, cls_uncertainty, to_seg, self.tau)
        else:
            fused = ops.gated_fusion(seg, seg_logits, prior, cls_uncertainty, to_seg, tau=self.tau)
        context = F.relu(self.context(fused.pooled.to(self.context.weight.dtype)))  # [B, F]
        r_cls = _opening(to_cls, cls_uncertainty, fused.mean_uncertainty)  # [B]
        cls_out = cls + (r_cls[:, None] * self.context_gate(context).sigmoid() * context).to(cls.dtype)
        r_seg = _opening(to_seg, fused.uncertainty.flatten(1), cls_uncertainty[:, None]).mean(1)  # [B]
        return fused.x, cls_out, torch.stack((r_seg, r_cls), 1), fused.uncertainty, seg_logits


def _opening(coeffs: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """How far a gate opens, by the receiving side's uncertainty and the giving side's certainty."""
    alpha, beta, gamma = coeffs.unbind()
    return (alpha * own + (beta * (1 - other) + gamma)).sigmoid()


class GatedInteraction(nn.Module):
    """Lets a segmentation map and a classification vector correct each other, as far as they are unsure.

    forward(seg (B, C, *spatial), cls (B, F), seg_logits (B, K, *spatial) = None, cls_logits (B, L) = None),
    1 to 3 spatial axes, gives a GatedInteractionOutput. With attention_heads > 0 cls may be tokens (B, M, F):
    the fusion then reads their mean, and what it adds is added to every token.

    uncertainty="proxy" is the paper's module and ignores logits; "entropy" uses the logits given, or those of
    heads of its own (the linear head needs cls_classes), which it returns for deep supervision.
    Batch statistics are used while the batch normalisation inside is in training mode.
    Raises TypeError or ValueError naming the argument, what was found and what is needed.
    Source: SPEC section 3; BTI-Net (arXiv 2606.29102).
    """

    def __init__(
        self,
        seg_channels: int,
        cls_features: int = 256,
        *,
        uncertainty: str = "proxy",
        attention_heads: int = 0,
        seg_classes: int = 1,
        cls_classes: int | None = None,
        tau: float = 0.7,
    ) -> None:
        super().__init__()
        if uncertainty not in ("proxy", "entropy"):
            raise ValueError(f"uncertainty: found {uncertainty!r}, needed 'proxy' or 'entropy'")
        check_count("seg_channels", seg_channels, 1)
        check_count("cls_features", cls_features, 1)
        check_count("attention_heads", attention_heads, 0)
        check_count("seg_classes", seg_classes, 1)
        if cls_classes is not None:
            check_count("cls_classes", cls_classes, 1)
        self.uncertainty = uncertainty
        self.seg_channels = seg_channels
        self.cls_features = cls_features
        self.seg_classes = seg_classes
        self.cls_classes = cls_classes
        self.tau = tau
        self.attention = (
            CrossDecoderAttention(seg_channels, cls_features, attention_heads) if attention_heads else None
        )
        if uncertainty == "proxy":
            self.tim = TaskInteraction(seg_channels, cls_features, tau=tau)
            self.upa = UncertaintyProxyAttention(seg_channels, cls_features)
        else:
            self.exchange = EntropyExchange(seg_channels, cls_features, tau=tau)
            self.seg_head = nn.Linear(seg_channels, seg_classes)  # at every position
            self.cls_head = nn.Linear(cls_features, cls_classes) if cls_classes is not None else None

    def forward(
        self, seg: Tensor, cls: Tensor, seg_logits: Tensor | None = None, cls_logits: Tensor | None = None
    ) -> GatedInteractionOutput:
        check_map("seg", seg, self.seg_channels)
        check_features("cls", cls, seg, self.cls_features, tokens=self.attention is not None)
        if cls.ndim == 3 and cls.shape[1] == 0:
            raise ValueError("cls: found no token, needed at least one: the fusion reads their mean")
        if self.attention is not None:
            seg, cls = self.attention(seg, cls)
        vector = cls.mean(1) if cls.ndim == 3 else cls  # [B, F]
        if self.uncertainty == "proxy":
            seg_out, vector_out, gates, signals = self._task_interaction(seg, vector)
            auxiliary = (None, None)
        else:
            check_like_weight("cls", vector, self.exchange.prior.weight)
            own = seg_logits is None, cls_logits is None
            given = self._logits(seg, vector, seg_logits, cls_logits)
            seg_out, vector_out, gates, signals, made = self.exchange(seg, vector, *given)
            auxiliary = made if own[0] else None, given[1] if own[1] else None
        cls_out = cls + (vector_out - vector)[:, None] if cls.ndim == 3 else vector_out
        return GatedInteractionOutput(seg_out, cls_out, gates, signals, *auxiliary)

    def _task_interaction(self, seg: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """seg', cls', gates and signals of the paper's module."""
        norm = self.tim.s2c_bn
        if synchronises(norm):
            # The operator knows the statistics of this process's batch alone.
            told = self.tim(seg, vector)
            return self.upa(seg, told.seg, vector, told.cls)
        weights = operator_weights(self.tim, self.upa)
        if not norm.training:
            return ops.task_interaction(seg, vector, weights, tau=self.tau)
        momentum = counted_share(norm)
        return ops.task_interaction(seg, vector, weights, tau=self.tau, training=True, momentum=momentum)

    def _logits(
        self, seg: Tensor, cls: Tensor, seg_logits: Tensor | None, cls_logits: Tensor | None
    ) -> tuple[Tensor | nn.Linear, Tensor]:
        """Both logits as far as they are given; else, for the mask, the head of this module that gives them,
        and for the class what its head gives."""
        if seg_logits is None:
            check_like_weight("seg", seg, self.seg_head.weight)
            seg_logits = self.seg_head
        else:
            check_logits("seg_logits", seg_logits, (seg.shape[0], self.seg_classes, *seg.shape[2:]), seg)
        if cls_logits is None:
            if self.cls_head is None:
                raise ValueError(
                    "cls_logits: found None, needed logits (B, L) or cls_classes at construction"
                )
            cls_logits = self.cls_head(cls)
        else:
            check_logits("cls_logits", cls_logits, (seg.shape[0], self.cls_classes or "L"), seg)
        return seg_logits, cls_logits

    def gate_parameters(self):
        """The parameters that decide how much is let through: what stage 2 of the recipe trains."""
        if self.uncertainty == "proxy":
            yield from self.upa.parameters()
        else:
            yield from (self.exchange.raw_alpha, self.exchange.beta, self.exchange.gamma)
