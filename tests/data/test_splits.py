"""Splits: nothing related crosses, classes are shared out, the order on disk does not matter."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bti_fast.data import Case, DatasetIndex, LeakWarning, near_duplicate_groups, read_dataset, split_cases
from bti_fast.data.splits import leaks
from bti_fast.errors import UserError
from tests.data.files import make_busi

SHARES = (0.7, 0.15, 0.15)


def index_of(cases) -> DatasetIndex:
    cases = tuple(cases)
    classes = tuple(sorted({case.label for case in cases if case.label is not None}))
    return DatasetIndex(Path("."), "manifest", classes, cases)


def cases_with(labels: str, groups=None, splits=None) -> list[Case]:
    groups, splits = groups or [None] * len(labels), splits or [None] * len(labels)
    rows = zip(labels, groups, splits, strict=True)
    return [Case(f"{i:03d}", Path(f"{i}.png"), label=a, group=g, split=s) for i, (a, g, s) in enumerate(rows)]


def ids(split) -> dict[str, list[str]]:
    return {name: [case.id for case in cases] for name, cases in split.items()}


def split_without_images(index, *args, near=(), **kwargs):
    return split_cases(index, *args, duplicate_groups=near, **kwargs)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_grouped_is_a_partition_that_never_divides_a_group(data, seed):
    size = data.draw(st.integers(3, 40))
    labels = "".join(data.draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size)))
    groups = data.draw(st.lists(st.sampled_from([None, "p", "q", "r"]), min_size=size, max_size=size))
    cases = cases_with(labels, groups)
    near = [("000", "001")]
    try:
        split = split_without_images(index_of(cases), near=near, seed=seed)
    except UserError as caught:
        assert "independent groups" in str(caught)
        return
    assert sorted(name for part in ids(split).values() for name in part) == [case.id for case in cases]
    assert all(split.values())
    part = {name: key for key, names in ids(split).items() for name in names}
    assert part["000"] == part["001"]
    for group in "pqr":
        assert len({part[case.id] for case in cases if case.group == group}) <= 1


def test_near_duplicates_and_declared_groups_are_joined():
    cases = cases_with("a" * 12, ["p", "p", None, "q", "q"] + [None] * 7)
    for seed in range(20):
        split = split_without_images(index_of(cases), near=[("001", "002", "003")], seed=seed)
        assert sum({"000", "001", "002", "003", "004"} <= set(names) for names in ids(split).values()) == 1


@pytest.mark.parametrize("policy", ["grouped", "random"])
def test_fractions_are_met_in_every_class(policy):
    cases = cases_with("a" * 200 + "b" * 100 + "c" * 20)
    split = split_without_images(index_of(cases), policy, SHARES)
    for name, share in zip(("train", "val", "test"), SHARES, strict=True):
        count = Counter(case.label for case in split[name])
        assert [count[label] for label in "abc"] == [200 * share, 100 * share, 20 * share]


def test_a_rare_class_in_large_groups_is_shared_out_too():
    """Four patients of five images each hold all of class b, beside two hundred single images of class a."""
    cases = cases_with("a" * 200 + "b" * 20, [None] * 200 + [f"p{i // 5}" for i in range(20)])
    for seed in range(10):
        split = split_without_images(index_of(cases), fractions=(0.5, 0.25, 0.25), seed=seed)
        count = {name: Counter(case.label for case in part) for name, part in split.items()}
        assert [count[name]["b"] for name in ("train", "val", "test")] == [10, 5, 5]
        assert [count[name]["a"] for name in ("train", "val", "test")] == [100, 50, 50]


def test_order_on_disk_does_not_matter_and_the_seed_does():
    cases = cases_with("ab" * 30)
    shuffled = random.Random(0).sample(cases, len(cases))
    first = ids(split_without_images(index_of(cases), seed=5))
    assert first == ids(split_without_images(index_of(shuffled), seed=5))
    assert first != ids(split_without_images(index_of(cases), seed=6))


def test_unknown_classes_and_zero_fractions():
    cases = [replace(case, label=None) for case in cases_with("a" * 10)]
    split = split_without_images(index_of(cases), fractions=(0.8, 0.2, 0))
    assert [len(split[name]) for name in ("train", "val", "test")] == [8, 2, 0]


def test_random_warns_of_the_leak():
    cases = cases_with("a" * 40)
    near = [(f"{i:03d}", f"{i + 1:03d}") for i in range(0, 40, 2)]
    with pytest.warns(LeakWarning, match=r"random split leaks: \d+ groups"):
        split = split_without_images(index_of(cases), "random", near=near)
    assert leaks(split, near)


def test_official_keeps_the_column_and_takes_val_by_groups():
    cases = cases_with("ab" * 20, ["p", "p"] + [None] * 38, ["train"] * 30 + ["test"] * 10)
    split = split_without_images(index_of(cases), "official", (0.6, 0.2, 0.2))
    assert ids(split)["test"] == [case.id for case in cases[30:]]
    assert len(split["val"]) in (7, 8) and len(split["train"]) + len(split["val"]) == 30
    assert sum({"000", "001"} <= set(names) for names in ids(split).values()) == 1


def test_official_warns_of_leaks_and_of_images_without_a_split():
    cases = cases_with("a" * 6, None, ["train", "train", "val", "test", "test", None])
    with pytest.warns(UserWarning) as caught:
        split = split_without_images(index_of(cases), "official", near=[("001", "003")])
    messages = [str(warning.message) for warning in caught]
    assert any("1 images without a split" in message for message in messages)
    assert any("official split leaks: 1 groups" in message for message in messages)
    assert ids(split) == {"train": ["000", "001"], "val": ["002"], "test": ["003", "004"]}


@pytest.mark.parametrize(
    ("policy", "options", "part"),
    [
        ("stratified", {}, "policy is 'stratified'"),
        ("grouped", {"fractions": (0.7, 0.2)}, "fractions"),
        ("grouped", {"fractions": (0.7, 0.2, 0.2)}, "sum to 1"),
        ("grouped", {"fractions": (1.2, -0.1, -0.1)}, "fractions"),
        ("grouped", {"fractions": (0.0, 0.5, 0.5)}, "train fraction"),
        ("grouped", {"fractions": (float("nan"), 0.5, 0.5)}, "fractions"),
        ("grouped", {"seed": -1}, "seed is -1"),
        ("official", {}, "no case is marked train"),
    ],
)
def test_bad_requests(policy, options, part):
    with pytest.raises(UserError, match=part):
        split_without_images(index_of(cases_with("aabb")), policy, **options)


def test_too_few_groups():
    with pytest.raises(UserError, match="2 independent groups"):
        split_without_images(index_of(cases_with("aaaa", ["p", "p", "q", "q"])))


def test_duplicates_are_found_from_the_files(tmp_path):
    root = make_busi(tmp_path, each=5)
    folder = root / "Dataset_BUSI_with_GT"
    copy = (folder / "malignant" / "malignant (3).png").read_bytes()
    for other in ("benign/benign (1).png", "normal/normal (2).png"):
        (folder / other).write_bytes(copy)
    index = read_dataset(root)
    for seed in range(5):
        split = ids(split_cases(index, seed=seed))
        copies = {"malignant/malignant (3).png", "benign/benign (1).png", "normal/normal (2).png"}
        assert sum(copies <= set(names) for names in split.values()) == 1


def test_no_leak_on_real_busi(shared_dir):
    index = read_dataset(shared_dir / "data" / "BUSI", verify=False)
    groups = near_duplicate_groups(index)
    for seed in range(3):
        split = split_cases(index, seed=seed, duplicate_groups=groups)
        assert leaks(split, groups) == []
        for name, share in zip(("train", "val", "test"), SHARES, strict=True):
            count = Counter(case.label for case in split[name])
            assert all(
                abs(count[c] - share * n) < 3
                for c, n in (("benign", 437), ("malignant", 210), ("normal", 133))
            )
    with pytest.warns(LeakWarning, match="random split leaks"):
        split_cases(index, "random", duplicate_groups=groups)
