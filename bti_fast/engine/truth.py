"""What is known of a case, at the size of its own image."""

from __future__ import annotations

import numpy as np

from bti_fast.data import Case, read_mask


def true_mask(case: Case, size: tuple[int, int]) -> np.ndarray | None:
    """The united masks of a case, bool (H, W) of the given size; None where its mask is not known."""
    if not case.mask_known:
        return None
    mask = np.zeros(size, dtype=bool)
    for path in case.masks:
        mask |= read_mask(path)
    return mask
