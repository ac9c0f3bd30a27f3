"""Anybody's data set, listed in a CSV file with one row per image."""

from __future__ import annotations

import csv
from pathlib import Path

from bti_fast.data.cases import SPLITS, Case, DatasetIndex, Problem, sorted_cases
from bti_fast.data.csv_rows import csv_rows
from bti_fast.errors import UserError

COLUMNS = ("image", "mask", "class", "split", "group")
NAME = "manifest.csv"
LOOKS_LIKE = (
    f"{NAME} (or any .csv file) with the columns {', '.join(COLUMNS)}, of which only image must be there"
)
# In the mask column: the image is known to hold no lesion, and there is no mask file.
EMPTY = "empty"

_SPLIT_NAMES = {"": None, "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def find(path: Path) -> Path | None:
    """The CSV file itself, or manifest.csv in the folder, where its header has an image column."""
    if path.is_file() and path.suffix.lower() == ".csv":
        return path
    file = path / NAME
    return file if file.is_file() and "image" in _header(file) else None


def beginning(folder: Path) -> str:
    """Where a folder has a manifest that cannot be taken for one, how that begins; else nothing."""
    file = folder / NAME
    if not file.is_file():
        return ""
    return f"its {NAME} has no column image, its first line is {', '.join(_header(file))[:80]!r}; "


def _header(file: Path) -> list[str]:
    """The column names of a CSV file, in lower case; none where it cannot be read."""
    try:
        with file.open("rb") as stream:
            header = stream.readline(10_000)
    except OSError:
        return []
    columns = header.decode("utf-8-sig", errors="replace").replace(";", ",").split(",")
    return [name.strip().strip('"').lower() for name in columns]


def read(path: Path) -> DatasetIndex:
    """Read a manifest CSV: columns image, mask, class, split, group; paths relative to the CSV.

    A blank mask is an unknown mask, "empty" a known empty one, and several masks are separated by ";". A
    blank class is an unknown class. split is train, val, test or blank; images of one group never cross
    splits. A row with a bad path or split becomes a problem and the rest go on. Raises UserError on an
    unknown or missing column, or a file that is not CSV text.
    """
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    for line, row in csv_rows(path, _check_columns):
        if not any(map(_text, row.values())):
            continue  # spreadsheets write rows of commas below the last one
        try:
            case = _case(path.parent, row)
            if case.id in cases:
                raise UserError(f"image {case.id} is listed twice")
        except UserError as cause:
            problems.append(
                Problem(path, "bad-row", f"{path}, line {line}: {cause}; row left out", excluded=True)
            )
        else:
            cases[case.id] = case
    classes = tuple(sorted({case.label for case in cases.values() if case.label is not None}))
    for first, second in zip(ordered := sorted(classes, key=str.casefold), ordered[1:], strict=False):
        if first.casefold() == second.casefold():
            message = f"{path}: classes {first!r} and {second!r} differ in case alone; taken for two classes"
            problems.append(Problem(path, "similar-classes", message))
    return DatasetIndex(path.parent, "manifest", classes, sorted_cases(cases.values()), problems)


def _check_columns(path: Path, reader: csv.DictReader) -> None:
    names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    if not names:
        raise UserError(f"{path}: empty file; needs a header with the columns {', '.join(COLUMNS)}")
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path}: columns separated by ';'; needs commas")
    unknown = [name or "(no name)" for name in names if name not in COLUMNS]
    if unknown:
        raise UserError(f"{path}: unknown column {', '.join(unknown)}; needs only {', '.join(COLUMNS)}")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: column {', '.join(doubled)} appears twice; needs each once")
    if "image" not in names:
        raise UserError(f"{path}: no image column; needs image, and may have {', '.join(COLUMNS[1:])}")
    reader.fieldnames = names


def _case(folder: Path, row: dict) -> Case:
    if _text(row.get(None)):
        raise UserError(f"more values than columns ({', '.join(map(repr, row[None]))})")
    cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
    if not cells["image"]:
        raise UserError("no image named")
    split = cells["split"].lower()
    if split not in _SPLIT_NAMES:
        raise UserError(f"split is {cells['split']!r}; needs {', '.join(SPLITS)} or blank")
    image = _existing(folder, cells["image"])
    names = [] if cells["mask"].lower() == EMPTY else [part.strip() for part in cells["mask"].split(";")]
    masks = tuple(_existing(folder, name) for name in names if name)
    if image in masks:
        raise UserError(f"the mask is the image itself ({cells['image']})")
    return Case(
        id=_identity(folder, image),
        image=image,
        masks=masks,
        mask_known=bool(masks) or cells["mask"].lower() == EMPTY,
        label=cells["class"] or None,
        split=_SPLIT_NAMES[split],
        group=cells["group"] or None,
    )


def _text(cell: str | list[str] | None) -> str:
    """What a cell says; the cells beyond the last column come as a list."""
    return ("".join(cell) if isinstance(cell, list) else cell or "").strip()


def _existing(folder: Path, name: str) -> Path:
    for spelling in (name, name.replace("\\", "/")):
        path = folder / Path(spelling).expanduser()
        try:
            if path.is_file():
                return path
        except OSError as cause:  # too long, say
            raise UserError(f"{name[:80]}...: cannot be a file ({cause.strerror})") from cause
    raise UserError(f"{folder / name}: no such file")


def _identity(folder: Path, image: Path) -> str:
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else image.as_posix()
