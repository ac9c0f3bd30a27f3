"""What is in a data set and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bti_fast.data.cases import SPLITS, Case, DatasetIndex, Problem
from bti_fast.data.duplicates import THRESHOLD, Fingerprint, Pair, fingerprint, pairs_of_fingerprints
from bti_fast.data.images import binarise, read_image, read_mask_values
from bti_fast.data.splits import leak_groups, leaks
from bti_fast.data.verify import in_threads, size_message
from bti_fast.errors import UserError

# Classes that mean "no lesion": only there is an empty mask right and a filled one wrong.
LESION_FREE = frozenset({"normal", "no_tumor", "healthy", "none"})
# JPEG-like noise around 0 and 255 is harmless; grey in between is for a person to look at.
_NOISE = 10
# Listed, but no reason to refuse training.
_WARNINGS = frozenset(
    (
        "missing-mask",
        "missing-class",
        "missing-folder",
        "class-mismatch",
        "split-mismatch",
        "empty-class",
        "orphan-mask",
        "unexpected-file",
        "empty-mask",
        "filled-mask",
        "grey-mask",
        "inverted-mask",
        "exif-turned",
        "similar-classes",
        "dark-16-bit",
        "unknown-group-rows",
    )
)


@dataclass(frozen=True)
class CheckReport:
    """Findings of `check_dataset`.

    `counts` is class (None for unknown) to split ("" for none) to images; `masks` counts cases with a
    lesion, with a known empty mask, and with an unknown mask; `pairs` are near-duplicates, best first;
    `cross_class` are those with two known, different classes; `leaks` are groups of related ids that lie in
    more than one split.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    images: int
    counts: dict[str | None, dict[str, int]]
    masks: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    problems: tuple[Problem, ...]
    pairs: tuple[Pair, ...]
    duplicate_images: int
    cross_class: tuple[Pair, ...]
    leaks: tuple[tuple[str, ...], ...]
    threshold: float

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that cost a case; the others (missing or odd masks, stray files) are warnings."""
        return tuple(problem for problem in self.problems if problem.kind not in _WARNINGS)

    @property
    def ok(self) -> bool:
        """True if every case can be used and no split leaks; warnings and near-duplicates are allowed."""
        return not self.errors and not self.leaks

    def to_dict(self) -> dict:
        """Everything found, as JSON-able values."""
        return {
            "path": str(self.root),
            "layout": self.layout,
            "ok": self.ok,
            "images": self.images,
            "classes": list(self.classes),
            "counts": {label or "": parts for label, parts in self.counts.items()},
            "masks": dict(self.masks),
            "sizes": {name: list(size) for name, size in self.sizes.items()},
            "problem_counts": dict(Counter(problem.kind for problem in self.problems)),
            "problems": [
                {"path": str(p.path), "kind": p.kind, "message": p.message, "excluded": p.excluded,
                 "severity": "warning" if p.kind in _WARNINGS else "error"}
                for p in self.problems
            ],
            "near_duplicates": {
                "threshold": self.threshold,
                "pairs": [pair._asdict() for pair in self.pairs],
                "exact_pairs": sum(pair.exact for pair in self.pairs),
                "images": self.duplicate_images,
                "cross_class_pairs": [pair._asdict() for pair in self.cross_class],
            },
            "leaks": [list(group) for group in self.leaks],
        }  # fmt: skip

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def render(self, console: object = None) -> None:
        """Print the findings as tables on a rich console (the default one if None)."""
        from bti_fast.data.check_tables import render

        render(self, console)


@dataclass(frozen=True)
class _Finding:
    """What one pass over a case's files gave: `lesion` is None where the mask is unknown or unusable."""

    problems: tuple[Problem, ...]
    print: Fingerprint | None = None
    size: tuple[int, int] | None = None
    lesion: bool | None = None


