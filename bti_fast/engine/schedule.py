"""When to lower the step size and when to stop: counters that go into the resume state as plain numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


def cosine_share(progress: float, floor: float) -> float:
    """Share of the first step size at progress in 0..1: a half cosine from 1 to floor."""
    progress = min(max(progress, 0.0), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class Counters:
    """Progress of one stage, updated once an epoch with a score that is better when higher (SPEC §6).

    factor multiplies the step size; it shrinks after `plateau_patience` epochs without progress, then rests
    for `plateau_cooldown` epochs. `stalled` counts the epochs without progress.
    """

    reference: float = -math.inf  # the score that the next progress is measured from
    stalled: int = 0
    waited: int = 0
    cooldown: int = 0
    factor: float = 1.0
    best_score: float = -math.inf
    best_epoch: int = -1

    def update(
        self,
        epoch: int,
        score: float,
        *,
        min_progress: float,
        plateau_factor: float = 1.0,
        plateau_patience: int = 10**9,
        plateau_cooldown: int = 0,
    ) -> bool:
        """Counts one epoch; returns whether its score is the best so far (its weights are to be kept)."""
        if score >= self.reference + min_progress and score > self.reference:
            self.reference, self.stalled, self.waited = score, 0, 0
        else:
            self.stalled += 1
            if self.cooldown > 0:
                self.cooldown -= 1
            else:
                self.waited += 1
            if self.waited >= plateau_patience:
                self.factor *= plateau_factor
                self.waited, self.cooldown = 0, plateau_cooldown
        best = score > self.best_score
        if best:
            self.best_score, self.best_epoch = score, epoch
        return best

    def state_dict(self) -> dict[str, float | int]:
        """All counters as plain numbers."""
        return asdict(self)
