"""What the machine can do at most, measured beside the benchmarks: copying and matrix products."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second (read plus written) of a copy, and flop a second of a matrix product."""

    copy: float
    matrix: float

    def floor(self, traffic: float, flop: float) -> float:
        """The seconds that no implementation can beat."""
        return max(traffic / self.copy, flop / self.matrix)


def copier(nbytes: int, device: str = "cpu") -> Callable[[], object]:
    """Copies that many bytes; read plus written, twice as many."""
    source = torch.ones(max(nbytes // 4, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_rate(nbytes: int, device: str = "cpu") -> float:
    """Bytes a second (read plus written) of a copy of ``nbytes``, best of a few."""
    return 2 * nbytes / _best(copier(nbytes, device), device, 9)


def matrix_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Flop a second of a matrix product, best of a few.

    On a CPU in float32 whatever the dtype: it is what the operators accumulate in.
    """
    side, kind = (1024, torch.float32) if device == "cpu" else (8192, dtype)
    a = torch.ones(side, side, device=device, dtype=kind)
    out = torch.empty_like(a)
    return 2 * side**3 / _best(lambda: torch.mm(a, a, out=out), device, 5)


def _best(function: Callable, device: str, repeats: int) -> float:
    sample = sampler(device)
    inner = calls_per_sample(sample(function, 1))
    return min(sample(function, inner) for _ in range(repeats))


def calls_per_sample(seconds: float) -> int:
    """How many calls a sample needs so that reading the clock does not count."""
    return max(1, min(1000, math.ceil(2e-4 / max(seconds, 1e-7))))


def sampler(device: str) -> Callable[[Callable, int], float]:
    """A stopwatch: (function, calls) -> seconds a call. On a GPU by events, with the L2 overwritten before,
    and one call whatever is asked for."""
    if device == "cpu":
        return _cpu_seconds
    flush = torch.empty(512 * 2**20, dtype=torch.int8, device=device)

    def seconds(function: Callable, calls: int) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return seconds


def _cpu_seconds(function: Callable, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls
