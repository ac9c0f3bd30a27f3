"""How the weights of the two task losses move over the epochs of stage 1."""

from __future__ import annotations


def loss_weights(epoch: int) -> tuple[float, float]:
    """Return (w_seg, w_cls) of an epoch counted from 0.

    0.82 / 0.18, moving by 0.007 an epoch up to 0.92 / 0.08; from epoch 15 on 0.80 / 0.20 (SPEC §6). The two
    sum to 1. ValueError for a negative epoch.
    """
    if epoch < 0:
        raise ValueError(f"epoch counts from 0, got {epoch}")
    w_seg = 0.80 if epoch >= 15 else min(0.82 + 0.007 * epoch, 0.92)
    return w_seg, 1.0 - w_seg
