"""Activation checkpointing that leaves running statistics alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Any], module: nn.Module, *inputs: Any) -> Any:
    """function(*inputs), whose activations are computed again in the backward pass instead of kept.

    Gradients, dropout and the running statistics of `module`, whose layers `function` runs, are the same as
    without. Source: torch.utils.checkpoint, which alone would update running statistics twice.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), statistics_kept(module)),
    )


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within: batch normalisation works on copies of its running statistics, which are dropped afterwards."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kept = [(norm, dict(norm._buffers)) for norm in norms]
    for norm, buffers in kept:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
