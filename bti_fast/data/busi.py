"""BUSI in the layout of its release (Al-Dhabyani et al. 2020, doi:10.1016/j.dib.2019.104863)."""

from __future__ import annotations

import re
from pathlib import Path

from bti_fast.data.cases import Case, DatasetIndex, Problem, natural_key, sorted_cases
from bti_fast.data.images import SUFFIXES
from bti_fast.errors import UserError

CLASSES = ("benign", "malignant", "normal")
FOLDER = "Dataset_BUSI_with_GT"
LOOKS_LIKE = f"a folder {FOLDER} with the class folders {', '.join(CLASSES)}"

_MASK = re.compile(r"(?P<stem>.+)_mask(?:_\d+)?", re.IGNORECASE)
_CLUTTER = frozenset({"thumbs.db", "desktop.ini"})


def find(path: Path) -> Path | None:
    """The folder that holds the class folders: `path` itself or its Dataset_BUSI_with_GT."""
    for root in (path / FOLDER, path):
        if any((root / name).is_dir() for name in CLASSES):
            return root
    return None


def read(root: Path, *, allow_missing_classes: bool = False) -> DatasetIndex:
    """List BUSI's images with their masks; class from the folder, several masks for one image united.

    A normal image without a mask file has a known empty mask; a lesion image without one has an unknown
    mask. Raises UserError naming the missing class folders unless `allow_missing_classes`, which lists them
    instead.
    """
    cases: list[Case] = []
    problems: list[Problem] = []
    missing = [name for name in CLASSES if not (root / name).is_dir()]
    if missing and not allow_missing_classes:
        raise UserError(f"{root}: class folder missing: {', '.join(missing)}; needs {', '.join(CLASSES)}")
    for name in missing:
        problems.append(Problem(root / name, "missing-class", f"{root / name}: class folder missing"))
    present = tuple(name for name in CLASSES if name not in missing)
    for name in present:
        found = _read_class(root, name, problems)
        if not found:
            problems.append(Problem(root / name, "empty-class", f"{root / name}: class folder has no images"))
        cases += found
    return DatasetIndex(root, "busi", present, sorted_cases(cases), problems)


def _read_class(root: Path, name: str, problems: list[Problem]) -> list[Case]:
    images: dict[str, Path] = {}
    masks: dict[str, list[Path]] = {}
    for path in sorted((root / name).iterdir(), key=lambda p: natural_key(p.name)):
        if path.name.startswith(".") or path.name.lower() in _CLUTTER:
            continue
        if path.suffix.lower() not in SUFFIXES or path.is_dir():
            message = f"{path}: not an image file by its name; ignored"
            problems.append(Problem(path, "unexpected-file", message, excluded=True))
        elif match := _MASK.fullmatch(path.stem):
            masks.setdefault(match["stem"], []).append(path)
        elif path.stem in images:
            message = f"{path}: second image of this name beside {images[path.stem].name}; ignored"
            problems.append(Problem(path, "unexpected-file", message, excluded=True))
        else:
            images[path.stem] = path
    for stem in masks.keys() - images.keys():
        for path in masks[stem]:
            problems.append(
                Problem(path, "orphan-mask", f"{path}: mask without an image; ignored", excluded=True)
            )
    cases = []
    for stem, image in images.items():
        own = tuple(masks.get(stem, ()))
        known = bool(own) or name == "normal"
        if not known:
            problems.append(Problem(image, "missing-mask", f"{image}: no mask file; used for its class only"))
        cases.append(Case(image.relative_to(root).as_posix(), image, own, known, name))
    return cases
