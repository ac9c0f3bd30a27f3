"""Which device and how many threads a command computes with."""

from __future__ import annotations

import torch

from bti_fast.errors import UserError
from bti_fast.memory import keep_freed_memory


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device; UserError for cuda where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"--device cuda: {why}; use --device cpu")
    return torch.device(name)


def set_threads(count: int) -> None:
    """Sets torch's CPU threads, 0 leaves them as they are; freed memory is kept for reuse from here on."""
    keep_freed_memory()
    if count:
        torch.set_num_threads(count)
