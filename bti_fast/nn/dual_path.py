"""The passes over the map in attention by channel and by position, each of them one on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast.nn.dilated_depthwise import takes_kernels


def summarised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W) again, its means (B, C) over positions, and (B, 2, H, W): [max, mean] over channels.

    The returned x is for gated() alone: on a CPU the gradient that it gets from there is overwritten.
    """
    if x.numel() == 0 or not takes_kernels(x):
        return x, *_summaries(x)
    return _Summarised.apply(x) if torch.is_grad_enabled() else (x, *_compiled_summaries(x))


def gated(x: Tensor, channel: Tensor, spatial: Tensor, skip: Tensor | None = None) -> Tensor:
    """x (B, C, H, W) · channel (B, C) · spatial (B, 1, H, W); with skip (B, C, H, W): relu(that + skip)."""
    if x.numel() == 0 or not (takes_kernels(x, channel, spatial, skip) and _is_map_like(x, skip)):
        return _gated(x, channel, spatial, skip)
    return (_Gated.apply if torch.is_grad_enabled() else _compiled_gated)(x, channel, spatial, skip)


def _is_map_like(x: Tensor, skip: Tensor | None) -> bool:
    """Whether a kernel takes `skip` beside x."""
    return skip is None or (skip.shape == x.shape and skip.is_contiguous(memory_format=torch.channels_last))


def _summaries(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((2, 3)), torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)


def _gated(x: Tensor, channel: Tensor, spatial: Tensor, skip: Tensor | None) -> Tensor:
    y = x * channel[:, :, None, None] * spatial
    return y if skip is None else F.relu_(y + skip)


def _compiled_summaries(x: Tensor) -> tuple[Tensor, Tensor]:
    pooled, summary = torch.ops.bti_fast_cpu.dual_path_summary(x)
    return pooled, summary.permute(0, 3, 1, 2)


def _compiled_gated(x: Tensor, channel: Tensor, spatial: Tensor, skip: Tensor | None) -> Tensor:
    return torch.ops.bti_fast_cpu.dual_path_gate(x, channel.contiguous(), spatial.contiguous(), skip)


class _Summarised(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.view_as(x), *_compiled_summaries(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[2].detach())

    @staticmethod
    def backward(ctx, grad, grad_pooled, grad_summary):
        x, summary = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            found = torch.autograd.grad(_summaries(x), x, (grad_pooled, grad_summary), create_graph=True)
            return grad + found[0]
        grad = grad.contiguous(memory_format=torch.channels_last)
        rows = [maps.permute(0, 2, 3, 1).contiguous() for maps in (summary, grad_summary)]
        torch.ops.bti_fast_cpu.dual_path_summary_gradient_(
            grad, x, rows[0], grad_pooled.contiguous(), rows[1]
        )
        return grad


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(x, channel, spatial, skip):
        return _compiled_gated(x, channel, spatial, skip)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, channel, spatial, skip = inputs
        ctx.save_for_backward(x, channel, spatial, None if skip is None else output)

    @staticmethod
    def backward(ctx, grad):
        x, channel, spatial, out = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            masked = grad if out is None else grad * (out > 0)
            factor, product = channel[:, :, None, None], masked * x
            to_channel, to_spatial = (product * spatial).sum((2, 3)), (product * factor).sum(1, keepdim=True)
            return masked * factor * spatial, to_channel, to_spatial, None if out is None else masked
        grad = grad.contiguous(memory_format=torch.channels_last)
        *found, grad_skip = torch.ops.bti_fast_cpu.dual_path_gate_gradient(
            grad, x, channel.contiguous(), spatial.contiguous(), out
        )
        return *found, None if out is None else grad_skip
