"""Which listed cases can really be used: every image and mask is decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from bti_fast.data.cases import Case, Problem
from bti_fast.data.images import exif_turn, read_image, read_mask
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
    """Cases whose image and masks decode and agree in size, and what was wrong with the others; doubts about
    cases that are used come last.

    One bad mask excludes the case: half of a lesion, or a lesion image without its mask, would mislead
    silently.
    """
    problems = in_threads(find_problem, cases)
    usable = tuple(case for case, problem in zip(cases, problems, strict=True) if problem is None)
    found = [replace(problem, excluded=True) for problem in problems if problem is not None]
    return usable, found + [doubt for doubt in in_threads(find_doubt, usable) if doubt is not None]


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


def find_doubt(case: Case) -> Problem | None:
    """A readable image that its EXIF tag turns, while a mask of the same size has no such tag."""
    turn = exif_turn(case.image) if case.masks else 1
    if turn == 1 or all(exif_turn(path) == turn for path in case.masks):
        return None
    message = (
        f"{case.image}: turned upright by its EXIF tag ({turn}), its mask is not; "
        "right only if the mask was drawn on the upright image"
    )
    return Problem(case.image, "exif-turned", message)


def size_message(path: object, mask_size: tuple[int, ...], image_size: tuple[int, ...]) -> str:
    """One line naming both sizes as width x height."""
    (mask_h, mask_w), (image_h, image_w) = mask_size, image_size
    needs = "needs the image's size"
    if mask_size == image_size[::-1]:
        needs += ", upright as the image's EXIF tag turns it"
    return f"{path}: mask is {mask_w} x {mask_h} but its image is {image_w} x {image_h}; {needs}"
