"""Argument checks shared by the modules: each error names the argument, what was found and what is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from bti_fast.ops.checks import autocasts


def check_map(name: str, value: Tensor, channels: int) -> None:
    """Raises unless `value` is floating point (B, channels, *spatial), 1 to 3 spatial axes."""
    _check_floating(name, value)
    if value.ndim not in (3, 4, 5) or value.shape[1] != channels:
        raise ValueError(
            f"{name}: found shape {tuple(value.shape)}, "
            f"needed (B, {channels}, *spatial) with 1 to 3 spatial axes"
        )


def check_count(name: str, value: object, least: int) -> None:
    """TypeError or ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: found {value!r}, needed an integer of at least {least}")
    if value < least:
        raise ValueError(f"{name}: found {value}, needed at least {least}")


def check_like_weight(name: str, value: Tensor, weight: Tensor) -> None:
    """Raises unless a layer with `weight` takes `value`: the same device and, without autocast, dtype."""
    if value.device != weight.device:
        raise ValueError(f"{name}: found device {value.device}, needed {weight.device} like the parameters")
    if value.dtype != weight.dtype and (value.dtype == torch.float64 or not autocasts(value.device)):
        raise TypeError(
            f"{name}: found {value.dtype}, needed {weight.dtype} like the parameters, or autocast"
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


def check_logits(name: str, value: Tensor, shape: tuple[int | str, ...], seg: Tensor) -> None:
    """TypeError or ValueError unless `value` is floating point of `shape`, on seg's device.

    A letter in `shape` is a number of classes, 1 or more, that may be any.
    """
    _check_floating(name, value)
    found = tuple(value.shape)
    if len(found) != len(shape) or any(
        n < 1 if isinstance(needed, str) else n != needed for n, needed in zip(found, shape, strict=True)
    ):
        raise ValueError(f"{name}: found shape {found}, needed ({', '.join(map(str, shape))})")
    if value.device != seg.device:
        raise ValueError(f"{name}: found device {value.device}, needed {seg.device} like seg")


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: found {type(value).__name__}, needed a torch.Tensor")
    if value.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: found {value.dtype}, needed a floating point dtype (float16 to float64)")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: found {value.layout}, needed a dense (strided) tensor")
