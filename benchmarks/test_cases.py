"""The suite's cases under pytest-benchmark: one test for each case, mode and provider, checked before it is
timed."""

from __future__ import annotations

import pytest
import torch

from .harness import bind
from .measure import prepare
from .peers import EAGER, providers
from .whole_network import run

pytestmark = pytest.mark.timeout(1800)


def test_case(benchmark, request, case, mode, provider, choice, threads):
    device = request.config.getoption("--device")
    torch._dynamo.reset()
    chosen = [p for p in providers(case, choice)[0] if p.name in (EAGER, provider)]
    runs, reasons = prepare(bind(case, mode, device), chosen)
    if provider in reasons:
        pytest.skip(reasons[provider])
    found, call = runs[provider]
    benchmark.group = f"{case}, {mode}"
    benchmark.extra_info.update(traffic=case.traffic[mode], flop=case.flop[mode], threads=threads)

    def once():
        call()
        if device != "cpu":
            torch.cuda.synchronize()

    with found.within():
        benchmark.pedantic(once, rounds=20, iterations=1, warmup_rounds=2)


def test_network(benchmark, case, mode, provider, threads):
    """One fresh process; pytest-benchmark times the whole of it, and extra_info has the steps alone."""
    found = benchmark.pedantic(run, args=(case, mode, provider, threads), rounds=1)
    benchmark.extra_info.update(found)
    assert found["peak"] > 0
