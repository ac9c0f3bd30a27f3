"""What autograd gives and keeps, for the tests of layers with a backward pass of their own."""

from __future__ import annotations

import torch


def with_gradients(out, inputs, cotangent):
    """A result, and the gradients of what it was computed from."""
    return out.detach(), *torch.autograd.grad(out, inputs, cotangent)


def bytes_kept(function) -> int:
    """Bytes of distinct tensors that autograd keeps."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t
    ):
        function()
    return sum(t.numel() * t.element_size() for t in kept.values())
