"""What a data set is once its folders have been read: cases, classes, and the problems met on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Case:
    """One image with what is known about it.

    `mask_known` with `masks == ()` means the image is known to hold no lesion; several masks are united.
    `id` is unique in its index: the image's path relative to the root, with forward slashes.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] = ()
    mask_known: bool = False
    label: str | None = None
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing found wrong while reading: `kind` is a fixed word, `message` one line for a person.

    `excluded` says that the case (or row) was left out because of it; otherwise the case is still used.
    """

    path: Path
    kind: str
    message: str
    excluded: bool = False


@dataclass(frozen=True)
class DatasetIndex:
    """A data set as read: `classes` are in alphabetical order, `cases` in order of id."""

    root: Path
    layout: str
    classes: tuple[str, ...]
    cases: tuple[Case, ...]
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.cases)

    def warnings(self, of_each: int = 5) -> list[str]:
        """Lines to begin work with: the first problems of each kind, and how many more there are."""
        by_kind: dict[str, list[str]] = {}
        for problem in self.problems:
            by_kind.setdefault(problem.kind, []).append(f"warning: {problem.message}")
        lines = []
        for kind, told in by_kind.items():
            lines += told[:of_each]
            if len(told) > of_each:
                lines.append(
                    f"warning: {len(told) - of_each} more of this kind ({kind}); "
                    f"bti-fast data check {self.root} --json FILE lists them"
                )
        return lines


def natural_key(text: str) -> tuple:
    """Sort key that puts "benign (2)" before "benign (10)"."""
    parts: list[tuple[int, int, str]] = []
    digits = ""
    for char in text + "\0":
        if "0" <= char <= "9":
            digits += char
            continue
        if digits:
            parts.append((0, int(digits), digits))
            digits = ""
        parts.append((1, 0, char))
    return tuple(parts)


def sorted_cases(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Cases in natural order of id, whatever order the disk gave them in."""
    return tuple(sorted(cases, key=lambda case: natural_key(case.id)))
