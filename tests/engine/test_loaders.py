"""The order of the batches, and the stored division into splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from bti_fast.data import read_dataset, split_cases
from bti_fast.engine.loaders import EpochBatches, read_split, write_split
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
