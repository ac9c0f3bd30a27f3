"""Rows of a CSV table that a user gives, with one clear line for what cannot be read."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from bti_fast.errors import UserError


def csv_rows(path: Path, check: Callable[[Path, csv.DictReader], None]) -> list[tuple[int, dict]]:
    """Line number and columns of every row, after `check` has seen (and perhaps renamed) the header.

    UserError naming the file where it cannot be read, is not UTF-8 or not a CSV file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            check(path, reader)
            return [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as cause:
        raise UserError(f"{path}: not UTF-8 text (byte {cause.start}); needs a CSV file in UTF-8") from cause
    except csv.Error as cause:
        raise UserError(f"{path}: not a CSV file ({cause}); needs comma-separated rows") from cause
    except OSError as cause:
        raise UserError(f"{path}: cannot be read ({cause.strerror or cause})") from cause


def needs_columns(names: Sequence[str], written: str) -> Callable[[Path, csv.DictReader], None]:
    """A check that these columns are there; `written` is how the error lists them."""

    def check(path: Path, reader: csv.DictReader) -> None:
        lacking = [name for name in names if name not in (reader.fieldnames or ())]
        if lacking:
            raise UserError(f"{path}: no column {', '.join(lacking)}; needs {written}")

    return check
