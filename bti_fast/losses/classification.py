"""The diagnosis loss of BTI-Net: focal cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast.losses._common import (
    EPS,
    check_labels,
    full_precision,
    mean_where,
    only_where,
    presence,
    without_autocast,
)


def focal_cross_entropy(
    prob: Tensor, label: Tensor, *, gamma: float = 2.0, nonfinite: str = "keep"
) -> Tensor:
    """Focal cross-entropy of each sample from probabilities, as published: prob (B, L), label (B,) int ->
    (B,).

    Probabilities are clipped to [1e-7, 1 - 1e-7] and renormalised. nonfinite="ten" gives a sample whose
    loss is not finite the value 10, as the published code does; "keep" lets it show.
    """
    if nonfinite not in ("keep", "ten"):
        raise ValueError(f'nonfinite: got {nonfinite!r}, needs "keep" or "ten"')
    prob = prob.clamp(EPS, 1 - EPS)
    prob = prob / prob.sum(1, keepdim=True)
    log_p = prob.gather(1, label.long()[:, None]).squeeze(1).clamp(EPS, 1 - EPS).log()
    loss = _focal(log_p, gamma)
    return (
        torch.where(torch.isfinite(loss), loss, torch.full_like(loss, 10.0)) if nonfinite == "ten" else loss
    )


def classification_loss(
    logits: Tensor, label: Tensor, has_label: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Focal cross-entropy of a batch (SPEC §5), (1 - p)^γ · -log p of the true class, a scalar in fp32
    (fp64 for fp64).

    logits (B, L), L >= 2; label (B,) integers 0..L-1, any value where has_label (B,) bool is False. Samples
    without a label add nothing, and the mean is over the others; 0 if there are none. Computed from logits
    without clipping, so a confident mistake keeps its gradient. NaN logits give a NaN loss. ValueError for
    wrong shapes, dtypes, labels (on the CPU).
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: got {logits.dtype} of shape {tuple(logits.shape)}, needs floats (B, L), L >= 2"
        )
    if gamma < 0:
        raise ValueError(f"gamma: got {gamma}, needs >= 0")
    has = presence(has_label, logits.shape[0], logits.device, "has_label")
    check_labels(label, logits.shape[1], has)
    with without_autocast(logits):
        logits = only_where(has, full_precision(logits))
        index = only_where(has, label.to(logits.device).long())
        log_p = -F.cross_entropy(logits, index, reduction="none")
        return mean_where(has, _focal(log_p, gamma))


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^γ · -log p from log p (B,)."""
    if gamma == 0:
        return -log_p
    # -expm1 keeps 1 - p exact for p near 1; the clamp keeps the gradient of the power finite for γ < 1.
    return (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma * -log_p
