"""A whole data set as one file that travels well and is read in place: `bti-fast data pack`."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bti_fast.data.cases import SPLITS, Case, DatasetIndex, Problem, sorted_cases
from bti_fast.data.images import read_image, read_mask
from bti_fast.data.manifest import COLUMNS, EMPTY
from bti_fast.data.members import SUFFIX, member_bytes, open_pack
from bti_fast.data.resize import resize_image, resize_mask
from bti_fast.data.verify import in_threads
from bti_fast.errors import UserError

MANIFEST, ABOUT = "manifest.csv", "about.json"
LOOKS_LIKE = f"a {SUFFIX} file made by bti-fast data pack"
MASKS = "masks/"
# Tried in this order until the pack is small enough: the files as they are, then JPEG of these qualities.
QUALITIES = (None, 95, 90, 80, 70, 60, 50)
MAX_MB = 60.0
# Fixed, so that the same data give the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)
_CHUNK = 64


class Packed(NamedTuple):
    """The file written, its cases and bytes, and the JPEG quality of its images (None: as they were)."""

    path: Path
    cases: int
    bytes: int
    quality: int | None


class _TooLarge(Exception):
    """The pack passed its limit."""


def find(path: Path) -> Path | None:
    """The pack itself."""
    is_pack = path.is_file() and path.suffix.lower() == SUFFIX and zipfile.is_zipfile(path)
    return path if is_pack and MANIFEST in open_pack(path) else None


def read(path: Path) -> DatasetIndex:
    """The data set in a pack, with the ids, classes, splits and groups that it was made from.

    A row that names a member which is not there becomes a problem. UserError for a damaged pack.
    """
    pack = open_pack(path)
    try:
        rows = list(csv.DictReader(io.StringIO(pack.read(MANIFEST).decode("utf-8"), newline="")))
        about = json.loads(pack.read(ABOUT)) if ABOUT in pack else {}
        classes = tuple(about.get("classes", sorted({row["class"] for row in rows if row["class"]})))
        listed = [tuple(row[name] for name in COLUMNS) for row in rows]
    except (UnicodeDecodeError, ValueError, KeyError, AttributeError, csv.Error) as cause:
        raise UserError(f"{path}: damaged {MANIFEST} or {ABOUT} ({cause!r})") from cause
    cases, problems = [], []
    for image, mask, label, split, group in listed:
        absent = [name for name in (image, mask) if name not in ("", EMPTY) and name not in pack]
        if absent or not image or split not in ("", *SPLITS):
            said = f"no member {absent[0]}" if absent else f"image {image!r}, split {split!r}"
            problems.append(Problem(path, "bad-row", f"{path}: {said}; row left out", excluded=True))
            continue
        own = (path / mask,) if mask not in ("", EMPTY) else ()
        known = bool(own) or mask == EMPTY
        cases.append(Case(image, path / image, own, known, label or None, split or None, group or None))
    return DatasetIndex(path, "pack", classes, sorted_cases(cases), problems)


def pack_dataset(index: DatasetIndex, target: str | Path, *, max_mb: float = MAX_MB, size: int = 0) -> Packed:
    """Writes a data set as one uncompressed zip file of at most max_mb million bytes, and says how.

    Images go in as they are where that fits, else as JPEG of the best quality of 95 to 50 that does; the
    masks of a case are united to one. With size, images are shrunk so that their longer side has at most so
    many pixels (then PNG stands for "as they are"). Ids stay, so splits made from the folder hold for the
    pack too. UserError where the target exists or cannot be written, or nothing fits.
    """
    target = Path(target)
    if target.suffix.lower() != SUFFIX:
        raise UserError(f"{target}: must end in {SUFFIX}")
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name or remove it")
    if not max_mb > 0 or size < 0:
        raise UserError(f"--max-mb {max_mb:g}, --size {size}: must be above 0, and not below 0")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        for quality in QUALITIES:
            with suppress(_TooLarge):
                _write(temporary, index, quality, size, int(max_mb * 1e6))
                os.replace(temporary, target)
                return Packed(target, len(index.cases), target.stat().st_size, quality)
    except OSError as cause:
        raise UserError(f"{target}: cannot be written ({cause.strerror or cause})") from cause
    finally:
        with suppress(OSError):
            temporary.unlink()
    raise UserError(
        f"{index.root}: does not fit into {max_mb:g} MB even as JPEG of quality {QUALITIES[-1]}; "
        "give a smaller --size or a larger --max-mb"
    )


def _write(path: Path, index: DatasetIndex, quality: int | None, size: int, limit: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        rows = []
        for case, image, mask in _encoded(index, quality, size):
            name = case.id.lstrip("/")
            archive.writestr(zipfile.ZipInfo(name, _TIME), image)
            listed = EMPTY if case.mask_known else ""
            if mask is not None:
                listed = f"{MASKS}{len(rows):06d}.png"
                archive.writestr(zipfile.ZipInfo(listed, _TIME), mask)
            rows.append((name, listed, case.label or "", case.split or "", case.group or ""))
            if archive.fp.tell() > limit:
                raise _TooLarge
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        about = {"source": index.root.name, "layout": index.layout, "classes": list(index.classes)}
        about |= {"jpeg_quality": quality, "longest_side": size or None}
        archive.writestr(zipfile.ZipInfo(MANIFEST, _TIME), text.getvalue())
        archive.writestr(zipfile.ZipInfo(ABOUT, _TIME), json.dumps(about, indent=2))
    if path.stat().st_size > limit:
        raise _TooLarge


def _encoded(
    index: DatasetIndex, quality: int | None, size: int
) -> Iterator[tuple[Case, bytes, bytes | None]]:
    """Each case with its encoded image and mask, a few at a time."""
    for start in range(0, len(index.cases), _CHUNK):
        chunk = index.cases[start : start + _CHUNK]
        found = in_threads(lambda case: (_image(case, quality, size), _mask(case, size)), chunk)
        yield from ((case, *pair) for case, pair in zip(chunk, found, strict=True))


def _image(case: Case, quality: int | None, size: int) -> bytes:
    if quality is None and not size:
        return _file_bytes(case.image)
    values = read_image(case.image, 3)
    shape = _shrunk(values.shape[1:], size)
    if quality is None and shape == values.shape[1:]:
        return _file_bytes(case.image)
    pixels = np.rint(resize_image(values, shape) * 255).astype(np.uint8)
    grey = bool((pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all())
    picture = Image.fromarray(pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    stream = io.BytesIO()
    if quality is None:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=quality, optimize=True, subsampling=0)
    return stream.getvalue()


def _file_bytes(path: Path) -> bytes:
    """A file as it is; one inside a pack too, so that a pack can be packed again, smaller."""
    inside = member_bytes(path)
    return path.read_bytes() if inside is None else inside


def _mask(case: Case, size: int) -> bytes | None:
    if not case.masks:
        return None
    mask = read_mask(case.masks[0])
    for path in case.masks[1:]:
        mask = mask | read_mask(path)
    stream = io.BytesIO()
    Image.fromarray(resize_mask(mask, _shrunk(mask.shape, size))).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _shrunk(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """(H, W) with the longer side brought down to size, 0 for no limit."""
    height, width = shape
    scale = min(1.0, size / max(height, width)) if size else 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))
