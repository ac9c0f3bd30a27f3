"""Options of `pytest benchmarks/`: the cases of `bti-fast benchmark`, each provider timed on its own."""

from __future__ import annotations

import pytest
import torch

from .harness import MODES, Case
from .peers import Choice, providers
from .registry import GROUPS, cases, select
from .whole_network import Network


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bti_fast benchmarks")
    group.addoption("--full", action="store_true", help="every group of cases and every peer")
    group.addoption("--group", action="append", default=[], choices=GROUPS, help="a group (default: levels)")
    group.addoption("--only", action="append", default=[], help="an operator or module, by name")
    group.addoption("--level", type=int, help="one size of the four")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--threads", type=int, default=2, help="CPU threads (default: 2)")
    group.addoption("--compile", choices=("none", "default", "all"), help="as of bti-fast benchmark")


def choice_of(config: pytest.Config) -> Choice:
    """Who is measured besides eager PyTorch and this package."""
    full = config.getoption("--full")
    return Choice(config.getoption("--compile") or ("all" if full else "default"), full)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    groups = config.getoption("--group") or (GROUPS if config.getoption("--full") else ())
    everything = cases(device=config.getoption("--device"))
    chosen = select(everything, config.getoption("--only"), groups, config.getoption("--level"))
    kind = Network if metafunc.function.__name__ == "test_network" else Case
    made = []
    for case in (case for case in chosen if isinstance(case, kind)):
        if kind is Network:
            runs = [(mode, name) for mode in case.modes for name in case.providers(mode)]
        else:
            names = [p.name for p in providers(case, choice_of(config))[0]]
            runs = [(mode, name) for mode in MODES for name in names]
        made += [
            pytest.param(case, mode, name, id=f"{case.group}: {case}, {mode}, {name}") for mode, name in runs
        ]
    metafunc.parametrize(("case", "mode", "provider"), made)


@pytest.fixture(scope="session")
def threads(request: pytest.FixtureRequest) -> int:
    """The threads that everything here runs on."""
    count = request.config.getoption("--threads")
    torch.set_num_threads(count)
    return count


@pytest.fixture
def choice(request: pytest.FixtureRequest) -> Choice:
    return choice_of(request.config)
