"""The GPU's training step, run on the CPU from a small pack; and what it says where a pack is missing."""

from __future__ import annotations

import pytest

from benchmarks import gpu_training
from bti_fast.data import make_phantoms, pack_dataset, read_dataset
from tests.engine.tiny import TinyEncoder


def test_a_pack_is_trained_evaluated_and_not_trained_twice(tmp_path):
    make_phantoms(tmp_path / "phantoms", 18, size=32, seed=3)
    pack_dataset(read_dataset(tmp_path / "phantoms"), tmp_path / "small.zip")
    settings = {"epochs": 1, "gate_epochs": 1, "size": 32, "batch_size": 4, "threads": 1, "device": "cpu"}
    made = [
        gpu_training.trained(tmp_path / "small.zip", tmp_path / "run", encoder=TinyEncoder(), **settings)
        for _ in range(2)
    ]
    assert [found["resumed"] for found in made] == [False, True]
    assert made[0]["summary"] == made[1]["summary"] and 0 <= made[0]["summary"]["mask"]["iou"]["value"] <= 1
    assert made[0]["train_images"] > 8 and made[0]["images_per_second"] > 0


def test_a_missing_pack_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "PACKS", tmp_path)
    with pytest.raises(FileNotFoundError, match="busi.zip: not there; bti-fast data pack DATA"):
        gpu_training.data_set("busi")
