"""Which images of a data set are (nearly) the same picture."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bti_fast.data.cases import Case, DatasetIndex, natural_key
from bti_fast.data.images import read_image
from bti_fast.data.resize import area_average
from bti_fast.data.verify import in_threads
from bti_fast.errors import UserError

SIDE = 32
THRESHOLD = 0.98
# 1024 x 32768 float32 similarities at most at a time: 128 MiB.
_BLOCK_VALUES = 1 << 25


class Pair(NamedTuple):
    """Two case ids and their similarity: 1 for the same pixels, else the correlation of 32x32 thumbnails."""

    a: str
    b: str
    similarity: float
    exact: bool


class Fingerprint(NamedTuple):
    """What is kept of an image: its area-averaged grey thumbnail, float32 (32, 32), and a pixel hash."""

    thumbnail: np.ndarray
    digest: bytes


def near_duplicate_pairs(index: DatasetIndex | Sequence[Case], threshold: float = THRESHOLD) -> list[Pair]:
    """Pairs of cases whose 32x32 thumbnails correlate above `threshold` or whose pixels are equal.

    Independent of brightness, contrast and size; a flipped or cropped copy is not found. Images that cannot
    be read are left out. Raises UserError unless 0 < threshold <= 1.
    """
    cases = index.cases if isinstance(index, DatasetIndex) else tuple(index)
    prints = in_threads(_fingerprint_or_none, cases)
    readable = [(case.id, found) for case, found in zip(cases, prints, strict=True) if found is not None]
    return pairs_of_fingerprints([name for name, _ in readable], [found for _, found in readable], threshold)


def near_duplicate_groups(
    index: DatasetIndex | Sequence[Case], threshold: float = THRESHOLD
) -> list[tuple[str, ...]]:
    """Groups of two or more case ids linked by chains of near-duplicate pairs, in natural order.

    Raises UserError as `near_duplicate_pairs` does.
    """
    return connected((pair.a, pair.b) for pair in near_duplicate_pairs(index, threshold))


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Fingerprint of a grey image, float32 (1, H, W) in [0, 1]."""
    thumbnail = area_average(image[0].astype(np.float64), (SIDE, SIDE)).astype(np.float32)
    digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()
    return Fingerprint(thumbnail, digest)


def pairs_of_fingerprints(
    names: Sequence[str], prints: Sequence[Fingerprint], threshold: float = THRESHOLD
) -> list[Pair]:
    """The pairs of `near_duplicate_pairs` from fingerprints already taken, best first."""
    if not 0 < threshold <= 1:
        raise UserError(f"near-duplicate threshold is {threshold}; needs a number above 0, at most 1")
    unit = _unit_vectors(prints)
    exact = _equal_digests(prints)
    found = {pair: 1.0 for pair in exact}
    rows = max(1, _BLOCK_VALUES // max(1, len(names)))
    for start in range(0, len(names), rows):
        block = unit[start : start + rows] @ unit[start:].T
        near_a, near_b = np.nonzero(np.triu(block > threshold, 1))
        for a, b, value in zip(near_a, near_b, block[near_a, near_b], strict=True):
            found.setdefault((start + int(a), start + int(b)), float(value))
    pairs = [Pair(names[a], names[b], min(value, 1.0), (a, b) in exact) for (a, b), value in found.items()]
    return sorted(pairs, key=lambda pair: (-pair.similarity, natural_key(pair.a), natural_key(pair.b)))


def _unit_vectors(prints: Sequence[Fingerprint]) -> np.ndarray:
    """(N, 1024) float32 rows of mean 0 and length 1; zeros for flat images, which resemble nothing."""
    vectors = (
        np.stack([found.thumbnail.ravel() for found in prints]) if prints else np.zeros((0, SIDE * SIDE))
    )
    vectors = vectors.astype(np.float64)
    vectors -= vectors.mean(axis=1, keepdims=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Below a hundredth of an 8-bit step the thumbnail holds only rounding.
    flat = length <= SIDE * 0.01 / 255
    return np.where(flat, 0, vectors / np.where(flat, 1, length)).astype(np.float32)


def _equal_digests(prints: Sequence[Fingerprint]) -> set[tuple[int, int]]:
    """Index pairs with equal pixels; chained, not all against all, as a group of copies can be large."""
    last: dict[bytes, int] = {}
    pairs = set()
    for position, found in enumerate(prints):
        if found.digest in last:
            pairs.add((last[found.digest], position))
        last[found.digest] = position
    return pairs


def connected(links: Iterable[tuple[Hashable, Hashable]]) -> list[tuple]:
    """Connected components of two or more members, each in natural order, ordered by their first member."""
    parent: dict = {}

    def root(member):
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for a, b in links:
        parent[root(a)] = root(b)
    members: dict = {}
    for member in parent:
        members.setdefault(root(member), []).append(member)
    groups = [tuple(sorted(group, key=_order)) for group in members.values() if len(group) > 1]
    return sorted(groups, key=lambda group: _order(group[0]))


def _order(member: Hashable) -> tuple:
    return natural_key(str(member))


def _fingerprint_or_none(case: Case) -> Fingerprint | None:
    try:
        return fingerprint(read_image(case.image, 1))
    except UserError:
        return None
