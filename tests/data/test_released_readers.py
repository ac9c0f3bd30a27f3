"""HAM10000 and BRISC 2025 as released: what is read, listed and refused, and splits that hold."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from dataclasses import replace

import pytest

from bti_fast.data import LeakWarning, check_dataset, near_duplicate_pairs, read_dataset, split_cases
from bti_fast.data.splits import leak_groups, leaks
from bti_fast.errors import UserError
from tests.data.files import make_brisc2025, make_ham10000, save, square_mask, texture


@pytest.fixture
def ham(tmp_path):
    return make_ham10000(tmp_path)


@pytest.fixture
def brisc(tmp_path):
    return make_brisc2025(tmp_path)


def kinds(index) -> list[str]:
    return sorted(problem.kind for problem in index.problems)


def metadata(ham, change) -> None:
    table = ham / "HAM10000_metadata.csv"
    table.write_text("\n".join(change(table.read_text().splitlines())) + "\n")


def test_ham10000_from_its_folder_and_from_its_parent(ham):
    index = read_dataset(ham)
    assert index == read_dataset(ham.parent) and (index.layout, index.problems) == ("ham10000", [])
    assert index.classes == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc") and len(index) == 28
    assert Counter(case.label for case in index.cases) == dict.fromkeys(index.classes, 4)
    case = index.cases[0]
    assert (case.id, case.group, case.split) == (
        "HAM10000_images_part_1/ISIC_0000000.jpg",
        "HAM_akiec_0",
        None,
    )
    assert [path.name for path in case.masks] == ["ISIC_0000000_segmentation.png"] and case.mask_known


def test_ham10000_lesions_stay_together(ham):
    index = read_dataset(ham)
    for seed in range(3):
        split = split_cases(index, seed=seed)
        parts = {}
        for name, cases in split.items():
            for case in cases:
                parts.setdefault(case.group, set()).add(name)
        assert len(parts) == 14 and all(len(found) == 1 for found in parts.values())
    with pytest.warns(LeakWarning, match="the random split leaks"):
        split_cases(index, "random")
    with pytest.raises(UserError, match="no case is marked train"):
        split_cases(index, "official")


def test_ham10000_defects_are_listed_and_the_rest_goes_on(ham):
    masks = ham / "HAM10000_segmentations_lesion_tschandl"
    (masks / "ISIC_0000000_segmentation.png").unlink()
    save(masks / "ISIC_9999999_segmentation.png", square_mask())
    save(masks / "ISIC_0000001.png", square_mask())
    save(masks / "ISIC_0000002_segmentation.png", square_mask(10, 10))
    save(ham / "HAM10000_images_part_1" / "ISIC_7777777.jpg", texture(99))
    (ham / "HAM10000_images_part_2" / "ISIC_0000000.jpg").write_bytes(b"a second file of this name")
    (ham / "HAM10000_images_part_1" / "ISIC_0000004.jpg").write_bytes(b"broken")
    more = [
        "HAM_x,ISIC_8888888,nv,,,,",  # no such image
        "HAM_x,ISIC_0000006,nv,,,,",  # listed twice
        "HAM_x,ISIC_7777777,wart,,,,",  # unknown class
        ",ISIC_7777777,nv,,,,",  # no lesion
    ]
    metadata(ham, lambda lines: lines + more)
    index = read_dataset(ham)
    assert kinds(index) == sorted(
        ["missing-mask", "orphan-mask", "unexpected-file", "mask-size", "unlisted-image", "unexpected-file"]
        + ["unreadable-image", "missing-image", *["bad-row"] * 3]
    )
    assert len(index) == 28 - 2 and not index.cases[0].mask_known
    said = " ".join(problem.message for problem in index.problems)
    for part in ("ISIC_0000006 is listed twice", "dx is 'wart'; needs akiec", "no lesion_id", "line 30:"):
        assert part in said
    report = check_dataset(index)
    assert not report.ok and report.masks["unknown"] == 1


def test_ham10000_without_masks_or_a_class(ham):
    for path in (ham / "HAM10000_segmentations_lesion_tschandl").iterdir():
        path.unlink()
    (ham / "HAM10000_segmentations_lesion_tschandl").rmdir()
    metadata(ham, lambda lines: [line for line in lines if ",df," not in line])
    index = read_dataset(ham)
    assert not any(case.mask_known for case in index.cases) and len(index) == 24
    assert Counter(kinds(index)) == {"missing-folder": 1, "empty-class": 1, "unlisted-image": 4}
    assert "df" in index.classes


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda root: (root / "HAM10000_metadata.csv").unlink(), "no HAM10000_metadata.csv"),
        (
            lambda root: (root / "HAM10000_images_part_2").rename(root / "part_2"),
            "image folder missing: HAM10000_images_part_2",
        ),
        (lambda root: (root / "HAM10000_metadata.csv").write_text(""), "no column lesion_id, image_id, dx"),
        (
            lambda root: (root / "HAM10000_metadata.csv").write_text("lesion_id,image_id\n"),
            "no column dx; needs lesion_id, image_id, dx",
        ),
        (lambda root: (root / "HAM10000_metadata.csv").write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
    ],
)
def test_ham10000_refused(ham, change, part):
    change(ham)
    with pytest.raises(UserError) as caught:
        read_dataset(ham)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_brisc2025_from_its_folder_and_from_its_parent(brisc):
    index = read_dataset(brisc)
    assert index == read_dataset(brisc.parent) and (index.layout, index.problems) == ("brisc2025", [])
    assert index.classes == ("glioma", "meningioma", "no_tumor", "pituitary")
    assert Counter((case.label, case.split) for case in index.cases) == {
        **{(name, "train"): 3 for name in index.classes},
        **{(name, "test"): 2 for name in index.classes},
    }
    assert all(case.mask_known and bool(case.masks) == (case.label != "no_tumor") for case in index.cases)
    split = split_cases(index, "official", (0.6, 0.2, 0.2))
    assert {case.split for case in split["test"]} == {"test"} and len(split["test"]) == 8
    assert {case.split for name in ("train", "val") for case in split[name]} == {"train"} and split["val"]


def test_brisc2025_official_split_that_leaks(brisc):
    index = read_dataset(brisc)
    train, test = (next(case for case in index.cases if case.split == part) for part in ("train", "test"))
    test.image.write_bytes(train.image.read_bytes())
    index = read_dataset(brisc)
    with pytest.warns(LeakWarning, match=r"the official split leaks: 1 groups .*\(2 images\)"):
        split_cases(index, "official", (0.6, 0.2, 0.2))
    assert check_dataset(index).leaks == ((test.id, train.id),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_cases(index, "grouped")
    assert leaks(split, [(train.id, test.id)]) == []


def test_brisc2025_defects_are_listed_and_the_rest_goes_on(brisc):
    images, masks = brisc / "classification_task", brisc / "segmentation_task"
    (masks / "train" / "masks" / "brisc2025_train_00001_gl_ax_t1.png").unlink()
    save(masks / "train" / "masks" / "brisc2025_train_09999_gl_ax_t1.png", square_mask())
    (masks / "train" / "masks" / "brisc2025_train_00002_gl_ax_t1.png").write_bytes(b"broken")
    save(masks / "test" / "images" / "brisc2025_test_00013_gl_ax_t1.jpg", texture(13))  # a copy is fine
    save(masks / "test" / "images" / "brisc2025_test_08888_gl_ax_t1.jpg", texture(8))
    save(images / "train" / "glioma" / "brisc2025_train_00050_me_ax_t1.jpg", texture(50))
    save(images / "train" / "no_tumor" / "brisc2025_test_00051_nt_ax_t1.jpg", texture(51))
    for path in (images / "test" / "pituitary").iterdir():
        path.unlink()
    for path in (masks / "test" / "masks").glob("*_pi_*"):
        path.unlink()
    index = read_dataset(brisc)
    assert kinds(index) == [
        "class-mismatch",
        "empty-class",
        "missing-mask",
        "missing-mask",
        "orphan-mask",
        "split-mismatch",
        "unlisted-image",
        "unreadable-mask",
    ]
    assert len(index) == 20 - 2 - 1 + 2


def test_brisc2025_missing_folders(brisc):
    (brisc / "classification_task" / "test" / "glioma").rename(brisc / "elsewhere")
    with pytest.raises(UserError, match="class folder missing: classification_task/test/glioma; needs"):
        read_dataset(brisc)
    index = read_dataset(brisc, allow_missing_classes=True)
    assert "missing-class" in kinds(index) and index.classes == (
        "glioma",
        "meningioma",
        "no_tumor",
        "pituitary",
    )
    (brisc / "elsewhere").rename(brisc / "classification_task" / "test" / "glioma")
    (brisc / "segmentation_task").rename(brisc / "elsewhere")
    index = read_dataset(brisc)
    assert kinds(index) == ["missing-folder"] * 2
    assert [case.mask_known for case in index.cases] == [case.label == "no_tumor" for case in index.cases]


def test_real_ham10000(shared_dir):
    index = read_dataset(shared_dir / "data" / "HAM10000", verify=False)
    found = Counter(case.label for case in index.cases)
    assert [found[name] for name in index.classes] == [327, 160, 302, 115, 336, 2118, 142]
    assert index.problems == [] and all(len(case.masks) == 1 for case in index.cases)
    assert len({case.group for case in index.cases}) == 2576
    with (shared_dir / "data" / "HAM10000" / "HAM10000_metadata.csv").open() as stream:
        lesion = {row["image_id"]: row["lesion_id"] for row in csv.DictReader(stream)}
    split = split_cases(index, duplicate_groups=[])
    members = {name: {lesion[case.image.stem] for case in cases} for name, cases in split.items()}
    assert not members["train"] & members["val"] and not (members["train"] | members["val"]) & members["test"]
    for name in index.classes:  # grouped, and still in proportion
        share = sum(case.label == name for case in split["train"]) / found[name]
        assert share == pytest.approx(0.7, abs=0.02)
    with pytest.warns(LeakWarning, match="random split leaks"):
        split_cases(index, "random", duplicate_groups=[])


def test_real_brisc2025(shared_dir):
    """SPEC §8: 103 official test images have a near-duplicate in train; grouped splits have none."""
    folder = shared_dir / "data" / "BRISC2025"
    index = read_dataset(folder, verify=False)
    assert index.problems == [] and len(index) == 6000
    assert sum(len(case.masks) for case in index.cases) == 4793
    with (folder / "test_train_near_duplicates.csv").open() as stream:
        known = [(row["test_image"], row["train_image"]) for row in csv.DictReader(stream)]
    by_name = {case.image.name: case for case in index.cases}
    named = {name for pair in known for name in pair}
    subset = replace(index, cases=tuple(by_name[name] for name in sorted(named)))
    found = {frozenset((pair.a, pair.b)) for pair in near_duplicate_pairs(subset)}
    ids = [tuple(by_name[name].id for name in pair) for pair in known]
    assert len(ids) == 103 and {frozenset(pair) for pair in ids} <= found
    with pytest.warns(LeakWarning, match="the official split leaks"):
        official = split_cases(index, "official", duplicate_groups=ids)
    assert len(leaks(official, ids)) == 103 and len(official["test"]) == 1000
    assert leaks(split_cases(index, duplicate_groups=ids), ids) == []
    with pytest.warns(LeakWarning):
        split_cases(subset, "official")
    assert leaks(split_cases(subset), ids) == []


def test_groups_from_elsewhere_join_those_of_the_data(ham, tmp_path):
    """A patient with two lesions keeps all images of both in one split."""
    table = tmp_path / "patients.csv"
    table.write_text(
        "group,image,note\np1,ISIC_0000000.jpg,x\np1,HAM10000_images_part_1/ISIC_0000002.jpg,\n"
        "p2,gone.jpg,\n,ISIC_0000004.jpg,\n"
    )
    plain, index = read_dataset(ham), read_dataset(ham, groups=table)
    group = {case.image.stem: case.group for case in index.cases}
    assert len({group[f"ISIC_000000{i}"] for i in range(4)}) == 1
    assert len(set(group.values())) == 13 and len({case.group for case in plain.cases}) == 14
    assert kinds(index) == ["unknown-group-rows"] and check_dataset(index).ok
    for text, message in (
        ("image,patient\na,b\n", "no column group; needs image and group"),
        ("image,group\na,b\n", "names no image of"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read_dataset(ham, groups=table)
    with pytest.raises(UserError, match="none.csv: cannot be read"):
        read_dataset(ham, groups=tmp_path / "none.csv")


def test_real_brisc2025_patients(shared_dir, tmp_path):
    """Of the official test images matched to a patient, 150 of 160 show one who is in train."""
    folder = shared_dir / "data" / "BRISC2025"
    with (folder / "figshare_patient_match.csv").open() as stream:
        known = {row["brisc_image"]: row["figshare_pid"] for row in csv.DictReader(stream)}
    table = tmp_path / "patients.csv"
    table.write_text("image,group\n" + "".join(f"{name},{pid}\n" for name, pid in known.items()))
    index = read_dataset(folder, verify=False, groups=table)
    groups = leak_groups(index.cases, [])
    with pytest.warns(LeakWarning, match="the official split leaks: 108 groups"):
        official = split_cases(index, "official", duplicate_groups=[])
    trained = {known.get(case.image.name) for name in ("train", "val") for case in official[name]} - {None}
    tested = [known[case.image.name] for case in official["test"] if case.image.name in known]
    assert len(tested) == 160 and sum(pid in trained for pid in tested) == 150
    assert leaks(split_cases(index, duplicate_groups=[]), groups) == []
