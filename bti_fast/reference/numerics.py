"""What every reference shares: the dtype it accumulates in and its gradient by differentiation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def vjp(function: Callable, primals: tuple, cotangents) -> tuple:
    """Gradients of the primals (tensors or lists of tensors) for the outputs' cotangents."""
    return torch.func.vjp(function, *primals)[1](cotangents)
