"""Files that are there whole or not at all, and output folders that are checked before any work is done."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bti_fast.errors import UserError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path) and renames the result to path: a kill leaves the old file or the new one.

    UserError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as cause:  # torch.save reports a full disk as RuntimeError
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"{path}: cannot be written ({reason})") from cause
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes text atomically, as UTF-8; names of files that are not UTF-8 as the bytes that they are."""
    write_atomic(
        path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: list[str] | None = None) -> None:
    """Writes rows atomically as CSV; columns default to those seen, in that order; None is left blank."""
    rows = list(rows)
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def link_atomic(source: Path, target: Path) -> None:
    """Makes target the same file as source (a hard link, or a copy where the disk has none) in one step."""

    def link(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomic(target, link)


def output_folder(path: str | Path, *, marker: str | None = None, overwrite: bool = False) -> Path:
    """Creates path and proves that it can be written to.

    UserError if it cannot, or if it already holds the file named marker and overwrite is off.
    """
    folder = Path(path)
    if marker is not None and not overwrite and (folder / marker).exists():
        raise UserError(f"{folder}: already holds {marker}; choose another folder or give --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".bti-fast-probe-"):
            pass
    except OSError as cause:
        raise UserError(f"{folder}: output folder cannot be written ({cause.strerror or cause})") from cause
    return folder


def sweep_parts(folder: Path) -> None:
    """Removes temporary files that a killed process left behind."""
    for leftover in folder.glob(".*.part"):
        with suppress(OSError):
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable; some file systems have no way to ask for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
