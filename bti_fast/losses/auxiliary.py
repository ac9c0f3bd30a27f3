"""Deep supervision of the auxiliary logits of the "entropy" interaction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast.losses._common import full_precision
from bti_fast.losses.classification import classification_loss
from bti_fast.losses.segmentation import Boundary, class_planes, segmentation_loss

AUXILIARY_WEIGHT = 0.1


def auxiliary_loss(
    aux_seg_logits: Sequence[Tensor],
    aux_cls_logits: Sequence[Tensor],
    mask: Tensor,
    label: Tensor,
    has_mask: Tensor | None = None,
    has_label: Tensor | None = None,
    *,
    boundary: Boundary = "soft",
    task_weights: tuple[float, float] = (1.0, 1.0),
    class_weights: Tensor | None = None,
) -> Tensor:
    """0.1 · (segmentation_loss + classification_loss) summed over the levels (SPEC §5), a scalar.

    aux_seg_logits: (B, K, h, w) a level, aux_cls_logits: (B, L) a level, either possibly empty; the mask
    (B, 1 or K, H, W) is brought to (h, w) by area averaging. task_weights weigh the two losses, class_weights
    are classification_loss's. Without levels the result is a constant 0. Errors as in the two losses.
    """
    total = torch.zeros((), device=mask.device)
    for logits in aux_seg_logits:
        planes = class_planes(mask, logits.shape[1]).to(full_precision(logits).dtype)
        resized = F.interpolate(planes, size=logits.shape[2:], mode="area")
        loss = segmentation_loss(logits, resized, has_mask, boundary=boundary)
        total = total + AUXILIARY_WEIGHT * task_weights[0] * loss
    for logits in aux_cls_logits:
        loss = classification_loss(logits, label, has_label, class_weights=class_weights)
        total = total + AUXILIARY_WEIGHT * task_weights[1] * loss
    return total
