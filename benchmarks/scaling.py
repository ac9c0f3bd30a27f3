"""How the cost grows with the work: exponents fitted to the sweeps, 1.0 being linear."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .rows import PEAK, TIME, Row


@dataclass(frozen=True)
class Fit:
    """``metric`` grows as x to the power ``exponent``; x is what the group sweeps."""

    kernel: str
    provider: str
    mode: str
    metric: str
    group: str
    exponent: float
    points: tuple[tuple[float, float], ...]


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (log x, log y).

    Raises ValueError for fewer than two different x, or values that are not positive.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        raise ValueError("an exponent needs at least two different sizes")
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)


def fits(rows: Iterable[Row]) -> list[Fit]:
    """One fit for each kernel, provider, mode, metric (time, peak memory) and sweep of two sizes or more.

    Times of a busy machine are left out.
    """
    series = defaultdict(dict)
    for row in rows:
        if (
            row.x
            and row.metric in (TIME, PEAK)
            and row.p50
            and row.group.startswith("sweep")
            and not row.busy
        ):
            series[row.kernel, row.provider, row.mode, row.metric, row.group][row.x] = row.p50
    return [
        Fit(*key, exponent(points.items()), tuple(sorted(points.items())))
        for key, points in series.items()
        if len(points) > 1
    ]
