"""The mask loss of BTI-Net: focal Tversky with a size boost, plus a boundary and a texture term.

The parts work on probabilities, on every plane of (B, K, H, W) by itself; the published code is their case
K = 1. `segmentation_loss`, on logits, is what training calls.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast.losses._common import (
    EPS,
    can_look_at,
    check_tensor,
    full_precision,
    mean_where,
    only_where,
    presence,
    without_autocast,
)

TVERSKY_EXPONENT = 0.75
BOUNDARY_WEIGHT = 0.25
TEXTURE_WEIGHT = 0.15
PLANE = (-2, -1)

Boundary = Literal["soft", "hard"]


def curvature_kernel(*, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The filter of the boundary term, (5, 5): (x² - y²) · exp(-(x² + y²) / (2 · 1.25²)), magnitudes
    summing to 1."""
    squares = torch.arange(-2, 3, dtype=torch.float64) ** 2
    y2, x2 = squares[:, None], squares[None, :]
    kernel = (x2 - y2) * torch.exp(-(x2 + y2) / (2 * 1.25**2))
    return (kernel / kernel.abs().sum()).to(dtype=dtype, device=device)


def tversky_index(prob: Tensor, mask: Tensor) -> Tensor:
    """Tversky index with α = β = 0.5, which is the Dice coefficient, of each plane: (B, K, H, W) twice ->
    (B, K)."""
    overlap = (mask * prob).sum(PLANE)
    return (overlap + EPS) / (0.5 * (mask.sum(PLANE) + prob.sum(PLANE)) + EPS)


