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
        line = line_of(norm)
        if line is None or not takes_kernels(x, *line):
            return F.silu(norm(x), inplace=True)
        torch.ops.bti_fast_cpu.scaled_silu_(x.permute(0, 2, 3, 1), *line)
        return x
    if not recomputes(x) or not isinstance(norm, nn.BatchNorm2d) or norm.weight is None or synchronises(norm):
        return F.silu(norm(x))
    by_batch = norm.training or norm.running_mean is None
    if by_batch and x.numel() <= x.shape[1]:
        raise ValueError(f"x: found shape {tuple(x.shape)}, needed more than one value per channel")
    moves = norm.training and norm.running_mean is not None
    statistics = (
        norm.running_mean,
        norm.running_var,
        by_batch,
        counted_share(norm) if moves else 0.0,
        norm.eps,
    )
    return _NormalisedSilu.apply(x, norm.weight, norm.bias, *statistics)[0]


def depthwise_silu(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(conv(x))) for a depthwise convolution; without gradients the map is written once."""
    line = None if torch.is_grad_enabled() else line_of(norm)
    y = None if line is None else depthwise_affine_silu(conv, *line, x)
    return normalised_silu(norm, depthwise(conv, x)) if y is None else y


def line_of(norm: nn.Module) -> tuple[Tensor | None, Tensor | None] | None:
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
    return _scale_and_shift(norm.weight, norm.bias, norm.running_mean, (norm.running_var + norm.eps).rsqrt_())


def _scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The normalisation as x · scale + shift, all (C,); inverse is one over the standard deviation."""
    scale = weight * inverse
    return scale, torch.addcmul(bias, mean, scale, value=-1)


class _NormalisedSilu(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, running_mean, running_var, by_batch, momentum, eps):
        if takes_kernels(x, weight, bias, running_mean, running_var):
            return _forward(x, weight, bias, running_mean, running_var, by_batch, momentum, eps)
        y, mean, inverse = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, by_batch, momentum, eps
        )
        if not by_batch:
            mean, inverse = running_mean.clone(), (running_var + eps).rsqrt()
        return F.silu(y, inplace=True), mean, inverse

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, _, ctx.by_batch, _, ctx.eps = inputs
        _, mean, inverse = output
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_backward(x, weight, bias, mean, inverse)

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # for second derivatives
            own = (None, None) if ctx.by_batch else (mean, inverse.square().reciprocal() - ctx.eps)
            y = F.silu(F.batch_norm(x, *own, weight, bias, ctx.by_batch, 0.0, ctx.eps))
            learned = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(y, learned, grad, create_graph=True))
            return *(next(found) if value.requires_grad else None for value in (x, weight, bias)), *nothing
        if x.numel() == 0:  # torch's layer divides by zero
            return *(torch.zeros_like(value) for value in (x, weight, bias)), *nothing
        scale, shift = _scale_and_shift(weight, bias, mean, inverse)
        if x.dtype == grad.dtype and takes_kernels(x, weight, bias):
            return *_backward(grad, x, scale, shift, mean, inverse, ctx.by_batch), *nothing
        y = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(grad.dtype)
        variance = inverse.square().reciprocal() - ctx.eps  # read in evaluation only, as is the mean
        grads = torch.ops.aten.native_batch_norm_backward(
            torch.ops.aten.silu_backward(grad, y),
            *(x, weight, mean, variance, mean, inverse, ctx.by_batch, ctx.eps),
            list(ctx.needs_input_grad[:3]),
        )
        return *grads, *nothing


def _forward(x, weight, bias, running_mean, running_var, by_batch, momentum, eps):
    """What _NormalisedSilu gives, by the kernels."""
    rows = x.permute(0, 2, 3, 1)
    mean, variance = running_mean, running_var
    if by_batch:
        mean, variance = torch.ops.bti_fast_cpu.batch_statistics(rows)
        if running_mean is not None:
            count = x.numel() // x.shape[1]
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / (count - 1)), momentum)  # unbiased, as torch keeps it
    inverse = (variance + eps).rsqrt()
    y = torch.ops.bti_fast_cpu.scaled_silu(rows, *_scale_and_shift(weight, bias, mean, inverse))
    return y.permute(0, 3, 1, 2), mean if by_batch else mean.clone(), inverse


def _backward(grad, x, scale, shift, mean, inverse, by_batch):
    """Gradients of x, weight and bias, by the kernels."""
    grad, rows = (maps.permute(0, 2, 3, 1).contiguous() for maps in (grad, x))
    to_bias, product = torch.ops.bti_fast_cpu.scaled_silu_sums(grad, rows, scale, shift, mean).unbind()
    to_weight = product * inverse
    of_statistics = None, None, None
    if by_batch:
        share = -scale / (x.numel() // x.shape[1])
        of_statistics = mean, share * inverse * to_weight, share * to_bias
    to_x = torch.ops.bti_fast_cpu.scaled_silu_gradient(grad, rows, scale, shift, *of_statistics)
    return to_x.permute(0, 3, 1, 2), to_weight, to_bias
