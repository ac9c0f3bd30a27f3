"""What the readers of released data sets share: listing a folder's images, pairing masks with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from bti_fast.data.cases import Problem, natural_key
from bti_fast.data.images import SUFFIXES

_CLUTTER = frozenset({"thumbs.db", "desktop.ini"})


def image_paths(folder: Path, problems: list[Problem]) -> list[Path]:
    """The image files of a folder in natural order; other files become problems, clutter does not."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda p: natural_key(p.name)):
        if path.name.startswith(".") or path.name.lower() in _CLUTTER:
            continue
        if path.suffix.lower() not in SUFFIXES or path.is_dir():
            message = f"{path}: not an image file by its name; ignored"
            problems.append(Problem(path, "unexpected-file", message, excluded=True))
        else:
            found.append(path)
    return found


def by_stem(paths: Iterable[Path], problems: list[Problem]) -> dict[str, Path]:
    """Files by their name without suffix; the second one of a name becomes a problem."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            message = f"{path}: second image of this name beside {found[path.stem].name}; ignored"
            problems.append(Problem(path, "unexpected-file", message, excluded=True))
        else:
            found[path.stem] = path
    return found


def note_orphans(
    masks: Mapping[str, Path | list[Path]], images: Iterable[str], problems: list[Problem]
) -> None:
    """Lists the masks (by the name of their image) that belong to no image."""
    for stem in sorted(masks.keys() - set(images), key=natural_key):
        for path in masks[stem] if isinstance(masks[stem], list) else [masks[stem]]:
            message = f"{path}: mask without an image; ignored"
            problems.append(Problem(path, "orphan-mask", message, excluded=True))


def missing_mask(image: Path) -> Problem:
    """An image whose mask should be there and is not."""
    return Problem(image, "missing-mask", f"{image}: no mask file; used for its class only")


def missing_folder(folder: Path, consequence: str) -> Problem:
    """A folder of the release that is not there, and what follows from that."""
    return Problem(folder, "missing-folder", f"{folder}: folder missing; {consequence}")
