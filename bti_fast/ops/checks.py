"""Argument checks shared by the operators: messages name it, what it got and what it needs."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(operator: str, name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{operator}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{operator}: {name} must be a dense (strided) tensor, got {value.layout}")


def check_shape(operator: str, name: str, value: Tensor, shape: tuple, meaning: str) -> None:
    """Raises ValueError unless ``value`` has exactly ``shape``; ``meaning`` spells it, as in "(B, C)"."""
    if value.shape != shape:
        raise ValueError(
            f"{operator}: {name} must have shape {meaning} = {tuple(shape)}, got {tuple(value.shape)}"
        )


def check_device(operator: str, name: str, value: Tensor, anchor_name: str, anchor: Tensor) -> None:
    """Raises ValueError unless ``value`` lies on the anchor's device."""
    if value.device != anchor.device:
        raise ValueError(
            f"{operator}: {name} must be on {anchor.device} like {anchor_name}, got {value.device}"
        )


def check_rank(operator: str, name: str, value: Tensor, lowest: int, highest: int, meaning: str) -> None:
    """Raises ValueError unless the number of dimensions lies in lowest..highest."""
    if not lowest <= value.dim() <= highest:
        raise ValueError(
            f"{operator}: {name} must have shape {meaning} ({lowest} to {highest} dimensions), "
            f"got {value.dim()} dimensions: {tuple(value.shape)}"
        )


def check_tau(operator: str, tau: object) -> None:
    """Raises TypeError unless ``tau`` is a plain number."""
    if isinstance(tau, bool) or not isinstance(tau, (int, float, torch.SymFloat)):
        raise TypeError(f"{operator}: tau must be a number, got {type(tau).__name__}")


def check_map(operator: str, name: str, value: object) -> None:
    """Raises unless ``value`` is a feature map (B, C, *spatial) with one to three spatial axes and C >= 1."""
    check_tensor(operator, name, value)
    check_rank(operator, name, value, 3, 5, "(B, C, *spatial) with 1, 2 or 3 spatial axes")
    if value.shape[1] < 1:
        raise ValueError(f"{operator}: {name} needs at least one channel (axis 1), got {tuple(value.shape)}")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; PyTorch refuses the question for the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
