"""BRISC 2025 in the layout of its release (Fateh et al. 2025, arXiv:2506.14318)."""

from __future__ import annotations

import re
from pathlib import Path

from bti_fast.data.cases import Case, DatasetIndex, Problem, sorted_cases
from bti_fast.data.folders import by_stem, image_paths, missing_folder, missing_mask, note_orphans
from bti_fast.errors import UserError

# In file names; the release's README says nt where its files say no.
CODES = {"glioma": ("gl",), "meningioma": ("me",), "no_tumor": ("no", "nt"), "pituitary": ("pi",)}
CLASSES = tuple(CODES)
PARTS = ("train", "test")
IMAGES, SEGMENTATION = "classification_task", "segmentation_task"
LOOKS_LIKE = f"a folder {IMAGES} with {' and '.join(PARTS)}, each with the folders {', '.join(CLASSES)}"

_NAME = re.compile(r"brisc2025_(?P<part>train|test)_\d+_(?P<code>[a-z]{2})_.+")


def find(path: Path) -> Path | None:
    """The folder that holds classification_task: `path` itself or its brisc2025."""
    for root in (path, path / "brisc2025"):
        if any((root / IMAGES / part).is_dir() for part in PARTS):
            return root
    return None


def read(root: Path, *, allow_missing_classes: bool = False) -> DatasetIndex:
    """List BRISC's images with mask, class (folder) and the official split (train or test).

    A no_tumor image has no mask file and a known empty mask; another image without one has an unknown mask.
    Names that contradict their folder are listed. Raises UserError naming the missing folders unless
    `allow_missing_classes`, which lists them instead.
    """
    problems: list[Problem] = []
    folders = {(part, name): root / IMAGES / part / name for part in PARTS for name in CLASSES}
    missing = [key for key, folder in folders.items() if not folder.is_dir()]
    if missing and not allow_missing_classes:
        listed = ", ".join(f"{IMAGES}/{part}/{name}" for part, name in missing)
        raise UserError(f"{root}: class folder missing: {listed}; needs {', '.join(CLASSES)} in each split")
    for key in missing:
        message = f"{folders[key]}: class folder missing"
        problems.append(Problem(folders[key], "missing-class", message))
    cases: list[Case] = []
    for part in PARTS:
        images = {
            name: by_stem(image_paths(folders[part, name], problems), problems)
            for name in CLASSES
            if (part, name) not in missing
        }
        cases += _read_part(root, part, images, problems)
    classes = tuple(name for name in CLASSES if any((part, name) not in missing for part in PARTS))
    return DatasetIndex(root, "brisc2025", classes, sorted_cases(cases), problems)


def _read_part(
    root: Path, part: str, images: dict[str, dict[str, Path]], problems: list[Problem]
) -> list[Case]:
    folder = root / SEGMENTATION / part / "masks"
    masks = by_stem(image_paths(folder, problems), problems) if folder.is_dir() else {}
    if not folder.is_dir():
        problems.append(missing_folder(folder, "images with a tumor are used for their class only"))
    cases = []
    for name, found in images.items():
        if not found:
            where = root / IMAGES / part / name
            problems.append(Problem(where, "empty-class", f"{where}: class folder has no images"))
        for stem, image in found.items():
            own = (masks[stem],) if stem in masks else ()
            known = bool(own) or name == "no_tumor"
            if not known and masks:
                problems.append(missing_mask(image))
            problems += _contradictions(image, part, name)
            identity = image.relative_to(root).as_posix()
            cases.append(Case(identity, image, own, known, name, split=part))
    everywhere = {stem for found in images.values() for stem in found}
    note_orphans(masks, everywhere, problems)
    copies = root / SEGMENTATION / part / "images"
    if copies.is_dir():  # the same pictures again; only one that is nowhere else is worth a word
        for path in image_paths(copies, problems):
            if path.stem not in everywhere:
                message = f"{path}: not in {IMAGES}/{part}, so its class is unknown; left out"
                problems.append(Problem(path, "unlisted-image", message, excluded=True))
    return cases


def _contradictions(image: Path, part: str, name: str) -> list[Problem]:
    """What the file's name says otherwise than its folders, which are believed."""
    match, found = _NAME.fullmatch(image.stem), []
    if match and match["code"] not in CODES[name]:
        message = f"{image}: name says {match['code']}, folder says {name}; folder believed"
        found.append(Problem(image, "class-mismatch", message))
    if match and match["part"] != part:
        message = f"{image}: name says {match['part']}, folder says {part}; folder believed"
        found.append(Problem(image, "split-mismatch", message))
    return found
