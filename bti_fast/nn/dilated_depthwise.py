"""Dilated depthwise convolution, with a backward for CPUs that libraries lack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dilated_depthwise(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Depthwise 3x3 convolution of x (B, C, H, W) by weight (C, 1, 3, 3) at "same" padding, no bias.

    On a CPU oneDNN has no kernel for the gradients of a dilated depthwise convolution, and its fallback takes
    five to ten times as long as the rest of the layer; there the gradients are put together from fast parts.
    """
    if x.device.type == "cpu" and dilation > 1 and torch.is_grad_enabled():
        return _DilatedDepthwise.apply(x, weight, dilation)
    return convolve(x, weight, dilation)


def convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The convolution as torch has it."""
    return F.conv2d(x, weight, padding=dilation, dilation=dilation, groups=x.shape[1])


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight as far as `needed`: a convolution by the mirrored kernel, and an undilated
    one over phases.

    Computed in the dtype of `grad`, which autocast may have narrowed; given in those of x and weight.
    """
    grad_x = grad_weight = None
    if needed[0]:
        grad_x = convolve(grad, weight.to(grad.dtype).flip(2, 3), dilation).to(x.dtype)
    if needed[1]:
        x = x.to(grad.dtype)
        if dilation > 1:
            x, grad = _phases(x, dilation), _phases(grad, dilation)
        grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=1, groups=x.shape[1])
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight


class _DilatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        return convolve(x, weight, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *gradients(grad, *ctx.saved_tensors, ctx.dilation, ctx.needs_input_grad), None


def _phases(x: Tensor, d: int) -> Tensor:
    """(B, C, H, W) -> (B·d², C, h, w), channels_last: every d-th row and column of each offset, one map each.

    What lies d apart in x lies side by side here. Zeros fill up to h and w of at least 3, as oneDNN is slow
    where the kernel is wider than the map.
    """
    batch, channels, height, width = x.shape
    h, w = max(3, -(-height // d)), max(3, -(-width // d))
    if (height, width) != (h * d, w * d):
        x = F.pad(x, (0, w * d - width, 0, h * d - height))
    rows = x.permute(0, 2, 3, 1).unflatten(2, (w, d)).unflatten(1, (h, d))  # [B, h, d, w, d, C]
    return rows.permute(0, 2, 4, 1, 3, 5).reshape(batch * d * d, h, w, channels).permute(0, 3, 1, 2)
