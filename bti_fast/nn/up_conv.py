"""The decoders' transposed convolution, and a faster form of it for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.nn.dilated_depthwise import takes_kernels
from bti_fast.nn.pointwise import MANY_POSITIONS, flat_rows
from bti_fast.nn.separable_product import pack, unpack
from bti_fast.ops.straight import is_ordinary

PART = 2**22  # values of taps that are held at a time
# Of the outputs at even rows and columns, at odd columns, at odd rows, at odd rows and columns: taps of the
# input beside them, of the one to its left, above, and above to the left.
_TAPS = (((0, 0), (0, 2), (2, 0), (2, 2)), ((0, 1), (2, 1)), ((1, 0), (1, 2)), ((1, 1),))


class UpConv(nn.ConvTranspose2d):
    """3x3 transposed convolution of stride 2, brought to a given size.

    Its full output has 2n + 1 rows for n. Asked for 2n - 1 to 2n + 1, it drops the last ones: for 2n this is
    the published code's "same" padding, for 2n - 1 it undoes an encoder that rounded an odd size up. Asked
    for another size, which only encoders of other strides do, it interpolates bilinearly.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return _sized(self._at, x, size)

    def _at(self, x: Tensor, height: int, width: int) -> Tensor:
        if _as_products(x, self.weight, self.bias):
            return _UpConv.apply(x, self.weight, self.bias, height, width)
        return super().forward(x)[:, :, :height, :width]

    def folded_form(self) -> nn.Module:
        """The same for inference, see bti_fast.nn.folding."""
        return FoldedUpConv(self)


class FoldedUpConv(nn.Module):
    """UpConv for inference: four products of the map beside itself shifted, each a quarter of the output."""

    def __init__(self, up: UpConv) -> None:
        super().__init__()
        for number, matrix in enumerate(_packed(up.weight.detach())):
            self.register_buffer(f"matrix{number}", matrix)
        self.register_buffer("bias", up.bias.detach())

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return _sized(self._at, x, size)

    def _at(self, x: Tensor, height: int, width: int) -> Tensor:
        matrices = [getattr(self, f"matrix{number}") for number in range(len(_TAPS))]
        channels = matrices[-1].shape[1]
        if x.shape[1] == channels and not x.requires_grad and takes_kernels(x, *matrices, self.bias):
            return torch.ops.bti_fast_cpu.up_conv(x, matrices, self.bias, height, width)
        parts = {
            tap: part
            for taps, matrix in zip(_TAPS, matrices, strict=True)
            for tap, part in zip(taps, unpack(matrix, len(self.bias)).split(channels, 1), strict=True)
        }
        weight = torch.stack([parts[tap] for tap in sorted(parts)]).unflatten(0, (3, 3)).permute(3, 2, 0, 1)
        return F.conv_transpose2d(x, weight, self.bias, stride=2)[:, :, :height, :width]


def _packed(weight: Tensor) -> list[Tensor]:
    """(C, K, 3, 3) -> for each quarter of the output the packed matrix of its taps, (K, taps·C)."""
    return [pack(torch.cat([weight[:, :, down, right].T for down, right in taps], 1)) for taps in _TAPS]


def _sized(up: Callable[[Tensor, int, int], Tensor], x: Tensor, size: Sequence[int]) -> Tensor:
    """up(x, height, width) of a height and width that it can give, brought to `size`."""
    if all(2 * n - 1 <= wanted <= 2 * n + 1 for n, wanted in zip(x.shape[2:], size, strict=True)):
        return up(x, *size)
    out = up(x, *(2 * n for n in x.shape[2:]))
    return F.interpolate(out, size=tuple(size), mode="bilinear", align_corners=False)


