"""The row that evaluation keeps for each case, and the signals in it that foretell a failure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

FAILURE_IOU = 0.5

# What each signal is, and the factor that turns it so that higher means that a failure is more likely.
SIGNALS: dict[str, int] = {
    "w_seg": 1,  # trained towards 1 - soft IoU, and in "entropy" opened by uncertainty
    "w_cls": 1,  # trained towards 1 - confidence, and in "entropy" opened by uncertainty
    "alignment": -1,  # the two tasks pull the features the same way
    "complexity": 1,  # busy features
    "confidence": -1,  # spread of the class features
    "mask_entropy": 1,
    "class_entropy": 1,
}


class CaseRow(TypedDict):
    """What evaluation knows of one case; plain Python, fit for JSON. None stands for "not known" or "not
    defined"."""

    id: str
    iou: float | None  # 0..1; None without a true mask
    dice: float | None  # 0..1
    sensitivity: float | None  # 0..1; None also where the true mask is empty
    hd95: float | None  # pixels of the original image; None also where both masks are empty
    label: int | None  # index of the true class
    class_prob: list[float]  # one probability a class
    failure_signals: dict[str, float]  # named as in SIGNALS; higher = failure more likely


def failure_signals(
    *,
    gates: Sequence[Sequence[float]] = (),
    proxies: Sequence[Sequence[float]] = (),
    mask_entropy: float | None = None,
    class_entropy: float | None = None,
) -> dict[str, float]:
    """The failure signals of one case, named as in SIGNALS and turned so that higher means failure more
    likely.

    gates: per level [w_seg, w_cls]; proxies: per level SPEC §1.3's [alignment, complexity, confidence];
    both averaged over the levels. mask_entropy: mean over the pixels of entropy_uncertainty(seg_logits);
    class_entropy: that of the class logits. What is not given is not in the result.
    """
    found: dict[str, float] = {}
    for names, levels in ((("w_seg", "w_cls"), gates), (("alignment", "complexity", "confidence"), proxies)):
        for level in levels:
            if len(level) != len(names):
                raise ValueError(f"a level of {'/'.join(names)}: got {len(level)} values, needs {len(names)}")
        if len(levels):
            for position, name in enumerate(names):
                found[name] = sum(float(level[position]) for level in levels) / len(levels)
    for name, value in (("mask_entropy", mask_entropy), ("class_entropy", class_entropy)):
        if value is not None:
            found[name] = float(value)
    return {name: SIGNALS[name] * value for name, value in found.items()}


def check_probabilities(row: Mapping, classes: int | None = None) -> list[float]:
    """The class probabilities of a row; ValueError naming the case unless they are (classes many) finite
    numbers."""
    prob = [float(p) for p in row["class_prob"]]
    if not prob or not all(math.isfinite(p) for p in prob) or classes not in (None, len(prob)):
        needs = "finite probabilities" if classes is None else f"{classes} finite probabilities"
        raise ValueError(f"case {row['id']}: class_prob is {prob}, needs {needs}")
    return prob


def predicted_class(row: Mapping) -> int:
    """Index of the greatest class probability, the first of equals."""
    prob = check_probabilities(row)
    return prob.index(max(prob))


def is_failure(row: Mapping) -> bool | None:
    """Whether the case failed: IoU < 0.5 or a wrong class, judged by what is known of it; None if neither
    is."""
    verdicts = []
    if row["iou"] is not None:
        verdicts.append(row["iou"] < FAILURE_IOU)
    if row["label"] is not None:
        verdicts.append(predicted_class(row) != row["label"])
    return any(verdicts) if verdicts else None
