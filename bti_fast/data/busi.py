"""BUSI in the layout of its release (Al-Dhabyani et al. 2020, doi:10.1016/j.dib.2019.104863)."""

from __future__ import annotations

import re
from pathlib import Path

from bti_fast.data.cases import Case, DatasetIndex, Problem, sorted_cases
from bti_fast.data.folders import by_stem, image_paths, missing_mask, note_orphans
from bti_fast.errors import UserError

CLASSES = ("benign", "malignant", "normal")
FOLDER = "Dataset_BUSI_with_GT"
LOOKS_LIKE = f"a folder {FOLDER} with the class folders {', '.join(CLASSES)}"

_MASK = re.compile(r"(?P<stem>.+)_mask(?:_\d+)?", re.IGNORECASE)


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
        raise UserError(
            f"{root}: class folder missing: {', '.join(missing)}; needs {', '.join(CLASSES)}, "
            "or a manifest.csv and --layout manifest"
        )
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
    plain: list[Path] = []
    masks: dict[str, list[Path]] = {}
    for path in image_paths(root / name, problems):
        if match := _MASK.fullmatch(path.stem):
            masks.setdefault(match["stem"], []).append(path)
        else:
            plain.append(path)
    images = by_stem(plain, problems)
    note_orphans(masks, images, problems)
    cases = []
    for stem, image in images.items():
        own = tuple(masks.get(stem, ()))
        known = bool(own) or name == "normal"
        if not known:
            problems.append(missing_mask(image))
        cases.append(Case(image.relative_to(root).as_posix(), image, own, known, name))
    return cases
