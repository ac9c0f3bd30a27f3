"""Activation checkpointing that leaves running statistics alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Any], module: nn.Module, *inputs: Any) -> Any:
    """function(*inputs), whose activations are computed again in the backward pass instead of kept.

    Not so where the largest input map has more channels than positions: what is computed over it is little to
    keep and long to compute. Gradients, dropout and the running statistics of `module`, whose layers
    `function` runs, are the same as without. Source: torch.utils.checkpoint, which alone would update running
    statistics twice.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not _worth_it(inputs):
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), statistics_kept(module)),
    )


def _worth_it(inputs: Iterable[Any]) -> bool:
    maps = [x for x in inputs if isinstance(x, Tensor) and x.ndim == 4]
    largest = max(maps, key=Tensor.numel)
    return largest.shape[2] * largest.shape[3] >= largest.shape[1]


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
