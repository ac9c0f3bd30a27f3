"""Patients, lesions or scanners known from elsewhere: a CSV file that says which images belong together."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bti_fast.data.cases import DatasetIndex, Problem
from bti_fast.data.duplicates import connected
from bti_fast.errors import UserError

COLUMNS = ("image", "group")


def with_groups(index: DatasetIndex, path: str | Path) -> DatasetIndex:
    """The data set with the groups of a CSV file joined to those it has; other columns are ignored.

    image is an id, or a file name that only one case has; blank groups say nothing. Rows that name no case
    are counted in one problem. UserError for a file that cannot be read, lacks a column, or names no case.
    """
    path = Path(path)
    names = Counter(case.image.name for case in index.cases)
    found = {case.image.name: case.id for case in index.cases if names[case.image.name] == 1}
    found.update({case.id: case.id for case in index.cases})
    links, unknown, used = [], 0, 0
    for image, group in _rows(path):
        if image not in found:
            unknown += 1
        elif group:
            used += 1
            links.append((("case", found[image]), ("file", group)))
    if not used:
        raise UserError(f"{path}: names no image of {index.root}; needs ids or file names in column image")
    links += [(("case", case.id), ("data", case.group)) for case in index.cases if case.group is not None]
    together = {
        member[1]: f"group {number}"
        for number, members in enumerate(connected(links), start=1)
        for member in members
        if member[0] == "case"
    }
    cases = tuple(replace(case, group=together.get(case.id, case.group)) for case in index.cases)
    problems = list(index.problems)
    if unknown:
        message = f"{path}: {unknown} rows name no image of {index.root}; ignored"
        problems.append(Problem(path, "unknown-group-rows", message))
    return replace(index, cases=cases, problems=problems)


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise UserError(f"{path}: no column {', '.join(lacking)}; needs {' and '.join(COLUMNS)}")
            return [tuple((row[name] or "").strip() for name in COLUMNS) for row in reader]
    except OSError as cause:
        raise UserError(f"{path}: cannot be read ({cause.strerror or cause})") from cause
    except (UnicodeDecodeError, csv.Error) as cause:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({cause})") from cause
