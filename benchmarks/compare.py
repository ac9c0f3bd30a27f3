"""Did anything get slower between two tables? Machines differ: peers and a copy tell by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from bti_fast.errors import UserError

from .rows import COPY, COPY_RATE, EXTRA, PEAK, TIME, Row, geometric_mean, together

MEMORY_SLACK = 0.1  # megabytes that are nobody's loss


@dataclass(frozen=True)
class Change:
    """One number of ours in two tables. ``ratio`` is new over old, times divided by ``machine``: how much
    longer the machine takes for this case now, told by ``peers``; without any, times count as they are."""

    old: Row
    new: Row
    ratio: float
    machine: float
    peers: tuple[str, ...]

    @property
    def busy(self) -> bool:
        """One of the two times was taken while others used the processors."""
        return self.old.busy or self.new.busy

    def slower(self, threshold: float) -> bool:
        """True beyond the threshold, such as 0.15, for the median and for the fast fifth of the samples.

        Never for times that were taken on a busy machine, which tell nothing.
        """
        if self.new.metric != TIME:
            return self.ratio > 1 + threshold and self.new.p50 - self.old.p50 > MEMORY_SLACK
        if self.busy:
            return False
        fast = self.new.p20 / self.old.p20 / self.machine
        return min(self.ratio, fast) > 1 + threshold

    def __str__(self) -> str:
        row, unit = self.new, self.new.metric.split()[-1]
        line = f"{row.kernel} {row.size} {row.dtype} {row.layout} {row.mode}, {row.provider}: "
        line += f"{self.old.p50:.4g} -> {row.p50:.4g} {unit}, {self.ratio:.2f}x"
        if row.metric != TIME:
            return f"{line} of {row.metric.split()[0]} memory"
        if not self.peers:
            return f"{line} (no peer in both tables: as measured)"
        return f"{line} against {', '.join(self.peers)}, by which this machine takes {self.machine:.2f}x"


def changes(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """Times and memory of ours that both tables hold, largest growth first.

    Raises UserError where they have no case in common.
    """
    old, new = list(old), list(new)
    copies = [{row.case: row.p50 for row in rows if row.metric == COPY_RATE} for rows in (old, new)]
    found = []
    for metric in (TIME, PEAK, EXTRA):
        before = {row.key: (row, peers) for row, peers in together(old, metric)}
        for row, peers in together(new, metric):
            if row.key not in before:
                continue
            old_row, old_peers = before[row.key]
            common = tuple(name for name in peers if name in old_peers) if metric == TIME else ()
            machine = geometric_mean([peers[n].p50 / old_peers[n].p50 for n in common]) if common else 1.0
            if common and all(row.case in rates for rates in copies):
                # A peer alone misleads: the allocator may serve it otherwise in another process.
                machine = median((machine, copies[0][row.case] / copies[1][row.case], 1.0))
                common += (COPY,)
            # A few hundred bytes of nothing would be an endless ratio.
            base = old_row.p50 if metric == TIME else max(old_row.p50, MEMORY_SLACK)
            value = row.p50 if metric == TIME else max(row.p50, MEMORY_SLACK)
            found.append(Change(old_row, row, value / base / machine, machine, common))
    if not found:
        raise UserError("--compare: the two tables have no case of bti_fast in common")
    return sorted(found, key=lambda change: -change.ratio)


def describe(found: list[Change], threshold: float) -> tuple[list[str], bool]:
    """Lines that say what got slower or larger, then the greatest gains; and whether anything did."""
    worse = [change for change in found if change.slower(threshold)]
    lines = [f"SLOWER  {change}" if change.new.metric == TIME else f"LARGER  {change}" for change in worse]
    better = [c for c in reversed(found) if c.ratio < 1 / (1 + threshold) and not c.busy][:10]
    lines += [f"better  {change}" for change in better]
    if unsure := sum(change.busy for change in found):
        lines.append(f"note: {unsure} times were taken on a busy machine and are not judged")
    pair = found[0].old, found[0].new
    for what in ("device", "torch", "threads"):
        before, after = (getattr(row, what) for row in pair)
        if before != after:
            lines.append(
                f"note: {what} differs ({before} and {after}); only the ratio to the peers means anything"
            )
    count = len({change.new.case for change in found})
    verdict = f"{len(worse)} of {len(found)} numbers of {count} cases grew by more than {threshold:.0%}"
    return [*lines, verdict], bool(worse)