def check_dataset(
    index: DatasetIndex,
    *,
    splits: Mapping[str, Sequence[Case]] | None = None,
    threshold: float = THRESHOLD,
) -> CheckReport:
    """Look at every image and mask of an index and report counts, problems, near-duplicates and leaks.

    Leaks are looked for between the parts of `splits`, or of the data set's own split column where it has
    one. Raises UserError for a bad threshold only; bad files are findings.
    """
    findings = in_threads(_look_at, index.cases)
    known = {(problem.path, problem.kind) for problem in index.problems}
    problems = list(index.problems)
    problems += [p for finding in findings for p in finding.problems if (p.path, p.kind) not in known]
    seen = [(c.id, f.print) for c, f in zip(index.cases, findings, strict=True) if f.print is not None]
    pairs = pairs_of_fingerprints([name for name, _ in seen], [found for _, found in seen], threshold)
    label = {case.id: case.label for case in index.cases}
    near = [(pair.a, pair.b) for pair in pairs]
    parts = splits or {name: [case for case in index.cases if case.split == name] for name in SPLITS}
    sizes = [finding.size for finding in findings if finding.size is not None]
    return CheckReport(
        root=index.root,
        layout=index.layout,
        classes=index.classes,
        images=len(index.cases),
        counts=_counts(index, splits),
        masks=_count_masks(findings),
        sizes=_size_range(sizes),
        problems=tuple(problems),
        pairs=tuple(pairs),
        duplicate_images=len({name for pair in near for name in pair}),
        cross_class=tuple(
            p for p in pairs if None not in (label[p.a], label[p.b]) and label[p.a] != label[p.b]
        ),
        leaks=tuple(leaks(parts, leak_groups(index.cases, near))),
        threshold=threshold,
    )


def _look_at(case: Case) -> _Finding:
    try:
        image = read_image(case.image, 1)
    except UserError as cause:
        return _Finding((Problem(case.image, "unreadable-image", str(cause), excluded=True),))
    size = image.shape[1:]
    problems = _look_at_depth(case, image)
    lesion = False if case.mask_known else None
    for path in case.masks:
        try:
            values = read_mask_values(path)
            mask = binarise(values, path)
        except UserError as cause:
            kind = "mask-values" if "mask values" in str(cause) else "unreadable-mask"
            problems.append(Problem(path, kind, str(cause), excluded=True))
            lesion = None
            break
        if mask.shape != size:
            message = size_message(path, mask.shape, size)
            problems.append(Problem(path, "mask-size", message, excluded=True))
            lesion = None
            break
        problems += _look_at_grey(path, values) + _look_at_border(path, mask)
        lesion = lesion or bool(mask.any())
    free = (case.label or "").lower() in LESION_FREE
    where = case.masks[0] if case.masks else case.image
    if lesion is False and case.label is not None and not free:
        problems.append(Problem(where, "empty-mask", f"{where}: empty mask on a {case.label} image"))
    if lesion and free:
        problems.append(Problem(where, "filled-mask", f"{where}: mask is not empty on a {case.label} image"))
    return _Finding(tuple(problems), fingerprint(image), size, lesion)


def _look_at_depth(case: Case, image: np.ndarray) -> list[Problem]:
    steps = image.max() * np.float32(65535)
    # An 8-bit image has steps of 257; 12-bit data in a 16-bit file is scaled by 65535 and comes out dark.
    if 0 < steps < 4096 and np.any(np.rint(image * 65535) % 257 != 0):
        message = f"{case.image}: 16-bit image reaches only {int(steps)} of 65535; it will look nearly black"
        return [Problem(case.image, "dark-16-bit", message)]
    return []


def _look_at_grey(path: Path, values: np.ndarray) -> list[Problem]:
    top = 1 if values.max() <= 1 else 255 if values.max() <= 255 else 65535
    noise = 0 if top == 1 else _NOISE * top // 255
    odd = values[(values > noise) & (values < top - noise)]
    if not odd.size:
        return []
    found = np.unique(odd)
    shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
    message = f"{path}: {odd.size} mask pixels between 0 and {top} (values {shown}); cut at half"
    return [Problem(path, "grey-mask", message)]


def _look_at_border(path: Path, mask: np.ndarray) -> list[Problem]:
    if not (mask[[0, -1]].all() and mask[:, [0, -1]].all()) or mask.all():
        return []
    message = f"{path}: the whole border of the mask is lesion; inverted? (lesion must be white)"
    return [Problem(path, "inverted-mask", message)]


def _counts(
    index: DatasetIndex, splits: Mapping[str, Sequence[Case]] | None
) -> dict[str | None, dict[str, int]]:
    part = {case.id: name for name, cases in (splits or {}).items() for case in cases}
    found = Counter((case.label, part.get(case.id, case.split) or "") for case in index.cases)
    labels = [*index.classes, *([None] if any(label is None for label, _ in found) else [])]
    names = [name for name in (*SPLITS, "") if any(split == name for _, split in found)]
    return {label: {name: found[label, name] for name in names} for label in labels}


def _count_masks(findings: Sequence[_Finding]) -> dict[str, int]:
    found = Counter(finding.lesion for finding in findings)
    return {"lesion": found[True], "empty": found[False], "unknown": found[None]}


def _size_range(sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Smallest, median and largest (H, W) by area."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    if not ordered:
        return {}
    return {"smallest": ordered[0], "median": ordered[len(ordered) // 2], "largest": ordered[-1]}
