"""Which listed cases can really be used: every image and mask is decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from bti_fast.data.cases import Case, Problem
from bti_fast.data.images import read_image, read_mask
from bti_fast.errors import UserError

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_threads(function: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """Map over items in order with a few threads; Pillow decodes outside the interpreter lock."""
    workers = min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def drop_unusable(cases: Sequence[Case]) -> tuple[tuple[Case, ...], list[Problem]]:
    """Cases whose image and masks decode and agree in size, and what was wrong with the others.

    One bad mask excludes the case: half of a lesion, or a lesion image without its mask, would mislead
    silently.
    """
    problems = in_threads(find_problem, cases)
    usable = tuple(case for case, problem in zip(cases, problems, strict=True) if problem is None)
    return usable, [replace(problem, excluded=True) for problem in problems if problem is not None]


def find_problem(case: Case) -> Problem | None:
    """The first thing that makes a case unusable, or None."""
    try:
        size = read_image(case.image, 1).shape[1:]
    except UserError as cause:
        return Problem(case.image, "unreadable-image", str(cause))
    for path in case.masks:
        try:
            mask = read_mask(path)
        except UserError as cause:
            kind = "mask-values" if "mask values" in str(cause) else "unreadable-mask"
            return Problem(path, kind, str(cause))
        if mask.shape != size:
            return Problem(path, "mask-size", size_message(path, mask.shape, size))
    return None


def size_message(path: object, mask_size: tuple[int, ...], image_size: tuple[int, ...]) -> str:
    """One line naming both sizes as width x height."""
    (mask_h, mask_w), (image_h, image_w) = mask_size, image_size
    return (
        f"{path}: mask is {mask_w} x {mask_h} but its image is {image_w} x {image_h}; needs the image's size"
    )
