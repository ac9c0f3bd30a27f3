"""Which device and how many threads a command computes with."""

from __future__ import annotations

import os

import torch

from bti_fast.engine.place import cpu_cores
from bti_fast.errors import UserError
from bti_fast.memory import keep_freed_memory


def choose_device(name: str, number: int | None = None) -> torch.device:
    """auto, cpu or cuda as a device, the GPU of that number; UserError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and number is not None and torch.cuda.is_available():
        torch.cuda.set_device(number)
        return torch.device(name, number)
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"--device cuda: {why}; use --device cpu")
    return torch.device(name)


def prepare_cpu(threads: int, processes: int = 1) -> None:
    """Sets torch's CPU threads, and has freed memory kept for reuse from here on.

    0 threads leaves them as they are, or divides the cores where several processes share this machine.
    """
    keep_freed_memory()
    if not threads and processes > 1:
        threads = max(1, min(torch.get_num_threads(), cpu_cores() // processes))
    if threads:
        torch.set_num_threads(threads)
        if processes > 1:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # else Lightning chooses again