def _as_products(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether to multiply and add: for channels_last maps on a CPU this takes two thirds of the library's
    time."""
    return (
        x.dtype == weight.dtype == bias.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
        and is_ordinary((x, weight, bias))
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class _UpConv(torch.autograd.Function):
    """As FoldedUpConv, or where no kernel takes the maps one product for all nine taps, whose results are
    added to every other row and column of the output.

    x (B, C, H, W), weight (C, K, 3, 3), bias (K,) -> (B, K, height, width), channels_last.
    """

    @staticmethod
    def forward(x, weight, bias, height, width):
        if len(x) * x.shape[2] * x.shape[3] >= MANY_POSITIONS and takes_kernels(x, weight, bias):
            return torch.ops.bti_fast_cpu.up_conv(x, _packed(weight), bias, height, width)
        matrix = _matrix(weight)
        shape = len(x), len(bias), height, width
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        sums = out.permute(0, 2, 3, 1).copy_(bias)
        for samples, rows in _parts(x, weight.shape[1]):
            part = x[samples, :, rows]
            products = (flat_rows(part) @ matrix).view(len(part), *part.shape[2:], 9, len(bias))
            for number, at, (high, wide) in _taps(part, rows.start, height, width):
                sums[samples][at] += products[:, :high, :wide, number]
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_gradients_of_library(grad, x, weight, ctx.needs_input_grad), None, None
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        matrix = _matrix(weight)
        grads = grad.permute(0, 2, 3, 1)
        grad_x = torch.empty_like(x) if x_needed else None
        grad_matrix = torch.zeros_like(matrix) if weight_needed else None
        for samples, rows in _parts(x, weight.shape[1]):
            part = x[samples, :, rows]
            products = x.new_empty(len(part), *part.shape[2:], 9, weight.shape[1])
            for number, at, (high, wide) in _taps(part, rows.start, *grad.shape[2:]):
                tap = products[:, :, :, number]
                tap[:, :high, :wide] = grads[samples][at]
                tap[:, high:] = 0  # from here on the tap reaches beyond the output
                tap[:, :, wide:] = 0
            products = products.view(-1, matrix.shape[1])
            if x_needed:
                torch.mm(products, matrix.T, out=flat_rows(grad_x[samples, :, rows]))
            if weight_needed:
                grad_matrix.addmm_(flat_rows(part).T, products)
        grad_weight = None
        if weight_needed:
            grad_weight = grad_matrix.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return grad_x, grad_weight, grads.sum((0, 1, 2)) if bias_needed else None, None, None


def _gradients_of_library(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple:
    """What autograd knows the gradients of. The library wants the last rows that were dropped."""
    missing = [2 * n + 1 - have for n, have in zip(x.shape[2:], grad.shape[2:], strict=True)]
    return torch.ops.aten.convolution_backward(
        F.pad(grad, (0, missing[1], 0, missing[0])),
        x,
        weight,
        [weight.shape[1]],
        *([2, 2], [0, 0], [1, 1], True, [0, 0], 1),
        list(needed[:3]),
    )


def _matrix(weight: Tensor) -> Tensor:
    """(C, K, 3, 3) -> (C, 9·K), a view of a channels_last weight."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _parts(x: Tensor, channels: int) -> Iterator[tuple[slice, slice]]:
    """Samples, and rows of x in them, that make at most PART values of `channels` per tap: many whole maps,
    or rows of one."""
    height, row = x.shape[2], x.shape[3] * 9 * channels
    many, few = max(1, PART // (height * row)), min(height, max(1, PART // row))
    for sample in range(0, len(x), many):
        for start in range(0, height, few):
            yield slice(sample, sample + many), slice(start, min(start + few, height))


def _taps(part: Tensor, start: int, height: int, width: int) -> Iterator[tuple[int, tuple, tuple[int, int]]]:
    """Each tap's number, where it adds to the output (B, height, width, K), and how many rows and columns of
    the part, whose first row is `start`, it takes there."""
    for number in range(9):
        down, right = divmod(number, 3)
        top = 2 * start + down
        high = max(0, min(part.shape[2], (height - top + 1) // 2))
        wide = min(part.shape[3], (width - right + 1) // 2)
        at = slice(None), slice(top, top + 2 * high, 2), slice(right, right + 2 * wide, 2)
        yield number, at, (high, wide)
