"""Dropout whose random numbers cost a CPU less than the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bti_fast.ops.straight import is_ordinary

LEVELS = 2**16  # that 16 random bits tell apart
MANY = 2**14  # values, below which it does not matter


class Dropout(nn.Dropout):
    """nn.Dropout. Of large maps on a CPU it judges each value by 16 random bits, in a quarter of the time,
    and keeps a byte of each for the backward pass instead of four.

    The rate is then p to within 2**-17, and what is left is scaled by what that rate leaves.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * LEVELS)
        rows = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        if (
            not self.training
            or self.inplace
            or not 0 < dropped < LEVELS
            or x.device.type != "cpu"
            or x.numel() < MANY
            or not is_ordinary((x,))
            or not (x.is_contiguous() or rows.is_contiguous())
        ):
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2
        kept = kept.view(x.shape) if x.is_contiguous() else kept.view(rows.shape).permute(0, 3, 1, 2)
        return torch.where(kept, x, 0) * (LEVELS / (LEVELS - dropped))
