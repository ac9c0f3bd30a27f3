"""Items of the torch data set: values, unknown parts, the cache's bound, and repeatable augmentation."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bti_fast.data import Case, CaseDataset, make_phantoms, read_dataset, read_image, read_mask, resize_image
from bti_fast.data.dataset import CaseStore
from bti_fast.errors import UserError
from tests.data.files import save, square_mask, texture

SIZE = (24, 32)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return read_dataset(make_phantoms(tmp_path_factory.mktemp("phantoms"), 12, (40, 48), seed=2))


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def items(dataset) -> list[dict]:
    return [dataset[i] for i in range(len(dataset))]


def test_item_without_augmentation(index):
    dataset = CaseDataset(index.cases, index.classes, SIZE, 1)
    assert len(dataset) == 12
    for i, case in enumerate(index.cases):
        item = dataset[i]
        assert item.keys() == {"image", "mask", "label", "has_mask", "has_label", "id", "index"}
        assert item["image"].shape == item["mask"].shape == (1, *SIZE)
        assert type(item["image"]) is torch.Tensor and item["image"].dtype == torch.float32
        expected = resize_image(read_image(case.image, 1), SIZE)
        np.testing.assert_array_equal(item["image"].numpy(), expected)
        assert set(item["mask"].unique().tolist()) <= {0.0, 1.0} and item["mask"].dtype == torch.float32
        share = read_mask(case.masks[0]).mean()
        assert abs(item["mask"].mean().item() - share) < 0.02
        assert item["label"].dtype == torch.int64 and index.classes[item["label"]] == case.label
        assert item["has_mask"] and item["has_label"] and (item["id"], item["index"]) == (case.id, i)


def test_channels(index, tmp_path):
    grey = CaseDataset(index.cases[:1], index.classes, SIZE, 1)[0]["image"]
    colour = CaseDataset(index.cases[:1], index.classes, SIZE, 3)[0]["image"]
    assert torch.equal(colour, grey.expand(3, -1, -1))
    red = np.zeros((10, 10, 3), dtype=np.uint8)
    red[..., 0] = 255
    item = CaseDataset([Case("red", save(tmp_path / "red.png", red))], (), 8, 3)[0]
    assert item["image"].mean(dim=(1, 2)).tolist() == [1, 0, 0]


def test_partly_labelled_cases(index):
    known = index.cases[1]
    cases = [
        replace(known, label=None),
        replace(known, masks=(), mask_known=False),
        replace(known, masks=(), mask_known=True),
    ]
    first, second, third = items(CaseDataset(cases, index.classes, SIZE, 1))
    assert (first["label"], first["has_label"], first["has_mask"]) == (-1, False, True) and first[
        "mask"
    ].any()
    assert (second["has_label"], second["has_mask"]) == (True, False) and not second["mask"].any()
    assert third["has_mask"] and not third["mask"].any()


def test_several_masks_are_united(tmp_path):
    left, right = np.zeros((20, 20), dtype=np.uint8), np.zeros((20, 20), dtype=np.uint8)
    left[2:6, 2:6], right[10:14, 10:16] = 255, 255
    masks = (save(tmp_path / "l.png", left), save(tmp_path / "r.png", right))
    case = Case("a", save(tmp_path / "a.png", texture(0, 20, 20)), masks, True)
    mask = CaseDataset([case], (), 20, 1)[0]["mask"][0].numpy()
    np.testing.assert_array_equal(mask * 255, np.maximum(left, right))


def test_tiny_lesion_survives_resizing(tmp_path):
    mask = np.zeros((400, 400), dtype=np.uint8)
    mask[201, 99] = 255
    case = Case("a", save(tmp_path / "a.png", mask), (save(tmp_path / "m.png", mask),), True)
    assert CaseDataset([case], (), 16, 1)[0]["mask"].sum() == 1


@pytest.mark.parametrize("augment", [False, True])
def test_cached_equals_uncached(index, augment):
    cached = CaseDataset(index.cases, index.classes, SIZE, 3, augment=augment)
    uncached = CaseDataset(index.cases, index.classes, SIZE, 3, augment=augment, cache_bytes=0)
    first = items(cached)
    for other in (items(cached), items(uncached)):
        assert all(same(a, b) for a, b in zip(first, other, strict=True))


def test_cache_saves_reading_and_keeps_its_bound(index, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "bti_fast.data.dataset.read_image",
        lambda path, channels: reads.append(path) or read_image(path, channels),
    )
    slot = 24 * 32 * (2 + 1) + 1
    dataset = CaseDataset(index.cases, index.classes, SIZE, 1, cache_bytes=5 * slot + slot // 2)
    for _ in range(3):
        items(dataset)
    assert len(reads) == 12 + 2 * (12 - 5) and dataset.cached == 5
    store = CaseStore(100, (3, 24, 32), 10_000)
    assert len(store) == 1 and store.nbytes == 3 * 24 * 32 * 2 + 24 * 32 + 1 <= 10_000


def test_items_do_not_share_memory_with_the_cache(index):
    dataset = CaseDataset(index.cases, index.classes, SIZE, 1)
    before = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    dataset[0]["mask"].fill_(7)
    assert torch.equal(dataset[0]["image"], before) and dataset[0]["mask"].max() <= 1


def test_augmentation_depends_on_seed_epoch_and_index_only(index):
    def made(seed: int, epoch: int, order=range(12)):
        dataset = CaseDataset(index.cases, index.classes, SIZE, 1, augment=True, seed=seed)
        dataset.set_epoch(epoch)
        torch.rand(3), np.random.rand(5)
        return {i: dataset[i] for i in order}

    first = made(0, 3)
    backwards = made(0, 3, reversed(range(12)))
    assert all(same(first[i], backwards[i]) for i in range(12))
    for other in (made(1, 3), made(0, 4)):
        assert sum(torch.equal(first[i]["image"], other[i]["image"]) for i in range(12)) == 0


def test_augmentation_leaves_the_global_generators_alone(index):
    dataset = CaseDataset(index.cases, index.classes, SIZE, 1, augment=True)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    items(dataset)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_workers_give_the_same_and_see_the_epoch(index):
    alone = CaseDataset(index.cases, index.classes, SIZE, 1, augment=True, seed=4)
    shared = CaseDataset(index.cases, index.classes, SIZE, 1, augment=True, seed=4)
    loader = DataLoader(shared, batch_size=5, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        batches = list(loader)
        images = torch.cat([batch["image"] for batch in batches])
        assert torch.equal(images, torch.stack([item["image"] for item in items(alone)]))
    assert batches[0]["label"].tolist() == [alone[i]["label"].item() for i in range(5)]
    assert batches[0]["id"] == [case.id for case in index.cases[:5]]
    # Filled by the workers, seen here: the cache is one for all processes.
    assert shared.cached == 12


def test_copies_for_other_processes_start_with_an_empty_cache(index):
    dataset = CaseDataset(index.cases, index.classes, SIZE, 1, augment=True, seed=1)
    expected = items(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.cached == 0 and dataset.cached == 12
    assert all(same(a, b) for a, b in zip(expected, items(copy), strict=True))


def test_mask_moves_with_its_image(tmp_path):
    """An image that equals its mask must equal it after any flip and rotation, but for the cut edge."""
    mask = square_mask(64, 64)
    path = save(tmp_path / "m.png", mask)
    dataset = CaseDataset([Case("m", path, (path,), True)], (), 64, 1, augment=True)
    quadrants = set()
    for epoch in range(24):
        dataset.set_epoch(epoch)
        item = dataset[0]
        assert torch.equal((item["image"] >= 0.5).float(), item["mask"])
        rows, columns = torch.nonzero(item["mask"][0], as_tuple=True)
        quadrants.add((rows.float().mean().item() > 32, columns.float().mean().item() > 32))
        assert abs(item["mask"].sum().item() - 256) < 20
    assert len(quadrants) == 4


def test_rotation_stays_within_15_degrees(tmp_path):
    bar = np.zeros((101, 101), dtype=np.uint8)
    bar[48:53, 5:96] = 255
    path = save(tmp_path / "bar.png", bar)
    dataset = CaseDataset([Case("bar", path, (path,), True)], (), 101, 1, augment=True)
    angles = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        rows, columns = torch.nonzero(dataset[0]["mask"][0], as_tuple=True)
        slope = np.polyfit(columns.numpy(), rows.numpy(), 1)[0]
        angles.append(np.degrees(np.arctan(slope)))
    assert np.abs(angles).max() < 15.3 and min(angles) < -8 and max(angles) > 8


def test_bad_requests(index, tmp_path):
    with pytest.raises(UserError, match="is not one of benign, malignant"):
        CaseDataset(index.cases, ("benign", "malignant"), SIZE)
    with pytest.raises(UserError, match="size is 0"):
        CaseDataset(index.cases, index.classes, 0)
    with pytest.raises(UserError, match="channels is 2"):
        CaseDataset(index.cases, index.classes, SIZE, 2)
    with pytest.raises(UserError, match="seed is -1"):
        CaseDataset(index.cases, index.classes, SIZE, seed=-1)
    with pytest.raises(IndexError):
        CaseDataset(index.cases, index.classes, SIZE)[12]


def test_file_that_went_bad_names_itself(index, tmp_path):
    image = save(tmp_path / "a.png", texture(0))
    small = Case("a", image, (save(tmp_path / "m.png", square_mask(10, 10)),), True)
    with pytest.raises(UserError, match="m.png: mask is 10 x 10"):
        CaseDataset([small], (), SIZE)[0]
    image.write_bytes(b"gone")
    with pytest.raises(UserError, match="a.png: not an image"):
        CaseDataset([replace(small, masks=())], (), SIZE)[0]
