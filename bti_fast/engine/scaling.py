"""Loss scaling for fp16."""

from __future__ import annotations

import torch


class FlooredGradScaler(torch.amp.GradScaler):
    """GradScaler whose scale does not fall below 1.

    A batch without variance (constant images) has gradients too large for fp16 at any scale. Its step is
    left out, as it must be, but each such batch halves the scale: after some of them nothing is left of the
    gradients of other batches, and after 166 the scale is 0 and everything NaN.
    """

    FLOOR = 1.0

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(new_scale)
        if self.is_enabled() and self.get_scale() < self.FLOOR:
            super().update(self.FLOOR)
