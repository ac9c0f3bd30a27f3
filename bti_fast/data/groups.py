"""Patients, lesions or scanners known from elsewhere: a CSV file that says which images belong together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from bti_fast.data.cases import DatasetIndex, Problem
from bti_fast.data.csv_rows import csv_rows, needs_columns
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
    for _, row in csv_rows(path, needs_columns(COLUMNS, " and ".join(COLUMNS))):
        image, group = ((row[name] or "").strip() for name in COLUMNS)
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
