"""How every benchmark is measured: correctness first, then interleaved repeats, against measured ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PAPER_LEVELS = (
    (384, 14),
    (192, 28),
    (96, 56),
    (48, 112),
)  # channels, side: the four decoder levels at 224 px
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Benchmark:
    """One operator at one size, with everybody who can compute it.

    ``inputs`` makes fresh tensors; floating-point ones get gradients in mode "forward+backward", except those
    at the positions ``constant``. The traffic is the least that any implementation moves, in bytes.
    """

    operator: str
    size: str
    inputs: Callable[[], list[Tensor]]
    providers: dict[str, Callable[..., tuple[Tensor, ...]]]
    traffic: dict[str, float]
    flop: dict[str, float]
    constant: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One measured line; times in milliseconds, ``ratio`` is the eager median over this one."""

    operator: str
    size: str
    mode: str
    provider: str
    p20: float
    p50: float
    p80: float
    ratio: float
    gigabytes_per_second: float
    roofline: float


@cache
def ceilings(threads: int) -> tuple[float, float]:
    """Copy bandwidth (bytes read plus written a second) and sgemm rate (flop a second) of this machine."""
    source = torch.randn(32 * 2**20)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return bandwidth, 2 * 1024**3 / _best(lambda: torch.mm(a, b))


def _best(function: Callable, repeats: int = 15) -> float:
    function()
    return min(_seconds(function) for _ in range(repeats))


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(benchmark: Benchmark, mode: str, budget: float = 2.0) -> list[Row]:
    """Times every provider of ``benchmark`` in turns for about ``budget`` seconds a provider.

    Raises AssertionError where a provider's result is not the eager reference's.
    """
    runs = {name: _runner(benchmark, call, mode) for name, call in benchmark.providers.items()}
    results = {name: run() for name, run in runs.items()}
    for name, result in results.items():
        for got, expected in zip(result, results["eager"], strict=True):
            torch.testing.assert_close(
                got, expected, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{benchmark.operator}, {n}: {m}"
            )
    samples: dict[str, list[float]] = {name: [] for name in runs}
    slowest = max(_seconds(run) for run in runs.values())
    for _ in range(max(5, min(200, int(budget / max(slowest, 1e-6))))):
        for name, run in runs.items():
            samples[name].append(_seconds(run))
    bandwidth, rate = ceilings(torch.get_num_threads())
    floor = max(benchmark.traffic[mode] / bandwidth, benchmark.flop[mode] / rate)
    eager = statistics.median(samples["eager"])
    rows = []
    for name, times in samples.items():
        p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        rows.append(
            Row(
                benchmark.operator,
                benchmark.size,
                mode,
                name,
                *(1e3 * value for value in (p20, p50, p80)),
                eager / p50,
                benchmark.traffic[mode] / p50 / 1e9,
                floor / p50,
            )
        )
    return rows


def _runner(benchmark: Benchmark, call: Callable, mode: str) -> Callable[[], list[Tensor]]:
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    inputs = benchmark.inputs()
    torch.set_rng_state(generator_state)
    if mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(call(*inputs))

        return forward
    inputs = [
        value.requires_grad_(value.is_floating_point() and i not in benchmark.constant)
        for i, value in enumerate(inputs)
    ]
    wanted = [value for value in inputs if value.requires_grad]
    cotangents = [torch.randn_like(out) for out in call(*inputs)]

    def forward_backward() -> list[Tensor]:
        outputs = call(*inputs)
        grads = torch.autograd.grad(outputs, wanted, cotangents)
        return [*(out.detach() for out in outputs), *grads]

    torch.manual_seed(1)
    cotangents = [torch.randn_like(value) for value in cotangents]
    torch.set_rng_state(generator_state)
    return forward_backward


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    return statistics.geometric_mean(list(values))
