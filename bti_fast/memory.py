"""Freed memory that stays with the process, so that CPU work does not wait for fresh pages."""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GROWTH = 64 * 2**20


def keep_freed_memory() -> bool:
    """Makes glibc reuse large freed blocks instead of returning them to the system; True where it does.

    By default each tensor above 32 MB gets fresh pages from the kernel, which zeroes every one of them at the
    first touch: a third of BTINet's inference time on two cores at batch 8, and a quarter of a training step.
    The price is that the process keeps its peak of memory until it ends, and a little more: the blocks fit
    together for good only after the first few steps. The commands of `bti-fast` that
    compute on a CPU call this; for a program of your own, call it once before the first large tensor.
    Does nothing (False) without glibc, or where the environment sets MALLOC_ variables of its own.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, GROWTH)))
