"""Which case trains, which validates, which tests: splits that do not leak, and named ones that do."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bti_fast.data.cases import SPLITS, Case, DatasetIndex, sorted_cases
from bti_fast.data.duplicates import connected, near_duplicate_groups
from bti_fast.errors import UserError

POLICIES = ("grouped", "official", "random")


class LeakWarning(UserWarning):
    """A split puts copies of one picture, or images of one group, into two of train, val and test."""


def split_cases(
    index: DatasetIndex,
    policy: str = "grouped",
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    *,
    duplicate_groups: Sequence[Sequence[str]] | None = None,
) -> dict[str, list[Case]]:
    """Split into {"train", "val", "test"}; a function of the cases' ids, `fractions` and `seed` only.

    grouped: near-duplicates and declared groups stay together; each class is shared out by `fractions`.
    official: the data set's own split column; without a val part, one is taken out of train by groups.
    random: by image, classes in proportion, as the published pipeline does. official and random warn with
    LeakWarning, naming how many groups cross. `duplicate_groups` saves finding the near-duplicates again.
    Raises UserError for a bad policy, fractions or seed, too few groups, or no official split.
    """
    if policy not in POLICIES:
        raise UserError(f"split policy is {policy!r}; needs {', '.join(POLICIES)}")
    shares = _check_fractions(fractions)
    if seed < 0:
        raise UserError(f"seed is {seed}; needs a number from 0 up")
    cases = sorted_cases(index.cases)
    near = near_duplicate_groups(cases) if duplicate_groups is None else duplicate_groups
    groups = leak_groups(cases, near)
    if policy == "grouped":
        return _share_out(_atoms(cases, groups), shares, seed)
    if policy == "official":
        split = _official(cases, groups, shares, seed)
    else:
        split = _share_out([(case,) for case in cases], shares, seed)
    crossing = leaks(split, groups)
    if crossing:
        images = sum(len(group) for group in crossing)
        warnings.warn(
            f"the {policy} split leaks: {len(crossing)} groups of near-duplicate or related images "
            f"({images} images) lie in more than one of train, val and test; use the grouped split",
            LeakWarning,
            stacklevel=2,
        )
    return split


def leak_groups(cases: Sequence[Case], duplicate_groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Ids that must stay together: near-duplicate groups joined with declared groups."""
    links = [(group[0], other) for group in duplicate_groups for other in group[1:]]
    first: dict[str, str] = {}
    for case in cases:
        if case.group is not None:
            links.append((first.setdefault(case.group, case.id), case.id))
    return connected(links)


def leaks(split: Mapping[str, Sequence[Case]], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The groups with members in more than one part of the split."""
    part = {case.id: name for name, cases in split.items() for case in cases}
    return [tuple(group) for group in groups if len({part[name] for name in group if name in part}) > 1]


def _check_fractions(fractions: Sequence[float]) -> dict[str, float]:
    shares = tuple(float(share) for share in fractions)
    if len(shares) != 3 or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"split fractions are {shares}; needs three from 0 to 1 (train, val, test) that sum to 1"
        )
    if shares[0] == 0:
        raise UserError(f"split fractions are {shares}; needs a train fraction above 0")
    return dict(zip(SPLITS, shares, strict=True))


def _atoms(cases: Sequence[Case], groups: Sequence[Sequence[str]]) -> list[tuple[Case, ...]]:
    """Cases in the units that are never divided, in order of their first case."""
    group_of = {name: position for position, group in enumerate(groups) for name in group}
    units: dict[object, list[Case]] = {}
    for case in cases:
        units.setdefault(group_of.get(case.id, case.id), []).append(case)
    return [tuple(unit) for unit in units.values()]


def _share_out(atoms: list[tuple[Case, ...]], shares: dict[str, float], seed: int) -> dict[str, list[Case]]:
    """Largest units first, each to the part that lacks most of its classes."""
    parts = [name for name in SPLITS if shares[name] > 0]
    if len(atoms) < len(parts):
        raise UserError(
            f"{len(atoms)} independent groups of images cannot fill {', '.join(parts)}; "
            f"needs at least {len(parts)}, or a fraction of 0"
        )
    order = np.random.default_rng(seed).permutation(len(atoms))
    shuffled = sorted((atoms[i] for i in order), key=len, reverse=True)
    total = Counter(case.label for atom in atoms for case in atom)
    lacking = {name: {label: shares[name] * count for label, count in total.items()} for name in parts}
    chosen: dict[str, list[tuple[Case, ...]]] = {name: [] for name in parts}
    for atom in shuffled:
        wanted = Counter(case.label for case in atom)
        name = max(parts, key=lambda part: _need(lacking[part], wanted, total))
        chosen[name].append(atom)
        for label, count in wanted.items():
            lacking[name][label] -= count
    _fill_empty(chosen)
    members = {name: [case for atom in chosen.get(name, []) for case in atom] for name in SPLITS}
    return {name: list(sorted_cases(cases)) for name, cases in members.items()}


def _need(lacking: dict, wanted: Counter, total: Counter) -> float:
    """How much of the unit's classes a part still lacks; rare classes weigh as much as common ones."""
    return sum(count * lacking[label] / total[label] for label, count in wanted.items())


def _fill_empty(chosen: dict[str, list[tuple[Case, ...]]]) -> None:
    """Give a part that got nothing (tiny data sets) the smallest unit of the part with most units."""
    for atoms in chosen.values():
        if not atoms:
            donor = max(chosen.values(), key=len)
            atoms.append(donor.pop(min(range(len(donor)), key=lambda i: len(donor[i]))))


def _official(
    cases: Sequence[Case], groups: Sequence[Sequence[str]], shares: dict[str, float], seed: int
) -> dict[str, list[Case]]:
    split: dict[str, list[Case]] = {name: [case for case in cases if case.split == name] for name in SPLITS}
    if not split["train"]:
        raise UserError(
            "official split asked for, but no case is marked train; needs a split column, or grouped"
        )
    unmarked = sum(case.split is None for case in cases)
    if unmarked:
        warnings.warn(f"official split: {unmarked} images without a split are left out", stacklevel=3)
    if not split["val"] and shares["val"] > 0:
        val = shares["val"] / (shares["train"] + shares["val"])
        inner = {"train": 1 - val, "val": val, "test": 0.0}
        members = {case.id for case in split["train"]}
        inside = [[name for name in group if name in members] for group in groups]
        split.update({**_share_out(_atoms(split["train"], inside), inner, seed), "test": split["test"]})
    return split


def with_split(split: Mapping[str, Sequence[Case]]) -> tuple[Case, ...]:
    """The cases of a split, each marked with its part, in order of id."""
    return sorted_cases(replace(case, split=name) for name, cases in split.items() for case in cases)
