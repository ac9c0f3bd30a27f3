"""What the losses share: argument checks, fp32 under autocast, and means over the samples that have their
truth."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7


def full_precision(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which convolutions on x's device keep the dtype of their inputs."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def check_tensor(name: str, value: object) -> None:
    """TypeError unless value is a tensor: None and NumPy arrays are taken for one most easily."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")


def presence(has: Tensor | None, batch: int, device: torch.device, name: str) -> Tensor:
    """has as a bool (B,) tensor on device; None means that every sample has its truth."""
    if has is None:
        return torch.ones(batch, dtype=torch.bool, device=device)
    check_tensor(name, has)
    if has.dtype != torch.bool or has.shape != (batch,):
        raise ValueError(
            f"{name}: got {has.dtype} of shape {tuple(has.shape)}, needs torch.bool of shape ({batch},)"
        )
    return has.to(device)


def only_where(has: Tensor, x: Tensor) -> Tensor:
    """x (B, ...) with the samples that has (B,) leaves out set to 0.

    Done before any arithmetic, so that whatever a missing sample holds (NaN too) reaches neither value nor
    gradient.
    """
    return torch.where(has.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros((), dtype=x.dtype, device=x.device))


def mean_where(has: Tensor, per_sample: Tensor) -> Tensor:
    """Mean of per_sample (B,) over the samples in has (B,); an exact 0 that still carries a graph if there
    is none."""
    return only_where(has, per_sample).sum() / has.sum().clamp(min=1)


def can_look_at(x: Tensor) -> bool:
    """Whether reading values of x costs neither a device synchronisation nor a graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_labels(label: Tensor, classes: int, has: Tensor) -> None:
    """ValueError for labels of a wrong shape or dtype, or (where looking costs no device sync) out of
    range."""
    check_tensor("label", label)
    if (
        label.dim() != 1
        or label.shape != has.shape
        or label.dtype.is_floating_point
        or label.dtype == torch.bool
    ):
        raise ValueError(
            f"label: got {label.dtype} of shape {tuple(label.shape)}, needs integers of {tuple(has.shape)}"
        )
    if can_look_at(label) and can_look_at(has):
        wrong = has & ((label < 0) | (label >= classes))
        if bool(wrong.any()):
            raise ValueError(f"label: got {int(label[wrong][0])}, needs 0..{classes - 1}")
