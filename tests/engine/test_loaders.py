"""The order of the batches, and the stored division into splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bti_fast.data import CaseDataset, read_dataset, split_cases
from bti_fast.engine.loaders import (
    EpochBatches,
    OrderedBatches,
    balanced_weights,
    ordered_loader,
    read_split,
    write_split,
)
from bti_fast.errors import UserError


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 16, 17, 25])
def test_every_case_once_and_no_batch_of_one(count: int) -> None:
    batches = EpochBatches(count, 8, seed=0)
    found = list(batches)
    assert sorted(index for batch in found for index in batch) == list(range(count))
    assert len(found) == len(batches)
    assert min(len(batch) for batch in found) > 1 and max(len(batch) for batch in found) <= 9


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first, second = EpochBatches(20, 4, seed=5), EpochBatches(20, 4, seed=5)
    second.set_epoch(3)
    assert list(first) != list(second)
    list(first)
    first.set_epoch(3)
    assert list(first) == list(second) == list(second)
    other = EpochBatches(20, 4, seed=6)
    other.set_epoch(3)
    assert list(other) != list(second)


def test_balanced_draws_show_every_class_equally_often() -> None:
    labels = ["rare"] * 5 + ["common"] * 70 + [None] * 25
    weights = balanced_weights(labels)
    assert sum(weights) == pytest.approx(100) and weights[-1] == 1.0
    assert sum(weights[:5]) == pytest.approx(sum(weights[5:75])) == pytest.approx(37.5)
    batches, drawn = EpochBatches(100, 8, seed=1, weights=weights), Counter()
    for epoch in range(200):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches) == 13 and sum(map(len, found)) == 100
        drawn.update(labels[index] for batch in found for index in batch)
    # 20,000 draws: a standard deviation is 68 for a share of 0.375 and 61 for 0.25.
    assert (
        abs(drawn["rare"] - 7500) < 340
        and abs(drawn["common"] - 7500) < 340
        and abs(drawn[None] - 5000) < 310
    )
    again = EpochBatches(100, 8, seed=1, weights=weights)
    again.set_epoch(199)
    assert list(again) == found


@pytest.mark.parametrize("balanced", [False, True], ids=["shuffled", "balanced"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [3, 7, 8, 9, 16, 17, 25])
def test_processes_divide_the_batches_of_one(count: int, world: int, balanced: bool) -> None:
    """Side by side their batches are those of a single process, so no case is doubled or dropped."""
    weights = balanced_weights([str(i % 3 == 0) for i in range(count)]) if balanced else None
    parts = [EpochBatches(count, 2, 0, weights, rank=rank, world=world) for rank in range(world)]
    whole = EpochBatches(count, 2 * world, 0, weights)
    for batches in (*parts, whole):
        batches.set_epoch(3)
    found = [list(part) for part in parts]
    assert {len(own) for own in found} == {len(parts[0])}
    joint = [[index for own in step for index in own] for step in zip(*found, strict=True)]
    if 1 < count % (2 * world) < world:  # too few for a case a process: they join the batch before
        assert sum(joint, []) == sum(whole, [])
    else:
        assert joint == list(whole)
    for step in zip(*found, strict=True):
        sizes = sorted(map(len, step))
        assert sizes[0] >= 1 and sizes[-1] - sizes[0] <= 1


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_processes_divide_the_validation_cases(count: int) -> None:
    found = [list(OrderedBatches(count, 2, rank, 2)) for rank in range(2)]
    assert len(found[0]) == len(found[1]) == len(OrderedBatches(count, 2, 0, 2))
    joint = [index for step in zip(*found, strict=True) for own in step for index in own]
    assert joint == list(range(count))


def test_an_empty_share_is_an_empty_batch(phantoms: Path) -> None:
    index = read_dataset(phantoms)
    data = CaseDataset(index.cases[:1], index.classes, 32)
    batches = [list(ordered_loader(data, 2, 0, rank=rank, world=2)) for rank in range(2)]
    assert batches[0] == [{"id": []}] and batches[1][0]["id"] == [index.cases[0].id]


def test_split_survives_the_round_trip(phantoms: Path, tmp_path: Path) -> None:
    index = read_dataset(phantoms)
    splits = split_cases(index)
    write_split(tmp_path, splits)
    assert read_split(tmp_path, index) == splits


def test_bad_split_files(phantoms: Path, tmp_path: Path) -> None:
    index = read_dataset(phantoms)
    with pytest.raises(UserError, match="split.csv: cannot be read"):
        read_split(tmp_path, index)
    (tmp_path / "split.csv").write_text("id,split\na.png,training\n")
    with pytest.raises(UserError, match="split.csv: damaged"):
        read_split(tmp_path, index)
    (tmp_path / "split.csv").write_text("id,split\ngone.png,train\n")
    with pytest.raises(UserError, match="lacks 1 of the run's 1 cases, first 'gone.png'"):
        read_split(tmp_path, index)
