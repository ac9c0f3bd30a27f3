"""The diagnosis loss of BTI-Net: focal cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast.losses._common import (
    EPS,
    check_labels,
    check_tensor,
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


def class_balanced_weights(counts: Sequence[int], beta: float) -> Tensor:
    """Weights (L,) in fp32 of the class-balanced loss from the training cases a class (Cui et al. 2019, eq.
    10).

    Proportional to (1 - β) / (1 - β^n), the inverse effective number of n cases; β = 0 weighs alike, β -> 1
    by 1 / n. Scaled so that their mean over the training cases is 1, which keeps the balance with the mask
    loss; a class without cases weighs 0. ValueError unless 0 <= beta < 1 and some class has cases.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta: got {beta}, needs 0 <= beta < 1")
    number = torch.as_tensor(counts, dtype=torch.float64)
    if number.dim() != 1 or not bool((number >= 0).all()) or not bool((number > 0).any()):
        raise ValueError(f"counts: got {list(counts)}, needs a count a class, some above 0")
    effective = (1 - beta**number) / (1 - beta)
    weights = torch.where(number > 0, 1 / effective.clamp(min=1e-12), torch.zeros_like(number))
    return (weights * number.sum() / (weights * number).sum()).float()


def classification_loss(
    logits: Tensor,
    label: Tensor,
    has_label: Tensor | None = None,
    *,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Focal cross-entropy of a batch (SPEC §5), (1 - p)^γ · -log p of the true class, a scalar in fp32
    (fp64 for fp64).

    logits (B, L), L >= 2; label (B,) integers 0..L-1, any value where has_label (B,) bool is False. Samples
    without a label add nothing, and the mean is over the others; 0 if there are none. class_weights (L,)
    multiply each sample's loss by its class's; the divisor stays the number of samples. Computed from logits
    without clipping, so a confident mistake keeps its gradient. NaN logits give a NaN loss. ValueError for
    wrong shapes, dtypes, labels (on the CPU).
    """
    check_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: got {logits.dtype} of shape {tuple(logits.shape)}, needs floats (B, L), L >= 2"
        )
    if gamma < 0:
        raise ValueError(f"gamma: got {gamma}, needs >= 0")
    if class_weights is not None:
        check_tensor("class_weights", class_weights)
    if class_weights is not None and class_weights.shape != logits.shape[1:]:
        raise ValueError(
            f"class_weights: got shape {tuple(class_weights.shape)}, needs {tuple(logits.shape[1:])}"
        )
    has = presence(has_label, logits.shape[0], logits.device, "has_label")
    check_labels(label, logits.shape[1], has)
    with without_autocast(logits):
        logits = only_where(has, full_precision(logits))
        index = only_where(has, label.to(logits.device).long())
        log_p = -F.cross_entropy(logits, index, reduction="none")
        loss = _focal(log_p, gamma)
        if class_weights is not None:
            loss = loss * class_weights.to(loss)[index]
        return mean_where(has, loss)


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^γ · -log p from log p (B,)."""
    if gamma == 0:
        return -log_p
    # -expm1 keeps 1 - p exact for p near 1; the clamp keeps the gradient of the power finite for γ < 1.
    return (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma * -log_p
