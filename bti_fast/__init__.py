"""Fused, gated exchange between a segmentation and a classification decoder, and BTI-Net on top of it."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "benchmarks",
    "data",
    "engine",
    "errors",
    "kernels",
    "losses",
    "memory",
    "metrics",
    "models",
    "nn",
    "ops",
    "reference",
)


def __getattr__(name: str):
    """Submodules load on first use, so that importing the package needs nothing but Python."""
    if name in _SUBMODULES:
        return importlib.import_module(f"bti_fast.{name}")
    if name == "backend":
        return importlib.import_module("bti_fast.ops.dispatch").backend
    raise AttributeError(f"module 'bti_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, "backend"])
