"""Measuring a case: correctness once, then interleaved repeats against ceilings measured beside them."""

from __future__ import annotations

import gc
import platform
import random
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

import bti_fast

from .ceilings import Ceilings, calls_per_sample, copier, copy_rate, matrix_rate, sampler
from .harness import Bound, Case, Provider, bind, check, poisoned_memory, runner
from .memory import peak_memory
from .peers import EAGER, Choice, isa_in_use, providers
from .rows import BUSY_NOTE, COPY, COPY_RATE, EXTRA, MACHINE, PEAK, SKIPPED, TIME, Row

ROUNDS = 5, 200  # fewest and most timed repeats
MIB = 2**20
BUSY = 0.05  # of the time, waited for a processor; an idle machine has about 0.01, equal rivals 0.7


@dataclass(frozen=True)
class Settings:
    """How a run measures: device "cpu" or "cuda", threads, and about so many seconds for each provider."""

    device: str = "cpu"
    threads: int = 2
    seconds: float = 0.4
    choice: Choice = Choice()
    memory: bool = True


def blank(settings: Settings) -> Row:
    """A row with nothing measured yet: the machine, the versions and the moment."""
    now = datetime.now(timezone.utc)
    return Row(
        *[""] * 5,
        device=device_name(settings.device),
        threads=settings.threads if settings.device == "cpu" else 0,
        bti_fast=bti_fast.__version__,
        torch=torch.__version__,
        commit=commit(),
        date=now.isoformat(timespec="seconds"),
        run=f"{now:%Y%m%dT%H%M%S}-{time.monotonic_ns() % 10**6:06d}",
    )


def device_name(device: str) -> str:
    """What the numbers belong to: the GPU, or the processor with its cores and instruction set."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":")[1].strip()
            for line in information.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads, {isa_in_use()}"


def commit() -> str:
    """The commit of this checkout, with a plus where the code has changed since; empty outside of one."""
    root = Path(__file__).resolve().parents[1]
    ask = lambda *what: subprocess.run(["git", *what], cwd=root, capture_output=True, text=True)  # noqa: E731
    try:
        head = ask("rev-parse", "--short=10", "HEAD")
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", "bti_fast", "csrc", "kernels")
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else ""


def waited() -> float:
    """Seconds that this process's threads have waited for a processor so far; 0 where Linux does not say."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(thread.read_text().split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
    return nanoseconds / 1e9


def machine_rows(when: str, settings: Settings, row: Row) -> list[Row]:
    """The ceilings of the machine now: ``when`` is "before" or "after" the cases."""
    rows = []
    for nbytes in (2 * MIB, 128 * MIB):
        speed = copy_rate(nbytes, settings.device) / 1e9
        size = f"{nbytes // MIB} MiB"
        made = replace(
            row, kernel=MACHINE, provider=COPY, mode=when, metric=COPY_RATE, size=size, group=MACHINE
        )
        rows.append(replace(made, p20=speed, p50=speed, p80=speed))
    speed = matrix_rate(settings.device) / 1e9
    made = replace(made, provider="matrix product", metric="GFLOP/s", size="float32")
    return [*rows, replace(made, p20=speed, p50=speed, p80=speed)]


