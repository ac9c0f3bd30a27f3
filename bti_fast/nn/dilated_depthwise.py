"""Depthwise convolution that keeps the size of its map, with the forward and backward that CPUs lack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast import _library
from bti_fast.ops.straight import is_ordinary


def dilated_depthwise(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Depthwise k x k convolution of x (B, C, H, W) by weight (C, 1, k, k) at "same" padding, k odd, no bias.

    On a CPU oneDNN has no kernel for the gradients of a dilated depthwise convolution, and its fallback takes
    five to ten times as long as the rest of the layer; there the gradients are put together from fast parts.
    """
    if torch.is_grad_enabled() and x.device.type == "cpu" and (dilation > 1 or _is_compiled(x, weight)):
        return _DilatedDepthwise.apply(x, weight, dilation)
    return convolve(x, weight, dilation)


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for a depthwise convolution, compiled where that is faster and there is such a form of it."""
    if type(conv) is not nn.Conv2d or not _is_plain(conv):
        return conv(x)
    if conv.bias is None:
        return dilated_depthwise(x, conv.weight, conv.dilation[0])
    return conv(x) if torch.is_grad_enabled() else convolve(x, conv.weight, conv.dilation[0], conv.bias)


def depthwise_affine_silu(
    conv: nn.Conv2d, scale: Tensor | None, shift: Tensor | None, x: Tensor
) -> Tensor | None:
    """silu(scale · conv(x) + shift) in one pass, scale and shift (C,); None where no kernel computes that."""
    if type(conv) is not nn.Conv2d or not _is_plain(conv) or not _is_compiled(x, conv.weight, scale, shift):
        return None
    if conv.bias is not None:
        shift = conv.bias if scale is None else torch.addcmul(shift, conv.bias, scale)
    return _compiled(x, conv.weight, conv.dilation[0], shift, scale, True)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether it is what dilated_depthwise computes, but for the bias."""
    (kernel, width), (dilation, across) = conv.kernel_size, conv.dilation
    square = kernel == width and kernel % 2 == 1 and dilation == across and conv.stride == (1, 1)
    same = conv.padding_mode == "zeros" and conv.padding == (dilation * (kernel // 2),) * 2
    return square and same and conv.groups == conv.in_channels == conv.out_channels


def convolve(x: Tensor, weight: Tensor, dilation: int, bias: Tensor | None = None) -> Tensor:
    """The convolution alone, which autograd knows only where torch computes it."""
    if not torch.is_grad_enabled() and _is_compiled(x, weight):
        return _compiled(x, weight, dilation, bias)
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


def _is_compiled(x: Tensor, weight: Tensor, *channel_values: Tensor | None) -> bool:
    """Whether our kernel computes it: channels_last maps of float32 in two thirds of the library's time."""
    return (
        weight.shape[2:] in ((3, 3), (5, 5))
        and weight.shape[:2] == (x.shape[1], 1)
        and takes_kernels(x, weight, *channel_values)
    )


def _compiled(
    x: Tensor,
    weight: Tensor,
    dilation: int,
    bias: Tensor | None,
    scale: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    taps = weight.flatten(1).T.contiguous()  # [k·k, C]
    return torch.ops.bti_fast_cpu.dilated_depthwise(x, taps, bias, dilation, scale, silu)


def takes_kernels(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the CPU's kernels for dense channels_last maps of float32 take x (B, C, H, W) with these."""
    tensors = [x, *(weight for weight in weights if weight is not None)]
    return (
        x.device.type == "cpu"
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and x.is_contiguous(memory_format=torch.channels_last)
        and is_ordinary(tensors)
        and _library.load("cpu") is None
    )


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
            x, grad = (_phases(maps, dilation, weight.shape[2]) for maps in (x, grad))
        padding = weight.shape[2] // 2
        grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=padding, groups=x.shape[1])
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


def _phases(x: Tensor, d: int, kernel: int) -> Tensor:
    """(B, C, H, W) -> (B·d², C, h, w), channels_last: every d-th row and column of each offset, one map each.

    What lies d apart in x lies side by side here. Zeros fill up to h and w of at least the kernel's, as
    oneDNN is slow where the kernel is wider than the map.
    """
    batch, channels, height, width = x.shape
    h, w = max(kernel, -(-height // d)), max(kernel, -(-width // d))
    if (height, width) != (h * d, w * d):
        x = F.pad(x, (0, w * d - width, 0, h * d - height))
    rows = x.permute(0, 2, 3, 1).unflatten(2, (w, d)).unflatten(1, (h, d))  # [B, h, d, w, d, C]
    return rows.permute(0, 2, 4, 1, 3, 5).reshape(batch * d * d, h, w, channels).permute(0, 3, 1, 2)
