"""Layers that keep less for the backward pass, and compute again there what is cheap (CPU)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bti_fast.nn.dilated_depthwise import convolve, gradients, takes_kernels
from bti_fast.nn.separable_product import pack, product_by

DILATIONS = (1, 2, 4)
SHARE = 16 * 2**20  # bytes of a map: smaller ones cost time, larger ones a tenth of a step's memory


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


def _shares(x: Tensor) -> list[slice]:
    """Samples that are computed together: of large maps few, for what is made on the way is as large as they.

    Not where autograd would follow every share, nor where no kernel of ours takes them as they lie.
    """
    size = x.numel() * x.element_size()
    if size <= 2 * SHARE or torch.is_grad_enabled() or not takes_kernels(x):
        return [slice(None)]
    count = max(1, SHARE * len(x) // size)
    return [slice(first, first + count) for first in range(0, len(x), count)]


def _mix(x: Tensor, kernels: Sequence[Tensor], matrices: Tensor, bias: Tensor) -> Tensor:
    if len(x) and not torch.is_grad_enabled() and takes_kernels(x, *kernels, matrices, bias):
        return torch.ops.bti_fast_cpu.separable_product(
            [x] * len(kernels),
            [kernel.flatten(1).T.contiguous() for kernel in kernels],
            DILATIONS,
            pack(matrices.transpose(1, 2).flatten(2)),  # of [B, C, 3·C]
            x.shape[1],
            *(None, bias.contiguous(), None, None, None, False),
        )
    mixed = None
    for number, (kernel, dilation) in enumerate(zip(kernels, DILATIONS, strict=True)):
        rows = rows_of(convolve(x, kernel, dilation))
        factors = rows, matrices[:, number].transpose(1, 2).to(rows.dtype)
        # In place from the second on: the sum is one map, and nothing needs it for a gradient.
        if number:
            mixed = mixed.baddbmm_(*factors)
        else:
            mixed = torch.baddbmm(bias[:, None].to(rows.dtype), *factors)
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
        *needed, bias_needed = ctx.needs_input_grad
        to_bias = rows_of(grad).sum(1) if bias_needed else None
        shares = _shares(x) if grad.dtype == x.dtype else [slice(None)]
        if len(shares) == 1:
            return *_gradients(grad, x, kernels, matrices, needed), to_bias
        to_x = torch.empty_like(x) if needed[0] else None
        to_kernels, to_matrices = [None] * len(kernels), []
        for share in shares:
            of_x, *of_kernels, of_matrices = _gradients(
                grad[share], x[share], kernels, matrices[share], needed
            )
            if to_x is not None:
                to_x[share] = of_x
            to_kernels = [b if a is None else a.add_(b) for a, b in zip(to_kernels, of_kernels, strict=True)]
            to_matrices.append(of_matrices)
        return to_x, *to_kernels, torch.cat(to_matrices) if needed[-1] else None, to_bias


def _gradients(
    grad: Tensor, x: Tensor, kernels: Sequence[Tensor], matrices: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the kernels and the matrices as far as `needed`."""
    x_needed, *kernels_needed, matrices_needed = needed
    rows = rows_of(grad)
    grad_x, grad_kernels, grad_matrices = None, [], []
    for number, (kernel, dilation) in enumerate(zip(kernels, DILATIONS, strict=True)):
        if matrices_needed:
            spread = rows_of(convolve(x.to(grad.dtype), kernel.to(grad.dtype), dilation))
            grad_matrices.append(torch.bmm(rows.transpose(1, 2), spread))
        if len(x) and not torch.is_grad_enabled() and takes_kernels(grad, matrices):
            grad_spread = product_by(grad, matrices[:, number].transpose(1, 2))
        else:
            grad_spread = maps_of(torch.bmm(rows, matrices[:, number].to(grad.dtype)), x)
        wanted = x_needed, kernels_needed[number]
        part, grad_kernel = gradients(grad_spread, x, kernel, dilation, wanted)
        grad_x = part if grad_x is None else grad_x.add_(part)
        grad_kernels.append(grad_kernel)
    grad_matrices = torch.stack(grad_matrices, 1).to(matrices.dtype) if matrices_needed else None
    return grad_x, *grad_kernels, grad_matrices


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C), a view of channels_last maps."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def maps_of(rows: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W) in the layout of `like`."""
    maps = rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
    return maps.contiguous() if like.is_contiguous() else maps
