"""Packs: the same data set from one file, within its limit, and damage that is named."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bti_fast.data import (
    CaseDataset,
    check_dataset,
    pack_dataset,
    read_dataset,
    read_image,
    read_mask,
    split_cases,
)
from bti_fast.errors import UserError
from tests.data.files import make_brisc2025, make_busi, make_ham10000, save, square_mask, texture


@pytest.fixture
def busi(tmp_path: Path) -> Path:
    root = make_busi(tmp_path)
    save(root / "Dataset_BUSI_with_GT" / "benign" / "benign (1)_mask_1.png", square_mask()[::-1, ::-1].copy())
    (root / "Dataset_BUSI_with_GT" / "benign" / "benign (2)_mask.png").unlink()
    return root


@pytest.mark.parametrize("make", [make_busi, make_ham10000, make_brisc2025])
def test_a_pack_is_the_folder_bit_for_bit(tmp_path: Path, make) -> None:
    index = read_dataset(make(tmp_path / "in"))
    made = pack_dataset(index, tmp_path / "data.zip")
    assert made.quality is None and made.cases == len(index) and made.bytes <= 60e6
    packed = read_dataset(tmp_path / "data.zip")
    assert (packed.layout, packed.classes, packed.problems) == ("pack", index.classes, [])
    for ours, theirs in zip(packed.cases, index.cases, strict=True):
        for name in ("id", "label", "split", "group", "mask_known"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert np.array_equal(read_image(ours.image, 3), read_image(theirs.image, 3))
        assert [len(case.masks) for case in (ours, theirs)] == [len(theirs.masks)] * 2
        for mask, original in zip(ours.masks, theirs.masks, strict=True):
            assert np.array_equal(read_mask(mask), read_mask(original))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = split_cases(packed), split_cases(index)
    assert {n: [c.id for c in v] for n, v in ours.items()} == {
        n: [c.id for c in v] for n, v in theirs.items()
    }
    assert check_dataset(packed).masks == check_dataset(index).masks


def test_masks_are_united_and_unknown_ones_stay_unknown(busi: Path, tmp_path: Path) -> None:
    index = read_dataset(busi)
    pack_dataset(index, tmp_path / "data.zip")
    packed = read_dataset(tmp_path / "data.zip")
    assert [case.mask_known for case in packed.cases] == [case.mask_known for case in index.cases]
    ours, theirs = (CaseDataset(i.cases, i.classes, 32)[0] for i in (packed, index))
    assert (ours["mask"] == theirs["mask"]).all() and ours["mask"].sum() > 0
    assert (ours["image"] == theirs["image"]).all()


def test_what_does_not_fit_becomes_jpeg_or_smaller(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["image,mask,class"]
    for i in range(6):  # noise: PNG cannot compress it
        fine = texture(i, 120, 160).astype(int) + rng.integers(-20, 20, (120, 160))
        save(tmp_path / "in" / f"{i}.png", np.clip(fine, 0, 255).astype(np.uint8))
        save(tmp_path / "in" / f"{i}_mask.png", square_mask(120, 160))
        lines.append(f"{i}.png,{i}_mask.png,a")
    (tmp_path / "in" / "manifest.csv").write_text("\n".join(lines) + "\n")
    index = read_dataset(tmp_path / "in")
    whole = pack_dataset(index, tmp_path / "whole.zip")
    jpeg = pack_dataset(index, tmp_path / "jpeg.zip", max_mb=0.6 * whole.bytes / 1e6)
    assert jpeg.quality in (95, 90, 80, 70) and jpeg.bytes <= 0.6 * whole.bytes
    original, packed = (read_image(i.cases[0].image, 1) for i in (index, read_dataset(jpeg.path)))
    assert packed.shape == original.shape and 0 < np.abs(packed - original).mean() < 0.03
    small = pack_dataset(index, tmp_path / "small.zip", size=80)
    case = read_dataset(small.path).cases[0]
    assert read_image(case.image, 1).shape == (1, 60, 80) and read_mask(case.masks[0]).shape == (60, 80)
    assert pack_dataset(index, tmp_path / "again.zip", size=80).bytes == small.bytes
    assert small.path.read_bytes() == (tmp_path / "again.zip").read_bytes()
    again = pack_dataset(read_dataset(whole.path), tmp_path / "repacked.zip")  # a pack can be packed
    assert again.bytes == pytest.approx(whole.bytes, abs=200) and again.cases == 6
    with pytest.raises(UserError, match="does not fit into 0.005 MB even as JPEG of quality 50"):
        pack_dataset(index, tmp_path / "none.zip", max_mb=0.005)
    assert not list(tmp_path.glob("*none*"))


def test_damage_is_named(busi: Path, tmp_path: Path) -> None:
    index = read_dataset(busi)
    path = tmp_path / "data.zip"
    pack_dataset(index, path)
    with pytest.raises(UserError, match="data.zip: exists already"):
        pack_dataset(index, path)
    with pytest.raises(UserError, match="must end in .zip"):
        pack_dataset(index, tmp_path / "data.tar")
    with pytest.raises(UserError, match="cannot be written"):
        pack_dataset(index, tmp_path / "none" / "data.zip")
    whole = path.read_bytes()
    at = whole.index(index.cases[0].image.read_bytes()[:60]) + 40
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    packed = read_dataset(path)
    assert len(packed) == len(index) - 1 and packed.problems[0].kind == "unreadable-image"
    assert "its checksum is wrong" in packed.problems[0].message
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no known data set layout|damaged"):
        read_dataset(path)
    with zipfile.ZipFile(tmp_path / "squeezed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.csv", "image,mask,class,split,group\n")
    with pytest.raises(UserError, match="members are compressed, first manifest.csv"):
        read_dataset(tmp_path / "squeezed.zip")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("manifest.csv", "image,mask,class,split,group\ngone.png,,a,,\n")
    with pytest.raises(UserError, match=r"no usable image \(1 problems.* no member gone.png"):
        read_dataset(tmp_path / "rows.zip")
    with pytest.raises(UserError, match="data.zip/nothing.png: no such file"):
        path.write_bytes(whole)
        read_image(path / "nothing.png", 1)
