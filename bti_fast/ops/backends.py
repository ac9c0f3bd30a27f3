"""The parts of backend predicates that all operators share: device, library and Triton availability."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bti_fast import _library
from bti_fast.ops.dispatch import Backend, forced


def reference_backend(forward: Callable, backward: Callable) -> Backend:
    """The plain PyTorch backend, which runs every valid call on every device."""
    return Backend("reference", lambda *inputs: None, forward, backward)


def compiled_backend(name: str, operator: str, limits: Callable[..., str | None]) -> Backend:
    """The backend of the compiled library ``name`` ("cpu" or "cuda").

    ``limits`` takes the operator's forward inputs and names what the library does not support, or None.
    The library's operators are ``bti_fast_<name>::<operator>`` and ``bti_fast_<name>::<operator>_backward``.
    """

    def predicate(*inputs) -> str | None:
        if inputs[0].device.type != name:
            return f"needs {name} tensors, got {inputs[0].device}"
        return _library.load(name) or limits(*inputs)

    namespace = f"bti_fast_{name}"

    @cache
    def kernel(called: str) -> Callable:
        return getattr(getattr(torch.ops, namespace), called).default

    return Backend(
        name,
        predicate,
        lambda *args: kernel(operator)(*args),
        lambda *args: kernel(f"{operator}_backward")(*args),
    )


def triton_backend(
    operator: str,
    limits: Callable[..., str | None],
    forward: Callable | None = None,
    backward: Callable | None = None,
) -> Backend:
    """The backend of ``bti_fast.kernels.<operator>``: CUDA and ROCm tensors, or CPU ones interpreted.

    The launchers there are called as they are, unless ``forward`` and ``backward`` put several together.
    The interpreter finds mistakes in kernels, thousands of times slower than any other backend: it runs where
    it is forced and is never chosen.
    """

    def predicate(*inputs) -> str | None:
        device = inputs[0].device.type
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not (device == "cpu" and interpreted):
            return f"needs cuda tensors (or cpu tensors with TRITON_INTERPRET=1), got {inputs[0].device}"
        if device == "cpu" and forced() != "triton":
            return "Triton's interpreter runs only where it is forced, by bti_fast.backend('triton')"
        return _triton_missing() or limits(*inputs)

    def launcher(name: str) -> Callable:
        return getattr(importlib.import_module(f"bti_fast.kernels.{operator}"), name)

    return Backend(
        "triton",
        predicate,
        on_its_device(forward or (lambda *args: launcher(operator)(*args))),
        on_its_device(backward or (lambda *args: launcher(f"{operator}_backward")(*args))),
    )


def on_its_device(run: Callable) -> Callable:
    """``run`` with its first tensor's device as the current one, which is where Triton launches."""

    def guarded(*args):
        if args[0].device.type != "cuda":
            return run(*args)
        with torch.cuda.device(args[0].device):
            return run(*args)

    return guarded


@cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
        importlib.import_module("bti_fast.kernels")
    except Exception as cause:  # an ABI break or a half-installed Triton raises more than ImportError
        return f"Triton cannot be imported: {type(cause).__name__}: {cause}"
    return None


def no_limits(*inputs) -> None:
    """For backends that run every call of their operator."""
    return None


def narrower_than_float64(*inputs) -> str | None:
    """For backends that compute in float32: they leave float64 to the reference."""
    for value in inputs:
        if isinstance(value, (list, tuple)) and (reason := narrower_than_float64(*value)):
            return reason
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return "float64 is computed by the reference backend only"
    return None
