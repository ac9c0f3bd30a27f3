"""Peak memory of a call: what it allocates through torch above what was there before."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_memory(run: Callable[[], list[Tensor]], device: str = "cpu") -> tuple[int, int]:
    """(peak bytes above the inputs, the same without the bytes of the results).

    Counted are tensors, saved activations and the scratch buffers of the compiled libraries, which torch
    allocates; a library's own vectors of a few kilobytes a sample are not seen.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        cpu = [ProfilerActivity.CPU]
        with _quiet(), profile(activities=cpu, profile_memory=True, acc_events=True) as recorded:
            results = run()
        events = recorded.profiler.kineto_results.events()
        steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        peak = current = 0
        for _, step in steps:
            current += step
            peak = max(peak, current)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in results}
    return peak, peak - sum(storages.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library announces its start and stop on the standard error, whatever is asked of it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
