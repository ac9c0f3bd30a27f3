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
        and is_ordinary(tensors)  # x may be anything before this, and vmap does not know layouts
        and x.is_contiguous(memory_format=torch.channels_last)
        and _library.load("cpu") is None
    )


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight as far as `needed`, that of x as a convolution by the mirrored kernel.

    Computed in the dtype of `grad`, which autocast may have narrowed; given in those of x and weight.
    """
    grad_x = grad_weight = None
    if x.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous(memory_format=torch.channels_last)  # a mean's, say, is spread without memory
    if needed[0]:
        grad_x = convolve(grad, weight.to(grad.dtype).flip(2, 3), dilation).to(x.dtype)
    if needed[1]:
        grad_weight = _weight_gradient(grad, x, weight, dilation).to(weight.dtype)
    return grad_x, grad_weight


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    maps = grad, x
    if dilation > 1 and x.dtype != torch.float64:  # worth two copies: oneDNN takes 2 to 15 times as long
        maps = [value.float().contiguous(memory_format=torch.channels_last) for value in maps]
    if not torch.is_grad_enabled() and all(_is_compiled(value, weight.float()) for value in maps):
        taps = torch.ops.bti_fast_cpu.dilated_depthwise_weight(*maps, weight.shape[2], dilation)  # [k·k, C]
        return taps.T.contiguous().view(weight.shape)
    padding = dilation * (weight.shape[2] // 2)
    return torch.nn.grad.conv2d_weight(
        x.to(grad.dtype), weight.shape, grad, padding=padding, dilation=dilation, groups=x.shape[1]
    )


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