def measure(case: Case, mode: str, settings: Settings, row: Row) -> list[Row]:
    """Times everybody who can compute ``case`` in turns, and their memory; ``row`` is blank.

    Raises WrongResult where eager PyTorch or this package gives wrong numbers; a peer that fails or is wrong
    becomes a row that says so.
    """
    torch._dynamo.reset()  # else code for several sizes gathers behind one function, up to a limit
    row = replace(
        row,
        kernel=case.kernel,
        mode=mode,
        size=case.size,
        dtype=str(case.dtype).removeprefix("torch."),
        layout=case.layout,
        group=case.group,
        level=case.level,
        x=case.x,
    )
    chosen, absent = providers(case, settings.choice)
    bound = bind(case, mode, settings.device)
    runs, reasons = prepare(bound, chosen)
    skipped = [
        replace(row, provider=name, metric=SKIPPED, note=reason)
        for name, reason in (absent | reasons).items()
    ]
    # The ceiling is a copy of the largest input in turns with the others, through caches in the same state.
    nbytes = max(value.nbytes for value in bound.inputs)
    copy = Provider(COPY, copier(nbytes, settings.device))
    lost, start = waited(), time.perf_counter()
    samples = interleaved({**runs, COPY: (copy, copy.call)}, settings)
    lost = (waited() - lost) / (time.perf_counter() - start)
    if settings.device == "cpu" and lost > BUSY:
        row = replace(row, note=f"{BUSY_NOTE}: others had its processors for {lost:.0%} of the time")
    rates = [2 * nbytes / seconds for seconds in samples.pop(COPY)]
    ceilings = Ceilings(median(rates), matrix_rate(settings.device, case.dtype))
    p20, p50, p80 = (rate / 1e9 for rate in _quantiles(rates))
    found = [replace(row, provider=COPY, metric=COPY_RATE, p20=p20, p50=p50, p80=p80, samples=len(rates))]
    found += [_timed(row, case, name, times, ceilings) for name, times in samples.items()]
    if settings.memory:
        for name, (provider, run) in runs.items():
            with provider.within():
                peak, extra = peak_memory(run, settings.device)
            for metric, value in ((PEAK, peak), (EXTRA, max(extra, 0))):
                mb = value / 1e6
                found.append(replace(row, provider=name, metric=metric, p20=mb, p50=mb, p80=mb))
    gc.collect()
    return found + skipped


def prepare(
    bound: Bound, chosen: list[Provider]
) -> tuple[dict[str, tuple[Provider, Callable]], dict[str, str]]:
    """Runs everybody once and checks the numbers: {name: (provider, run)} and {name: why it takes no part}.

    Raises WrongResult where eager PyTorch or this package gives wrong numbers.
    """
    runs, reasons, eager = {}, {}, []
    for provider in chosen:
        run = runner(bound, provider)
        essential = provider.ours or provider.name == EAGER
        try:
            with (
                warnings.catch_warnings(),
                provider.within(),
                poisoned_memory() if provider.ours else nullcontext(),
            ):
                warnings.simplefilter("ignore")
                got = run()
            eager = eager or got
            check(bound, provider, got, eager)
        except Exception as cause:  # a peer may fail in any way, and is then listed
            if essential:
                raise
            reasons[provider.name] = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        else:
            runs[provider.name] = provider, run
    return runs, reasons


def interleaved(runs: dict[str, tuple[Provider, Callable[[], list[Tensor]]]], settings: Settings) -> dict:
    """Seconds a call of everybody, taken in turns, so that a slow moment of the machine meets all alike.

    Each round has an order of its own: who follows somebody that uses little memory finds warmer caches.
    """
    sample = sampler(settings.device)
    inner, slowest = {}, 0.0
    for name, (provider, run) in runs.items():
        with provider.within():
            run()
            seconds = min(sample(run, 1) for _ in range(2))
        inner[name] = calls_per_sample(seconds)
        slowest = max(slowest, seconds * inner[name])
    fewest, most = ROUNDS
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, shuffled = list(runs), random.Random(0)
    gc.disable()
    try:
        for _ in range(max(fewest, min(most, int(settings.seconds / max(slowest, 1e-6))))):
            shuffled.shuffle(names)
            for name in names:
                provider, run = runs[name]
                with provider.within():
                    samples[name].append(sample(run, inner[name]))
    finally:
        gc.enable()
    return samples


def _timed(row: Row, case: Case, name: str, times: list[float], ceilings: Ceilings) -> Row:
    p20, p50, p80 = _quantiles(times)
    traffic = case.traffic[row.mode]
    return replace(
        row,
        provider=name,
        metric=TIME,
        p20=1e3 * p20,
        p50=1e3 * p50,
        p80=1e3 * p80,
        gb_per_s=traffic / p50 / 1e9,
        roofline=ceilings.floor(traffic, case.flop[row.mode]) / p50,
        flop_per_byte=case.flop[row.mode] / traffic,
        samples=len(times),
    )


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