def soft_iou(prob: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union of probabilities with each plane of the mask, (B, K, H, W) twice -> (B, K); 0
    where the mask is empty."""
    overlap = (mask * prob).sum(PLANE)
    return overlap / (mask.sum(PLANE) + prob.sum(PLANE) - overlap + EPS)


def focal_tversky(prob: Tensor, mask: Tensor) -> Tensor:
    """(1 - Tversky)^0.75 of each plane, (B, K, H, W) twice -> (B, K), in [0, 1]."""
    # Rounding can put the index at or above 1, where the power has no finite gradient.
    return (1 - tversky_index(prob, mask)).clamp(min=EPS) ** TVERSKY_EXPONENT


def boundary_loss(prob: Tensor, mask: Tensor, *, boundary: Boundary = "soft") -> Tensor:
    """Mean absolute difference of the curvature of prediction and mask, (B, K, H, W) twice -> (B, K).

    "hard" thresholds both at 0.5 first, as published, and so has no gradient.
    """
    if boundary == "hard":
        prob, mask = (prob > 0.5).to(prob.dtype), (mask > 0.5).to(mask.dtype)
    elif boundary != "soft":
        raise ValueError(f'boundary: got {boundary!r}, needs "soft" or "hard"')
    kernel = curvature_kernel(dtype=prob.dtype, device=prob.device)
    # The filter is linear: one convolution of the difference serves both.
    return _filter_planes(mask - prob, kernel).abs().mean(PLANE)


def texture_loss(prob: Tensor, mask: Tensor) -> Tensor:
    """Absolute difference of the standard deviations of the horizontal Sobel response of prediction and mask,
    (B, K, H, W) twice -> (B, K)."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=prob.dtype, device=prob.device)

    def spread(x: Tensor) -> Tensor:
        return (_filter_planes(x, sobel).var(PLANE, correction=0) + 1e-8).sqrt()

    return (spread(mask) - spread(prob)).abs()


def lesion_focus(
    prob: Tensor, mask: Tensor, *, boundary: Boundary = "soft", nonfinite: str = "keep"
) -> Tensor:
    """The whole mask loss of each sample from probabilities: prob, mask (B, K, H, W) in [0, 1] -> (B,).

    (1 - Tversky)^0.75 · (1 + exp(-10 · area fraction of the mask)) + 0.25 · boundary + 0.15 · texture, mean
    over the K planes. The published code adds the batch mean of the last two terms to every sample; the
    mean over the batch is the same. nonfinite="zero" takes NaN and Inf probabilities for 0, as the
    published code does; "keep" lets them show in the loss.
    """
    if nonfinite == "zero":
        prob = torch.where(torch.isfinite(prob), prob, torch.zeros_like(prob))
    elif nonfinite != "keep":
        raise ValueError(f'nonfinite: got {nonfinite!r}, needs "keep" or "zero"')
    prob = prob.clamp(EPS, 1 - EPS)
    boost = 1 + torch.exp(-10 * mask.mean(PLANE))
    loss = (
        focal_tversky(prob, mask) * boost
        + BOUNDARY_WEIGHT * boundary_loss(prob, mask, boundary=boundary)
        + TEXTURE_WEIGHT * texture_loss(prob, mask)
    )
    return loss.mean(1)


def segmentation_loss(
    logits: Tensor, mask: Tensor, has_mask: Tensor | None = None, *, boundary: Boundary = "soft"
) -> Tensor:
    """Mask loss of a batch (SPEC §5), a scalar in fp32 (fp64 for fp64 logits).

    logits (B, K, H, W). mask for K = 1: (B, 1, H, W) in [0, 1]. For K > 1 the classes exclude each other
    (softmax): mask is (B, 1, H, W) with class indices 0..K-1 of any dtype, or (B, K, H, W) with a share in
    [0, 1] per class, and the loss is the mean over all K classes, background included, of each class
    against the rest. has_mask (B,) bool: samples without a mask add nothing, and the mean is over the
    others; 0 if there are none. boundary="hard" is the published boundary term, which has no gradient.

    A lesion-free image gets almost no gradient from the Tversky term (its index is 1e-10 whatever is
    predicted): only the other two terms train on it. NaN logits give a NaN loss. ValueError for wrong
    shapes, and on the CPU for mask values out of range.
    """
    check_tensor("logits", logits)
    with without_autocast(logits):
        has, logits, mask = prepare_masks(logits, mask, has_mask)
        return mean_where(has, lesion_focus(probabilities(logits), mask, boundary=boundary))


def prepare_masks(logits: Tensor, mask: Tensor, has_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """has (B,), logits (B, K, H, W) and mask (B, K, H, W), in full precision, missing samples zeroed."""
    check_tensor("mask", mask)
    if logits.dim() != 4 or not logits.is_floating_point():
        raise ValueError(
            f"logits: got {logits.dtype} of shape {tuple(logits.shape)}, needs floats (B, K, H, W)"
        )
    batch, classes = logits.shape[:2]
    size = tuple(logits.shape[2:])
    has = presence(has_mask, batch, logits.device, "has_mask")
    if (
        mask.dim() != 4
        or mask.shape[0] != batch
        or mask.shape[1] not in (1, classes)
        or tuple(mask.shape[2:]) != size
    ):
        needs = " or ".join(str((batch, k, *size)) for k in sorted({1, classes}))
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, needs {needs}")
    mask = only_where(has, mask)
    if can_look_at(mask) and mask.numel():
        highest = classes - 1 if mask.shape[1] != classes else 1
        least, greatest = float(mask.amin()), float(mask.amax())
        slack = 1e-4  # area averages and resampling round
        if not (-slack <= least and greatest <= highest + slack):
            raise ValueError(f"mask: got values {least:g}..{greatest:g}, needs 0..{highest}")
    logits = only_where(has, full_precision(logits))
    return has, logits, class_planes(mask, classes).to(logits.dtype)


def class_planes(mask: Tensor, classes: int) -> Tensor:
    """A mask of class indices (B, 1, H, W) as one plane a class (B, K, H, W); a mask that has planes
    stays."""
    if classes == 1 or mask.shape[1] == classes:
        return mask
    return mask == torch.arange(classes, device=mask.device).view(1, -1, 1, 1)


def probabilities(logits: Tensor) -> Tensor:
    """Logistic function for one class, softmax over axis 1 for more."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _filter_planes(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter every plane of (B, K, H, W) with one odd square kernel, zeros outside, same size."""
    planes = x.flatten(0, 1)
    if not planes.shape[0]:
        return x
    weight = kernel.expand(planes.shape[0], 1, *kernel.shape)
    # One depthwise convolution over the planes as channels: 40 times faster on CPUs than planes as a batch.
    filtered = F.conv2d(planes[None], weight, padding=kernel.shape[-1] // 2, groups=planes.shape[0])
    return filtered.view(x.shape)
