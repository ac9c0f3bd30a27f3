"""Layers that keep less for the backward pass, and compute again there what is cheap (CPU)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bti_fast.nn.dilated_depthwise import convolve, gradients

DILATIONS = (1, 2, 4)


def recomputes(x: Tensor) -> bool:
    """Whether layers over x recompute: where memory is the CPU's, and no compiler decides what to keep."""
    return torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()


def mixed_scales(x: Tensor, kernels: Sequence[Tensor], matrices: Tensor, bias: Tensor) -> Tensor:
    """Sum over r of matrices[b, r] · depthwise_r(x)[b, :, p] + bias[b], with dilations 1, 2 and 4.

    x (B, C, H, W), kernels three of (C, 1, 3, 3), matrices (B, 3, C, C), bias (B, C) -> (B, C, H, W).
    Autograd would keep the three depthwise maps, which take a twentieth of the time of the products.
    """
    if recomputes(x):
        return _MixedScales.apply(x, *kernels, matrices, bias)
    return _mix(x, kernels, matrices, bias)


def _mix(x: Tensor, kernels: Sequence[Tensor], matrices: Tensor, bias: Tensor) -> Tensor:
    mixed = None
    for number, (kernel, dilation) in enumerate(zip(kernels, DILATIONS, strict=True)):
        rows = rows_of(convolve(x, kernel, dilation))
        factors = rows, matrices[:, number].transpose(1, 2).to(rows.dtype)
        # In place from the second on: the sum is one map, and nothing needs it for a gradient.
        mixed = mixed.baddbmm_(*factors) if number else torch.baddbmm(bias[:, None].to(rows.dtype), *factors)
    return maps_of(mixed, x)


class _MixedScales(torch.autograd.Function):
    @staticmethod
    def forward(x, kernel1, kernel2, kernel4, matrices, bias):
        return _mix(x, (kernel1, kernel2, kernel4), matrices, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx, grad):
        x, *kernels, matrices = ctx.saved_tensors
        x_needed, *kernels_needed, matrices_needed, bias_needed = ctx.needs_input_grad
        rows = rows_of(grad)
        grad_x, grad_kernels, grad_matrices = None, [], []
        for number, (kernel, dilation) in enumerate(zip(kernels, DILATIONS, strict=True)):
            if matrices_needed:
                spread = rows_of(convolve(x.to(grad.dtype), kernel.to(grad.dtype), dilation))
                grad_matrices.append(torch.bmm(rows.transpose(1, 2), spread))
            grad_spread = maps_of(torch.bmm(rows, matrices[:, number].to(grad.dtype)), x)
            needed = x_needed, kernels_needed[number]
            part, grad_kernel = gradients(grad_spread, x, kernel, dilation, needed)
            grad_x = part if grad_x is None else grad_x.add_(part)
            grad_kernels.append(grad_kernel)
        grad_matrices = torch.stack(grad_matrices, 1).to(matrices.dtype) if matrices_needed else None
        return grad_x, *grad_kernels, grad_matrices, rows.sum(1) if bias_needed else None


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C), a view of channels_last maps."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def maps_of(rows: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W) in the layout of `like`."""
    maps = rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
    return maps.contiguous() if like.is_contiguous() else maps
