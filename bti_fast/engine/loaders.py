"""Cases to batches in an order fixed by (seed, epoch), and the division into splits that a run keeps."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from bti_fast.data import Case, CaseDataset, DatasetIndex
from bti_fast.engine.files import write_csv
from bti_fast.errors import UserError

SPLIT_FILE = "split.csv"
SPLITS = ("train", "val", "test")


class EpochBatches(Sampler[list[int]]):
    """Batches of shuffled indices that depend on (seed, epoch) alone.

    With weights, one a case, indices are drawn with replacement in their proportion instead. Of `world`
    processes, the one of number `rank` gets its share of each joint batch of world * batch_size. A last batch
    too small for a case a process, or of one case, joins the batch before it: BatchNorm needs two.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size * world, seed, 0
        self.rank, self.world = rank, world
        self.weights = None if weights is None else list(weights)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return max(1, full + (rest >= max(2, self.world)))

    def __iter__(self) -> Iterator[list[int]]:
        # A string seed is hashed the same way on every machine.
        order = self._order(random.Random(f"{self.seed}/{self.epoch}"))
        cuts = [self.batch_size * i for i in range(len(self))] + [self.count]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            yield share_of(order[start:stop], self.rank, self.world)

    def _order(self, generator: random.Random) -> list[int]:
        if self.weights is not None:
            return generator.choices(range(self.count), self.weights, k=self.count)
        order = list(range(self.count))
        generator.shuffle(order)
        return order


class OrderedBatches(Sampler[list[int]]):
    """All indices once, in order, in joint batches of world * batch_size that the processes divide.

    Every process gets as many batches as the others; its share of the last may be empty.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world: int) -> None:
        self.count, self.batch_size, self.rank, self.world = count, batch_size * world, rank, world

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.count, self.batch_size):
            joint = range(start, min(start + self.batch_size, self.count))
            yield share_of(joint, self.rank, self.world)


def share_of(joint: Sequence[int], rank: int, world: int) -> list[int]:
    """What one of the processes gets of a joint batch: a run of it, as long as the others' or one shorter."""
    return list(joint[len(joint) * rank // world : len(joint) * (rank + 1) // world])


def balanced_weights(labels: Sequence[str | None]) -> list[float]:
    """Draw weights under which every class is drawn equally often; cases without a class as often as before.

    They sum to the number of cases.
    """
    counts = Counter(label for label in labels if label is not None)
    known = sum(counts.values())
    return [1.0 if label is None else known / (len(counts) * counts[label]) for label in labels]


def training_loader(
    dataset: CaseDataset,
    batch_size: int,
    seed: int,
    workers: int,
    *,
    balanced: bool = False,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[dict[str, Any]]:
    """Shuffled batches, or drawn with replacement where balanced; call start_epoch before each pass.

    batch_size is that of each of the processes.
    """
    weights = balanced_weights([case.label for case in dataset.cases]) if balanced else None
    batches = EpochBatches(len(dataset), batch_size, seed, weights, rank=rank, world=world)
    return _loader(dataset, workers, batch_sampler=batches)


def start_epoch(loader: DataLoader[dict[str, Any]], epoch: int) -> None:
    """Chooses the order and the augmentation of a training loader's next pass."""
    loader.batch_sampler.set_epoch(epoch)
    loader.dataset.set_epoch(epoch)


def ordered_loader(
    dataset: CaseDataset, batch_size: int, workers: int, *, rank: int = 0, world: int = 1
) -> DataLoader[dict[str, Any]]:
    """All cases once, in order; of several processes each has its share of them.

    A process may get an empty batch, {"id": []}, so that all take as many steps.
    """
    if world == 1:
        return _loader(dataset, workers, batch_size=batch_size, shuffle=False)
    batches = OrderedBatches(len(dataset), batch_size, rank, world)
    return _loader(dataset, workers, batch_sampler=batches, collate_fn=_collated)


def _collated(items: list[dict[str, Any]]) -> dict[str, Any]:
    from torch.utils.data import default_collate

    return default_collate(items) if items else {"id": []}


def _loader(dataset: CaseDataset, workers: int, **order: Any) -> DataLoader[dict[str, Any]]:
    import torch

    # A generator of its own: else the loader draws from the global one, and dropout would depend on that.
    return DataLoader(dataset, num_workers=workers, generator=torch.Generator().manual_seed(0), **order)


def write_split(folder: Path, splits: dict[str, list[Case]]) -> None:
    """Keeps on file which case belongs where, for evaluation to use again."""
    rows = [
        {"id": case.id, "split": name, "class": case.label, "image": str(case.image)}
        for name in SPLITS
        for case in splits[name]
    ]
    write_csv(folder / SPLIT_FILE, rows, ["id", "split", "class", "image"])


def read_split(folder: Path, index: DatasetIndex) -> dict[str, list[Case]]:
    """The stored division of a run, as cases of index.

    UserError where the file is missing or damaged, or where a stored case is not in the data any more.
    """
    path = folder / SPLIT_FILE
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as cause:
        raise UserError(
            f"{path}: cannot be read ({cause}); it says which cases the run was trained on"
        ) from cause
    if not rows or not {"id", "split"} <= set(rows[0]) or any(row["split"] not in SPLITS for row in rows):
        raise UserError(f"{path}: damaged; needs the columns id and split ({', '.join(SPLITS)})")
    by_id = {case.id: case for case in index.cases}
    missing = [row["id"] for row in rows if row["id"] not in by_id]
    if missing:
        raise UserError(
            f"{index.root}: lacks {len(missing)} of the run's {len(rows)} cases, first {missing[0]!r}; "
            "give the data the run was trained on, or --split all for other data"
        )
    return {name: [by_id[row["id"]] for row in rows if row["split"] == name] for name in SPLITS}


def count_classes(cases: Sequence[Case], classes: Sequence[str]) -> dict[str, int]:
    """How many cases each class has."""
    return {name: sum(case.label == name for case in cases) for name in classes}
