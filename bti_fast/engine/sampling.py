"""Failure signals that take several passes: MC-dropout, and an ensemble of networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from bti_fast.data import Case, read_image
from bti_fast.engine.inference import (
    MASK_THRESHOLD,
    Prediction,
    dropout_passes,
    failure_score,
    network_input,
    predict_images,
    sample_images,
)

# What a set of passes says of a case; each name follows the prefix of its set.
SAMPLED = ("mask_entropy", "class_entropy", "class_information", "mask_disagreement", "failure_score")


def sampled_signals(
    prefix: str, mask_probs: Sequence[np.ndarray], class_probs: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Failure signals of one case from T passes: masks (H, W) and class probabilities (L,) of each.

    Entropy of the mean prediction (pixels and class, 0..1); mutual information of class and pass, 0..1; 1 -
    mean Dice of each pass's mask with the mean's, where two empty masks agree; failure_score of the mean.
    """
    mean_mask = np.mean(mask_probs, axis=0, dtype=np.float64)
    probs = np.asarray(class_probs, dtype=np.float64)
    mean_class = probs.mean(axis=0)
    scale = np.log(len(mean_class))
    total = _entropy(mean_class) / scale
    within = float(np.mean([_entropy(row) for row in probs])) / scale
    consensus = mean_mask > MASK_THRESHOLD
    agreement = [_dice(prob > MASK_THRESHOLD, consensus) for prob in mask_probs]
    values = (
        float(np.mean(_binary_entropy(mean_mask))),
        float(total),
        float(max(total - within, 0.0)),
        1 - float(np.mean(agreement)),
        failure_score(mean_mask, mean_class.tolist()),
    )
    return {f"{prefix}_{name}": value for name, value in zip(SAMPLED, values, strict=True)}


def add_sampled_signals(
    prefix: str,
    members: Sequence[tuple[Any, int]],
    cases: Sequence[Case],
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    device: torch.device,
) -> None:
    """Adds sampled_signals over the members to each row's failure signals.

    A member is a network and its number of passes with dropout, 0 for a single pass without. Every image is
    read once for all.
    """
    for start in range(0, len(cases), batch_size):
        chunk = cases[start : start + batch_size]
        images: dict[int, list[tuple[str, np.ndarray]]] = {}
        found: list[list[Prediction]] = [[] for _ in chunk]
        for model, passes in members:
            channels = model.config["in_channels"]
            if channels not in images:
                images[channels] = [(case.id, read_image(case.image, channels)) for case in chunk]
            shown = {"batch_size": batch_size, "device": device}
            if passes:
                drawn = sample_images(model, images[channels], passes, **shown)
            else:
                drawn = ([one] for one in predict_images(model, images[channels], **shown))
            for of_case, more in zip(found, drawn, strict=True):
                of_case += more
        for row, of_case in zip(rows[start:], found, strict=False):
            masks, classes = [one.mask_prob for one in of_case], [one.class_prob for one in of_case]
            row["failure_signals"].update(sampled_signals(prefix, masks, classes))


def seconds_an_image(
    members: Sequence[tuple[Any, int]], image: np.ndarray, batch_size: int, device: torch.device
) -> float:
    """Wall time of the passes of every member over a batch, over its images, after one pass to warm up.

    The median of three where that takes few passes.
    """

    @torch.inference_mode()
    def once(members: Sequence[tuple[Any, int]]) -> None:
        for model, passes in members:
            channels = model.config["in_channels"]
            picture = image if image.shape[0] == channels else np.repeat(image[:1], channels, axis=0)
            inputs = network_input(model.to(device).eval(), [picture] * batch_size, device)
            if passes:
                dropout_passes(model, inputs, passes)
            else:
                model(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once([(members[0][0], 0)])
    repeats = 3 if sum(passes or 1 for _, passes in members) <= 3 else 1
    return median(_seconds(lambda: once(members)) for _ in range(repeats)) / batch_size


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _entropy(prob: np.ndarray) -> float:
    kept = prob[prob > 0]
    return float(-(kept * np.log(kept)).sum())


def _binary_entropy(prob: np.ndarray) -> np.ndarray:
    clipped = np.clip(prob, 1e-12, 1 - 1e-12)
    return -(clipped * np.log2(clipped) + (1 - clipped) * np.log2(1 - clipped))


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0
