"""The rows that every benchmark ends as: one number with its case, provider, spread, machine and versions."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from bti_fast.engine.files import output_folder, write_csv
from bti_fast.errors import UserError

TIME, PEAK, EXTRA, SKIPPED = "ms", "peak MB", "extra MB", "skipped"
MAIN_PEERS = "eager", "reference", "compile", "compile max-autotune", "best sdpa"
BUSY_NOTE = "busy machine"  # begins the note of rows whose times are not to be trusted
COPY, COPY_RATE = "copy", "GB/s"  # the ceiling measured beside every case: provider and metric
MACHINE = "machine"  # the kernel under which the ceilings stand


@dataclass(frozen=True)
class Row:
    """One line of a table. ``metric`` names the unit of p20, p50 and p80: "ms", "peak MB" (above the inputs),
    "extra MB" (above inputs and results), "GB/s" or "GFLOP/s" (the machine's ceilings), or "skipped", where
    ``note`` says why. ``gb_per_s`` counts the least bytes that anybody moves, ``flop_per_byte`` the least
    work for each of them, and ``roofline`` is the share of what the ceilings allow. ``x`` is what a sweep
    varies. ``run`` tells which rows were measured together."""

    kernel: str
    provider: str
    mode: str
    metric: str
    size: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    gb_per_s: float | None = None
    roofline: float | None = None
    flop_per_byte: float | None = None
    dtype: str = "float32"
    layout: str = "contiguous"
    group: str = "levels"
    level: int | None = None
    x: float | None = None
    samples: int | None = None
    device: str = ""
    threads: int = 0
    bti_fast: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""
    run: str = ""
    note: str = ""

    @property
    def case(self) -> tuple:
        """What was computed, apart from who did; a machine's ceilings belong to their run."""
        if self.kernel == MACHINE:
            return self.kernel, self.size, self.mode, self.run
        return self.kernel, self.size, self.dtype, self.layout, self.group, self.threads, self.mode

    @property
    def key(self) -> tuple:
        """What the row is about: a later row of the same key replaces it."""
        return *self.case, self.provider, self.metric

    @property
    def busy(self) -> bool:
        """A time that was taken while others used the processors."""
        return self.metric == TIME and self.note.startswith(BUSY_NOTE)

    @property
    def ours(self) -> bool:
        """Measured on this package, not on a peer."""
        return self.provider.split(":")[0] == "bti_fast"


COLUMNS = [field.name for field in fields(Row)]
_NUMBERS = {
    "float | None": float,
    "int | None": int,
    "int": int,
}


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def save(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Adds the rows to a CSV file, in the place of those of the same cases; all that the file holds now."""
    kept = read(path) if path.exists() else []
    new = list(rows)
    merged = {row.key: row for row in kept}
    # A case is measured anew as a whole: an old peer beside a new row of ours would be no comparison.
    again = {row.case for row in new}
    merged = {key: row for key, row in merged.items() if row.case not in again} | {r.key: r for r in new}
    output_folder(path.parent)
    write_csv(path, [_cells(row) for row in merged.values()], COLUMNS)
    return list(merged.values())


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; UserError naming the file and what is wrong with it."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise UserError(
                    f"{path}: not a benchmark table; columns missing: {', '.join(sorted(missing))}"
                )
            return [_row(cells) for cells in reader]
    except OSError as cause:
        raise UserError(f"{path}: cannot be read ({cause.strerror or cause})") from cause
    except (ValueError, UnicodeDecodeError) as cause:
        if isinstance(cause, UserError):
            raise
        raise UserError(f"{path}: not a benchmark table ({cause})") from cause


def _cells(row: Row) -> dict:
    return {
        name: f"{value:.6g}" if isinstance(value, float) else value
        for name, value in ((name, getattr(row, name)) for name in COLUMNS)
    }


def _row(cells: dict[str, str]) -> Row:
    values = {}
    for column in fields(Row):
        text, number = cells[column.name], _NUMBERS.get(column.type)
        values[column.name] = text if number is None else (number(text) if text else None)
    return Row(**values)


def together(rows: Iterable[Row], metric: str = TIME) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Every row of ours with the peers measured beside it in the same run."""
    groups = defaultdict(dict)
    for row in rows:
        if row.metric == metric:
            groups[(row.case, row.run)][row.provider] = row
    for group in groups.values():
        peers = {name: row for name, row in group.items() if not row.ours}
        for row in group.values():
            if row.ours:
                yield row, peers


@dataclass(frozen=True)
class Gain:
    """How many times faster than a peer, over the cases of one kernel, group and mode."""

    kernel: str
    group: str
    mode: str
    provider: str
    peer: str
    mean: float  # geometric
    worst: float
    worst_size: str
    cases: int


def gains(rows: Iterable[Row], peers: Iterable[str] = MAIN_PEERS) -> list[Gain]:
    """Geometric means of the peers' times over ours, for each kernel, group, mode and provider of ours.

    The peer "best sdpa" is the fastest of the attention calls that people use, at each size. Sweeps do not
    count: their sizes are chosen for another purpose.
    """
    ratios = defaultdict(list)
    for row, found in together(rows):
        if not row.group.startswith("sweep"):
            for name, peer in with_best_sdpa(found).items():
                if name in peers:
                    key = row.kernel, row.group, row.mode, row.provider, name
                    ratios[key].append((peer.p50 / row.p50, row.size))
    return [
        Gain(*key, geometric_mean(ratio for ratio, _ in found), *min(found), len(found))
        for key, found in ratios.items()
    ]


def with_best_sdpa(peers: dict[str, Row]) -> dict[str, Row]:
    """The peers, and under "best sdpa" the fastest of those that are attention calls."""
    calls = [row for name, row in peers.items() if name.startswith("sdpa")]
    return {**peers, "best sdpa": min(calls, key=lambda row: row.p50)} if calls else peers


@dataclass(frozen=True)
class Loss:
    """A case at which a peer was faster; ``ratio`` (below 1) is its time over ours."""

    row: Row
    peer: Row
    ratio: float
    within_spread: bool  # the spreads p20 to p80 overlap


def losses(rows: Iterable[Row]) -> list[Loss]:
    """Every case at which a peer was faster than the best choice of ours, worst first."""
    found = []
    for row, peers in together(rows):
        for peer in peers.values():
            if peer.p50 < row.p50:
                found.append(Loss(row, peer, peer.p50 / row.p50, row.p20 <= peer.p80))
    return sorted(found, key=lambda loss: loss.ratio)
