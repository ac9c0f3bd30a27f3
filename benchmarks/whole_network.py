"""BTINet in the suite: inference and training steps in fresh processes, with every interaction in turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import quantiles

from . import network
from .rows import PEAK, SKIPPED, TIME, Row, together

INTERACTIONS = ("none", "fixed", "proxy", "entropy", "attention")
PUBLISHED = "proxy"  # the one measured with every provider; the others show what an interaction adds
# In the table, where ours begin alike.
NAMES = {"folded": "bti_fast:folded", "checkpointing": "bti_fast:checkpointing"}
ROUNDS = 2
REPEATS = 3  # in a process, after those to warm up
COMPILE_REASON = "minutes to compile; python -m bti_fast.benchmarks.network --compile measures it"


@dataclass(frozen=True)
class Network:
    """BTINet with one encoder and interaction, for square images of ``side`` pixels."""

    encoder: str
    side: int
    batch: int
    interaction: str
    kernel: str = "BTINet"
    group: str = "network"
    level: int | None = None

    @property
    def size(self) -> str:
        """Encoder, input and interaction."""
        return f"{self.encoder} {self.batch}x3x{self.side}x{self.side} {self.interaction}"

    @property
    def modes(self) -> tuple[str, ...]:
        """A training step needs batch statistics, which one image does not have."""
        return network.MODES if self.batch > 1 else network.MODES[:1]

    def providers(self, mode: str) -> tuple[str, ...]:
        """Who is measured: everybody for the published interaction, else the network as commands run it."""
        return network.PROVIDERS[mode] if self.interaction == PUBLISHED else ("bti_fast",)

    def __str__(self) -> str:
        return f"{self.kernel} {self.size}"


def run(case: Network, mode: str, provider: str, threads: int, repeats: int = REPEATS) -> dict:
    """One fresh process: {"times": seconds, "peak": GiB of resident memory, ...}."""
    flags = ["--encoder", case.encoder, "--size", case.side, "--batch", case.batch, "--threads", threads]
    flags += ["--repeats", repeats]
    return network.in_fresh_process([str(flag) for flag in flags], case.interaction, mode, provider)


def measure_networks(cases: Iterable[Network], threads: int, row: Row) -> Iterator[list[Row]]:
    """The rows of each case and mode; all interactions and providers of a mode run in turns."""
    cases = list(cases)
    for mode in network.MODES:
        times, peaks = defaultdict(list), defaultdict(float)
        taking_part = [case for case in cases if mode in case.modes]
        for _ in range(ROUNDS):
            for case in taking_part:
                for provider in case.providers(mode):
                    found = run(case, mode, provider, threads)
                    times[case, provider] += found["times"]
                    peaks[case, provider] = max(peaks[case, provider], found["peak"])
        for case in taking_part:
            made = replace(row, kernel=case.kernel, mode=mode, size=case.size, group=case.group)
            rows = [replace(made, provider="compile", metric=SKIPPED, note=COMPILE_REASON)]
            for provider in case.providers(mode):
                tenths = quantiles(times[case, provider], n=10, method="inclusive")
                p20, p50, p80 = (1e3 * tenths[i] for i in (1, 4, 7))
                mb = peaks[case, provider] * 2**30 / 1e6
                one = replace(made, provider=NAMES.get(provider, provider))
                samples = len(times[case, provider])
                rows += [
                    replace(one, metric=TIME, p20=p20, p50=p50, p80=p80, samples=samples),
                    replace(one, metric=PEAK, p20=mb, p50=mb, p80=mb),
                ]
            yield rows


def shares(rows: Iterable[Row]) -> list[tuple[Row, float]]:
    """For each row of ours with an interaction: its share of the time, by the difference to "none" in the
    same run."""
    ours = [row for row, _ in together(row for row in rows if row.kernel == "BTINet")]
    base = {
        (row.size.removesuffix(" none"), row.mode, row.provider, row.run): row.p50
        for row in ours
        if row.size.endswith(" none")
    }
    found = []
    for row in ours:
        rest, interaction = row.size.rsplit(" ", 1)
        without = base.get((rest, row.mode, row.provider, row.run))
        if interaction != "none" and without is not None:
            found.append((row, (row.p50 - without) / row.p50))
    return found
