"""How batch normalisation moves its running statistics, for layers that compute it by other means."""

from __future__ import annotations

from torch import nn


def counted_share(norm: nn.Module) -> float:
    """Counts a batch of training, and gives how far the running statistics move towards it: the layer's
    momentum, or where that is None what makes them the mean over all batches."""
    norm.num_batches_tracked.add_(1)
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
