"""silu after batch normalisation (CPU): one pass over the map for inference, less to keep for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.nn.dilated_depthwise import depthwise, depthwise_affine_silu, takes_kernels
from bti_fast.nn.recomputed import recomputes
from bti_fast.nn.running_statistics import counted_share
from bti_fast.nn.synchronised import synchronises


def normalised_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)) of x (B, C, H, W), for a batch normalisation or whatever stands in its place.

    Without gradients it may overwrite x. With them, autograd would keep the map between the two, which one
    multiplication and one addition give again.
    """
    if not torch.is_grad_enabled():
        line = _line(norm)
        if line is None or not takes_kernels(x, *line):
            return F.silu(norm(x), inplace=True)
        torch.ops.bti_fast_cpu.scaled_silu_(x.permute(0, 2, 3, 1), *line)
        return x
    if not (recomputes(x) and isinstance(norm, nn.BatchNorm2d)) or synchronises(norm):
        return F.silu(norm(x))
    momentum = counted_share(norm) if norm.training else 0.0
    statistics = norm.running_mean, norm.running_var, norm.training, momentum, norm.eps
    return _NormalisedSilu.apply(x, norm.weight, norm.bias, *statistics)[0]


def depthwise_silu(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(conv(x))) for a depthwise convolution; without gradients the map is written once."""
    line = None if torch.is_grad_enabled() else _line(norm)
    y = None if line is None else depthwise_affine_silu(conv, *line, x)
    return normalised_silu(norm, depthwise(conv, x)) if y is None else y


def _line(norm: nn.Module) -> tuple[Tensor | None, Tensor | None] | None:
    """Scale and shift (C,) that the layer applies, None for an identity; no pair where the batch decides."""
    if isinstance(norm, nn.Identity):
        return None, None
    if (
        norm.training
        or not isinstance(norm, nn.BatchNorm2d)
        or norm.running_mean is None
        or norm.weight is None
    ):
        return None
    scale = (norm.running_var + norm.eps).rsqrt_().mul_(norm.weight)
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


class _NormalisedSilu(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, running_mean, running_var, training, momentum, eps):
        y, mean, inverse = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if not training:
            mean, inverse = running_mean.clone(), (running_var + eps).rsqrt()
        return F.silu(y, inplace=True), mean, inverse

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, _, ctx.training, _, ctx.eps = inputs
        _, mean, inverse = output
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_backward(x, weight, bias, mean, inverse)

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            own = (None, None) if ctx.training else (mean, inverse.square().reciprocal() - ctx.eps)
            y = F.silu(F.batch_norm(x, *own, weight, bias, ctx.training, 0.0, ctx.eps))
            learned = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(y, learned, grad, create_graph=True))
            grads = (next(found) if value.requires_grad else None for value in (x, weight, bias))
            return *grads, None, None, None, None, None
        scale = weight * inverse
        shift = bias - mean * scale
        y = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(grad.dtype)
        variance = inverse.square().reciprocal() - ctx.eps  # read in evaluation only, as is the mean
        grads = torch.ops.aten.native_batch_norm_backward(
            torch.ops.aten.silu_backward(grad, y),
            *(x, weight, mean, variance, mean, inverse, ctx.training, ctx.eps),
            list(ctx.needs_input_grad[:3]),
        )
        return *grads, None, None, None, None, None
