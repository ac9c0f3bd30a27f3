"""Argument checks shared by the modules: each error names the argument, what was found and what is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_map(name: str, value: Tensor, channels: int) -> None:
    """Raises unless `value` is floating point (B, channels, *spatial), 1 to 3 spatial axes."""
    _check_floating(name, value)
    if value.ndim not in (3, 4, 5) or value.shape[1] != channels:
        raise ValueError(
            f"{name}: found shape {tuple(value.shape)}, "
            f"needed (B, {channels}, *spatial) with 1 to 3 spatial axes"
        )


def check_features(name: str, value: Tensor, seg: Tensor, features: int, *, tokens: bool = False) -> None:
    """TypeError or ValueError unless `value` is (B, features), or tokens (B, M, features) where allowed."""
    _check_floating(name, value)
    ranks = (2, 3) if tokens else (2,)
    if value.ndim not in ranks or value.shape[-1] != features or value.shape[0] != seg.shape[0]:
        also = f" or ({seg.shape[0]}, M, {features})" if tokens else ""
        raise ValueError(
            f"{name}: found shape {tuple(value.shape)}, needed ({seg.shape[0]}, {features}){also}"
        )
    if value.device != seg.device:
        raise ValueError(f"{name}: found device {value.device}, needed {seg.device} like seg")


def check_logits(name: str, value: Tensor, shape: tuple[int, ...], seg: Tensor) -> None:
    """TypeError or ValueError unless `value` is floating point of exactly `shape`, on seg's device."""
    _check_floating(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: found shape {tuple(value.shape)}, needed {shape}")
    if value.device != seg.device:
        raise ValueError(f"{name}: found device {value.device}, needed {seg.device} like seg")


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: found {type(value).__name__}, needed a torch.Tensor")
    if value.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: found {value.dtype}, needed a floating point dtype (float16 to float64)")
