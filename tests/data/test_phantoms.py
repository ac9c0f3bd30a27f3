"""Phantoms: repeatable bit for bit, readable, labelled rightly, and with the signs of each class."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bti_fast.data import check_dataset, make_phantoms, read_dataset, read_image, read_mask
from bti_fast.data.phantoms import phantom
from bti_fast.errors import UserError


def digests(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    first = digests(make_phantoms(tmp_path / "a", 6, 48, seed=3))
    assert first == digests(make_phantoms(tmp_path / "b", 6, 48, seed=3)) and len(first) == 13
    other = digests(make_phantoms(tmp_path / "c", 6, 48, seed=4))
    assert not set(first.values()) & {v for k, v in other.items() if k.startswith("images")}
    longer = digests(make_phantoms(tmp_path / "d", 9, 48, seed=3))
    assert all(longer[name] == value for name, value in first.items() if name.endswith(".png"))


def test_read_back_with_classes_in_turn_and_known_masks(tmp_path):
    index = read_dataset(make_phantoms(tmp_path, 9, (40, 64), classes=("normal", "malignant", "benign")))
    assert index.classes == ("benign", "malignant", "normal") and index.problems == []
    assert [case.label for case in index.cases[:4]] == ["normal", "malignant", "benign", "normal"]
    for case in index.cases:
        mask = read_mask(case.masks[0])
        assert read_image(case.image, 1).shape == (1, 40, 64) and mask.shape == (40, 64)
        assert mask.any() == (case.label != "normal") and case.mask_known


def test_phantoms_are_no_near_duplicates_and_pass_the_check(tmp_path):
    report = check_dataset(read_dataset(make_phantoms(tmp_path, 60, 64, seed=1)))
    assert report.ok and report.problems == () and report.pairs == ()
    assert report.masks == {"lesion": 40, "empty": 20, "unknown": 0}


@pytest.mark.parametrize("label", ["benign", "malignant"])
def test_lesions_are_darker_than_what_lies_beside_them(label):
    """Most lesions, not all: the task is learnable and not trivial."""
    darker = []
    for i in range(30):
        image, mask = phantom(label, (96, 96), np.random.default_rng(i))
        beside = mask.any(axis=1)[:, None] & ~mask
        darker.append(image[mask].mean() < image[beside].mean() - 5)
        assert 0.003 < mask.mean() < 0.4
    assert 24 <= sum(darker)


def test_benign_enhances_and_malignant_shadows():
    """Median brightness behind the lesion against beside it, over the seeds."""
    change = {}
    for label in ("benign", "malignant"):
        values = []
        for i in range(40):
            image, mask = phantom(label, (96, 96), np.random.default_rng(i))
            rows, columns = np.nonzero(mask)
            behind = image[rows.max() + 2 : rows.max() + 14].astype(float)
            inside = np.zeros(96, dtype=bool)
            inside[int(np.quantile(columns, 0.2)) : int(np.quantile(columns, 0.8)) + 1] = True
            if len(behind):
                values.append(behind[:, inside].mean() - behind[:, ~mask.any(axis=0)].mean())
        change[label] = np.median(values)
    assert change["benign"] > 5 and change["malignant"] < -5


def test_benign_outline_is_rounder():
    """Isoperimetric ratio area / perimeter squared, in pixels: the same estimate for both kinds."""

    def roundness(mask):
        padded = np.pad(mask, 1).astype(int)
        perimeter = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
        return mask.sum() / perimeter**2

    seeds = range(30)
    benign = [roundness(phantom("benign", (128, 128), np.random.default_rng(i))[1]) for i in seeds]
    malignant = [roundness(phantom("malignant", (128, 128), np.random.default_rng(i))[1]) for i in seeds]
    assert np.median(benign) > 1.2 * np.median(malignant)


@pytest.mark.parametrize("size", [16, (16, 300), (300, 17)])
def test_odd_sizes(size):
    shape = (size, size) if isinstance(size, int) else size
    for label in ("normal", "benign", "malignant"):
        image, mask = phantom(label, shape, np.random.default_rng(0))
        assert image.shape == mask.shape == shape and image.std() > 5 and mask.any() == (label != "normal")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"count": 0}, "count is 0"),
        ({"size": 15}, "at least 16"),
        ({"size": (64, 0)}, "size is"),
        ({"seed": -1}, "seed is -1"),
        ({"classes": ("normal", "cyst")}, "cyst"),
        ({"classes": ()}, "classes are"),
    ],
)
def test_bad_arguments(tmp_path, arguments, part):
    with pytest.raises(UserError, match=part.replace("(", r"\(")):
        make_phantoms(tmp_path / "p", **{"count": 3, "size": 32, **arguments})
    assert not (tmp_path / "p").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file: cannot write phantoms"):
        make_phantoms(tmp_path / "file", 2, 32)
