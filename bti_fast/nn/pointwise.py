"""Linear maps at every position of a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.nn.dilated_depthwise import takes_kernels
from bti_fast.nn.separable_product import product_by
from bti_fast.ops.straight import is_transformed

FEW_POSITIONS = 64
MANY_POSITIONS = 1024  # from here on our kernel is worth bringing the matrix into its order


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear at every position of x (B, C, *spatial): (B, linear.out_features, *spatial), channel-major.

    The same as a 1x1 convolution, but read where the map lies: for a single output, as of a mask head, the
    convolution of a CPU takes several times as long.
    """
    weight = linear.weight.expand(x.shape[0], -1, -1)  # [B, K, C]
    return torch.baddbmm(linear.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


def conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for a 1x1 convolution of stride 1; x (B, C, H, W) -> (B, K, H, W).

    Of few positions, as in the deepest maps of one image or behind a pooling, a CPU computes it faster as a
    product: there the weights are the larger operand, which the convolution would pack anew in every call.
    Of more, products give its gradients in three quarters of the library's time.
    """
    if (
        type(conv) is not nn.Conv2d
        or x.ndim != 4
        or x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or is_transformed()  # vmap does not know layouts
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return conv(x)
    if x.shape[0] * x.shape[2] * x.shape[3] <= FEW_POSITIONS:
        rows = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)  # [B, H, W, K]
        return rows.permute(0, 3, 1, 2)
    if torch.is_grad_enabled() and takes_kernels(x, conv.weight, conv.bias):
        return _Conv1x1.apply(x, conv.weight, conv.bias)
    return conv(x)


class _Conv1x1(torch.autograd.Function):
    """A 1x1 convolution of channels_last maps on a CPU.

    x (B, C, H, W), weight (K, C, 1, 1), bias (K,) or None -> (B, K, H, W).
    """

    @staticmethod
    def forward(x, weight, bias):
        return F.conv2d(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() or not takes_kernels(grad, x, weight):  # create_graph=True
            bias_sizes = [len(weight)] if ctx.has_bias else None
            return torch.ops.aten.convolution_backward(
                grad, x, weight, bias_sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(needed)
            )
        rows = flat_rows(grad)
        to_x = to_weight = to_bias = None
        if needed[0]:
            to_x = _product(grad, weight.flatten(1))
        if needed[1]:
            to_weight = torch.mm(rows.T, flat_rows(x)).view(weight.shape)
        if needed[2]:
            to_bias = rows.sum(0)
        return to_x, to_weight, to_bias


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, K, H, W) by (K, C) -> (B, C, H, W), channels_last."""
    batch, _, height, width = x.shape
    if batch * height * width < MANY_POSITIONS:
        return torch.mm(flat_rows(x), matrix).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return product_by(x, matrix.T)


def flat_rows(x: Tensor) -> Tensor:
    """Channels_last (B, C, H, W), or some rows of one sample, -> (B·H·W, C), a view."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
