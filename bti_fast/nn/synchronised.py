"""Batch normalisation with the statistics of the batches of all processes together, on a CPU too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bti_fast.nn.running_statistics import counted_share


class SynchronisedBatchNorm(_BatchNorm):
    """What torch.nn.SyncBatchNorm is for GPUs alone: one batch over all processes of the default group.

    The processes may hold batches of different sizes, also of one sample. In evaluation mode, and where there
    is one process, it is the usual layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            share = counted_share(self)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(variance.to(self.running_var.dtype), share)
        return y


def synchronise(model: nn.Module, device: torch.device) -> None:
    """Makes every batch normalisation in `model` a synchronised one, in place; parameters and names stay.

    On a GPU it is torch's. A subclass keeps what it does around its `super().forward`.
    """
    shared = nn.SyncBatchNorm if device.type == "cuda" else SynchronisedBatchNorm
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(
            module, (nn.SyncBatchNorm, SynchronisedBatchNorm)
        ):
            own = type(module)
            # The shared forward stands behind the class's own, so ReluBatchNorm still calls relu first.
            module.__class__ = type(f"Synchronised{own.__name__}", (own, shared), {})
            module.process_group = None


def synchronises(norm: nn.Module) -> bool:
    """Whether a layer now normalises with statistics of more than this process's batch."""
    return norm.training and isinstance(norm, (nn.SyncBatchNorm, SynchronisedBatchNorm))


class _Normalise(torch.autograd.Function):
    """x (B, C, ...) -> normalised x, and mean and unbiased variance (C,) in float64 over all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        count, mean, variance = joint_statistics(x)
        if count < 2:
            raise ValueError(f"batch normalisation: found {count} value a channel in training, needed 2")
        if weight is None:
            weight = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        used = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, *used)
        ctx.count, ctx.eps = count, eps
        y = torch.native_batch_norm(x, weight, bias, *used, False, 0.0, eps)[0]
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, variance = ctx.saved_tensors
        inverse = (variance + ctx.eps).rsqrt()
        # As in evaluation, with constant statistics: it also gives the two sums that their gradients need.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, inverse, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack((grad_bias, grad_weight)).double()
        dist.all_reduce(sums)
        offset, slope = (sums / ctx.count).to(weight.dtype) * (weight * inverse)
        slope = slope * inverse
        offset = (offset - mean * slope).view(-1, *[1] * (x.dim() - 2))
        grad_x = grad_x - torch.addcmul(offset, x, slope.view(offset.shape)).to(grad_x.dtype)
        # Of this process's samples alone: whoever averages gradients over the processes adds them up.
        needed = ctx.needs_input_grad
        return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None


def joint_statistics(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Values a channel, their mean and biased variance (C,) in float64, over the x (B, C, ...) of all
    processes; each needs at least one sample."""
    axes = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), axes, correction=0)
    count = mean.new_full((1,), x.numel() // x.shape[1])
    own = torch.cat((mean, variance, count)).double()
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    means, variances, counts = torch.stack(found).split([x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    joint = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - joint).square())).sum(0) / total
    return int(total), joint, spread
