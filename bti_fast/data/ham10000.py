"""HAM10000 in the layout of its release (Tschandl et al. 2018, doi:10.7910/DVN/DBW86T; masks 2020)."""

from __future__ import annotations

from pathlib import Path

from bti_fast.data.cases import Case, DatasetIndex, Problem, sorted_cases
from bti_fast.data.csv_rows import csv_rows, needs_columns
from bti_fast.data.folders import by_stem, image_paths, missing_folder, missing_mask, note_orphans
from bti_fast.errors import UserError

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")
MASKS = "HAM10000_segmentations_lesion_tschandl"
METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata")
COLUMNS = ("lesion_id", "image_id", "dx")
LOOKS_LIKE = f"a folder with {', '.join(PARTS)} and {METADATA[0]}"

_MASK_SUFFIX = "_segmentation"


def find(path: Path) -> Path | None:
    """The folder that holds the image folders: `path` itself or its HAM10000."""
    for root in (path, path / "HAM10000"):
        if any((root / name).exists() for name in (*PARTS, *METADATA)):
            return root
    return None


def read(root: Path) -> DatasetIndex:
    """List HAM10000's images with mask, class (dx) and lesion: images of one lesion_id form one group.

    Every image shows a lesion, so one without a mask file has an unknown mask. A row of the metadata that is
    bad, or whose image is not there, becomes a problem, as does an image that no row names (its lesion is
    unknown, and it might leak). Raises UserError where the metadata or an image folder is missing, or the
    metadata is not a CSV file with the columns lesion_id, image_id and dx.
    """
    missing = [name for name in PARTS if not (root / name).is_dir()]
    if missing:
        raise UserError(f"{root}: image folder missing: {', '.join(missing)}; needs {', '.join(PARTS)}")
    table = next((root / name for name in METADATA if (root / name).is_file()), None)
    if table is None:
        raise UserError(f"{root}: no {METADATA[0]}; needs it for classes and lesions")
    problems: list[Problem] = []
    images = by_stem((path for name in PARTS for path in image_paths(root / name, problems)), problems)
    masks: dict[str, Path] = {}
    if (root / MASKS).is_dir():
        masks = _masks(root / MASKS, problems)
    else:
        problems.append(missing_folder(root / MASKS, "images are used for their class only"))
    cases = [
        _case(root, image, masks.get(name), label, lesion, problems if masks else [])
        for name, (image, label, lesion) in _listed(table, images, problems).items()
    ]
    named = {case.image for case in cases}
    for image in images.values():
        if image not in named:
            message = f"{image}: no usable row in {table.name}, so its lesion is unknown; left out"
            problems.append(Problem(image, "unlisted-image", message, excluded=True))
    note_orphans(masks, images, problems)
    for label in CLASSES:
        if all(case.label != label for case in cases):
            problems.append(Problem(table, "empty-class", f"{table}: no image of class {label}"))
    return DatasetIndex(root, "ham10000", CLASSES, sorted_cases(cases), problems)


def _case(
    root: Path, image: Path, mask: Path | None, label: str, lesion: str, problems: list[Problem]
) -> Case:
    if mask is None:
        problems.append(missing_mask(image))
    own = () if mask is None else (mask,)
    return Case(image.relative_to(root).as_posix(), image, own, bool(own), label, group=lesion)


def _masks(folder: Path, problems: list[Problem]) -> dict[str, Path]:
    """Masks by the name of their image."""
    found = {}
    for stem, path in by_stem(image_paths(folder, problems), problems).items():
        if stem.endswith(_MASK_SUFFIX):
            found[stem.removesuffix(_MASK_SUFFIX)] = path
        else:
            message = f"{path}: not named <image>{_MASK_SUFFIX}.png; ignored"
            problems.append(Problem(path, "unexpected-file", message, excluded=True))
    return found


def _listed(
    table: Path, images: dict[str, Path], problems: list[Problem]
) -> dict[str, tuple[Path, str, str]]:
    """Image, class and lesion of every good row of the metadata, by image_id."""
    found: dict[str, tuple[Path, str, str]] = {}
    for line, row in csv_rows(table, needs_columns(COLUMNS, ", ".join(COLUMNS))):
        name, label, lesion = ((row.get(column) or "").strip() for column in ("image_id", "dx", "lesion_id"))
        kind, said = "bad-row", None
        if not name or not lesion:
            said = f"no {'lesion_id' if name else 'image_id'}"
        elif label not in CLASSES:
            said = f"dx is {label!r}; needs {', '.join(CLASSES)}"
        elif name in found:
            said = f"image {name} is listed twice"
        elif name not in images:
            kind, said = "missing-image", f"{name}.jpg is in no image folder"
        if said is None:
            found[name] = (images[name], label, lesion)
        else:
            message = f"{table}, line {line}: {said}; row left out"
            problems.append(Problem(table, kind, message, excluded=True))
    return found
