"""Dilated depthwise convolution, with a backward for CPUs that libraries lack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dilated_depthwise(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Depthwise 3x3 convolution of x (B, C, H, W) by weight (C, 1, 3, 3) at "same" padding, no bias.

    On a CPU oneDNN has no kernel for the gradients of a dilated depthwise convolution, and its fallback takes
    five to ten times as long as the rest of the layer; there the gradients are put together from fast parts.
    """
    if x.device.type == "cpu" and dilation > 1 and torch.is_grad_enabled() and weight.requires_grad:
        return _DilatedDepthwise.apply(x, weight, dilation)
    return _convolve(x, weight, dilation)


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.conv2d(x, weight, padding=dilation, dilation=dilation, groups=x.shape[1])


class _DilatedDepthwise(torch.autograd.Function):
    """x's gradient is a convolution by the mirrored kernel, the weight's an undilated one over phases."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolve(x, weight, dilation)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad, weight.to(grad.dtype).flip(2, 3), ctx.dilation).to(x.dtype)
        grad_weight = torch.nn.grad.conv2d_weight(
            _phases(x.to(grad.dtype), ctx.dilation),  # autocast may have computed in a narrower dtype
            weight.shape,
            _phases(grad, ctx.dilation),
            padding=1,
            groups=x.shape[1],
        )
        return grad_x, grad_weight.to(weight.dtype), None


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
