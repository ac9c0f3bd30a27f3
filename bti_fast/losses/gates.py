"""The gate loss of stage 2: every level's gates against how difficult the sample is at present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bti_fast.losses._common import (
    check_tensor,
    full_precision,
    mean_where,
    only_where,
    presence,
    without_autocast,
)
from bti_fast.losses.segmentation import prepare_masks, probabilities, soft_iou

GATE_EPS = 1e-6

# Or a function of difficulties (B,) and who has one (B,) bool -> (B,).
Scaling = Literal["rank", "minmax"] | Callable[[Tensor, Tensor], Tensor]


def rank_scale(difficulty: Tensor, has: Tensor | None = None) -> Tensor:
    """Rank of each value (B,) among those in has (B,) bool, from 0 (least) to 1 (greatest); ties share
    their mean rank.

    A single value has no rank and stays as it is (a difficulty already lies in [0, 1]). Values outside has
    give 0.
    """
    has = presence(has, difficulty.shape[0], difficulty.device, "has")
    among = has[None, :] & has[:, None]
    below = (among & (difficulty[None, :] < difficulty[:, None])).sum(1)
    tied = (among & (difficulty[None, :] == difficulty[:, None])).sum(1)
    count = has.sum()
    rank = ((below + 0.5 * (tied - 1)) / (count - 1).clamp(min=1)).to(difficulty.dtype)
    # NaN equals nothing, itself included, and stays NaN rather than take a rank.
    return only_where(has, torch.where((count > 1) & ~difficulty.isnan(), rank, difficulty))


def minmax_scale(difficulty: Tensor, has: Tensor | None = None) -> Tensor:
    """The published scaling of difficulties (B,): 1 at the greatest of those in has (B,) bool, 0 at the
    least.

    A single value, or all equal, gives 1, an open gate. The result is kept 1e-6 inside [0, 1]; values
    outside has give 0.
    """
    has = presence(has, difficulty.shape[0], difficulty.device, "has")
    least = torch.where(has, difficulty, torch.inf).amin()
    greatest = torch.where(has, difficulty, -torch.inf).amax()
    spread = greatest - least
    scaled = 1 - torch.where(spread > 0, (greatest - difficulty) / spread, torch.zeros_like(difficulty))
    return only_where(has, scaled.clamp(GATE_EPS, 1 - GATE_EPS))


SCALINGS = {"rank": rank_scale, "minmax": minmax_scale}


def gate_cross_entropy(gate: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of gates against targets of the same shape, elementwise, the gates kept 1e-6
    inside [0, 1]."""
    gate = gate.clamp(GATE_EPS, 1 - GATE_EPS)
    return -(target * gate.log() + (1 - target) * torch.log1p(-gate))


def gate_targets(
    seg_logits: Tensor,
    mask: Tensor,
    cls_logits: Tensor,
    has_mask: Tensor | None = None,
    has_label: Tensor | None = None,
    *,
    scaling: Scaling = "rank",
) -> tuple[Tensor, Tensor]:
    """Difficulty targets (B,) for w_seg and for w_cls, in [0, 1], without gradient; 0 where the truth is
    missing.

    For w_seg 1 - soft IoU (for K > 1 classes its mean over the classes present in the mask), for w_cls 1 -
    greatest class probability, each scaled within the batch over the samples that have the truth.
    """
    if not callable(scaling) and scaling not in SCALINGS:
        raise ValueError(f'scaling: got {scaling!r}, needs "rank" or "minmax"')
    scale = scaling if callable(scaling) else SCALINGS[scaling]
    with torch.no_grad(), without_autocast(seg_logits):
        seg_has, seg_logits, mask = prepare_masks(seg_logits, mask, has_mask)
        present = mask.flatten(2).amax(2) > 0
        iou = (soft_iou(probabilities(seg_logits), mask) * present).sum(1) / present.sum(1).clamp(min=1)
        cls_has = presence(has_label, cls_logits.shape[0], cls_logits.device, "has_label")
        confidence = only_where(cls_has, full_precision(cls_logits)).softmax(1).amax(1)
        return scale(1 - iou, seg_has), scale(1 - confidence, cls_has)


def gate_loss(
    gates: Sequence[Tensor],
    seg_logits: Tensor,
    mask: Tensor,
    cls_logits: Tensor,
    label: Tensor | None = None,
    has_mask: Tensor | None = None,
    has_label: Tensor | None = None,
    *,
    scaling: Scaling = "rank",
) -> Tensor:
    """Gate loss of stage 2 (SPEC §5), the sum of the two `gate_losses`, with their arguments and errors."""
    seg, cls = gate_losses(gates, seg_logits, mask, cls_logits, has_mask, has_label, scaling=scaling)
    return seg + cls


def gate_losses(
    gates: Sequence[Tensor],
    seg_logits: Tensor,
    mask: Tensor,
    cls_logits: Tensor,
    has_mask: Tensor | None = None,
    has_label: Tensor | None = None,
    *,
    scaling: Scaling = "rank",
) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy over levels and samples of w_seg, and that of w_cls, two scalars in fp32.

    gates: one (B, 2) tensor [w_seg, w_cls] in [0, 1] a level; seg_logits, mask and has_mask as in
    segmentation_loss; cls_logits (B, L); the class itself is not looked at (a difficulty is 1 - confidence),
    but has_label (B,) bool leaves samples out. scaling="rank": targets are ranks within the batch; "minmax"
    is the published scaling, under which a batch of one always asks for open gates; a function is for batches
    of which this process sees a part. Gradients reach the gates only. ValueError where there are no gates.
    """
    if not len(gates):
        raise ValueError(
            'gates: got none, needs one (B, 2) tensor a level (interaction="none" has no gates to train)'
        )
    check_tensor("seg_logits", seg_logits)
    check_tensor("cls_logits", cls_logits)
    batch = seg_logits.shape[0]
    for level, gate in enumerate(gates):
        check_tensor(f"gates[{level}]", gate)
        if gate.shape != (batch, 2):
            raise ValueError(f"gates[{level}]: got shape {tuple(gate.shape)}, needs ({batch}, 2)")
    if cls_logits.dim() != 2 or cls_logits.shape[0] != batch:
        raise ValueError(f"cls_logits: got shape {tuple(cls_logits.shape)}, needs ({batch}, L)")
    seg_target, cls_target = gate_targets(seg_logits, mask, cls_logits, has_mask, has_label, scaling=scaling)
    seg_has = presence(has_mask, batch, seg_logits.device, "has_mask")
    cls_has = presence(has_label, batch, cls_logits.device, "has_label")
    with without_autocast(seg_logits):
        stacked = torch.stack([full_precision(gate) for gate in gates])
        w_seg = torch.where(seg_has, stacked[..., 0], 0.5)
        w_cls = torch.where(cls_has, stacked[..., 1], 0.5)
        seg = mean_where(seg_has, gate_cross_entropy(w_seg, seg_target).mean(0))
        return seg, mean_where(cls_has, gate_cross_entropy(w_cls, cls_target).mean(0))
