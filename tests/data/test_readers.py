"""Folders and manifests into cases: layouts found, files matched, and everything odd listed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bti_fast.data import read_dataset
from bti_fast.data.layouts import LAYOUTS
from bti_fast.errors import UserError
from tests.data.files import make_busi, png_bytes, save, square_mask, texture


@pytest.fixture
def busi(tmp_path):
    return make_busi(tmp_path) / "Dataset_BUSI_with_GT"


@pytest.fixture
def listed(tmp_path):
    """A folder with four images and two masks, and a function that writes a manifest and reads it."""
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png", texture(i))
    save(tmp_path / "masks" / "0.png", square_mask())
    save(tmp_path / "masks" / "1.png", square_mask())

    def read(text: str | bytes, **options):
        path = tmp_path / "manifest.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_dataset(path, **options)

    read.folder = tmp_path
    return read


def kinds(index) -> list[str]:
    return [problem.kind for problem in index.problems]


def test_busi_from_its_folder_and_from_its_parent(busi):
    inner, outer = read_dataset(busi), read_dataset(busi.parent)
    assert inner == outer and inner.layout == "busi" and inner.problems == []
    assert inner.classes == ("benign", "malignant", "normal")
    assert [case.id for case in inner.cases[:2]] == ["benign/benign (1).png", "benign/benign (2).png"]
    assert all(case.mask_known and case.label == case.id.split("/")[0] for case in inner.cases)


def test_busi_natural_order(tmp_path):
    index = read_dataset(make_busi(tmp_path, each=11))
    assert [case.image.name for case in index.cases[8:11]] == [f"benign ({i}).png" for i in (9, 10, 11)]


def test_busi_several_masks_and_missing_masks(busi):
    save(busi / "benign" / "benign (1)_mask_1.png", square_mask())
    (busi / "benign" / "benign (2)_mask.png").unlink()
    (busi / "normal" / "normal (3)_mask.png").unlink()
    index = read_dataset(busi)
    case = {case.id: case for case in index.cases}
    assert [p.name for p in case["benign/benign (1).png"].masks] == [
        "benign (1)_mask.png",
        "benign (1)_mask_1.png",
    ]
    assert not case["benign/benign (2).png"].mask_known
    assert case["normal/normal (3).png"].mask_known and case["normal/normal (3).png"].masks == ()
    assert kinds(index) == ["missing-mask"] and not index.problems[0].excluded


def test_busi_stray_files(busi):
    (busi / "benign" / ".DS_Store").write_bytes(b"x")
    (busi / "benign" / "Thumbs.db").write_bytes(b"x")
    (busi / "benign" / "notes.txt").write_text("x")
    save(busi / "malignant" / "malignant (99)_mask.png", square_mask())
    index = read_dataset(busi)
    assert sorted(kinds(index)) == ["orphan-mask", "unexpected-file"] and len(index) == 12


def test_busi_missing_class_folder(busi):
    for path in (busi / "normal").iterdir():
        path.unlink()
    assert kinds(read_dataset(busi)) == ["empty-class"]
    (busi / "normal").rmdir()
    with pytest.raises(UserError, match="class folder missing: normal"):
        read_dataset(busi)
    index = read_dataset(busi, allow_missing_classes=True)
    assert index.classes == ("benign", "malignant") and kinds(index) == ["missing-class"]


def test_bad_files_are_left_out_and_the_rest_goes_on(busi):
    (busi / "benign" / "benign (1).png").write_bytes(b"not an image")
    (busi / "benign" / "benign (2)_mask.png").write_bytes(png_bytes(square_mask())[:60])
    save(busi / "benign" / "benign (3)_mask.png", square_mask(20, 30))
    save(busi / "malignant" / "malignant (1)_mask.png", square_mask() // 255 * 7)
    (busi / "malignant" / "malignant (2).png").write_bytes(b"")
    index = read_dataset(busi)
    assert len(index) == 12 - 5 and all(problem.excluded for problem in index.problems)
    assert sorted(kinds(index)) == [
        "mask-size",
        "mask-values",
        "unreadable-image",
        "unreadable-image",
        "unreadable-mask",
    ]
    (size,) = (problem for problem in index.problems if problem.kind == "mask-size")
    assert "benign (3)_mask.png: mask is 30 x 20 but its image is 50 x 40" in size.message
    assert len(read_dataset(busi, verify=False)) == 12


def test_warnings_name_a_few_of_each_kind_and_count_the_rest(busi):
    for number in (1, 2, 3):
        (busi / "benign" / f"benign ({number}).png").write_bytes(b"")
    save(busi / "malignant" / "malignant (1)_mask.png", square_mask() // 255 * 7)
    index = read_dataset(busi)
    assert sorted(kinds(index)) == ["mask-values", *["unreadable-image"] * 3]
    told = index.warnings(of_each=2)
    assert len(told) == 2 + 1 + 1 and sum("malignant (1)_mask.png" in line for line in told) == 1
    rest = "warning: 1 more of this kind (unreadable-image); bti-fast data check"
    assert f"{rest} {index.root} --json FILE lists them" in told
    assert index.warnings(of_each=3) == [f"warning: {problem.message}" for problem in index.problems]


def test_nothing_usable_is_an_error(busi):
    for path in busi.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable image \(12 problems"):
        read_dataset(busi)


def test_unknown_folder_lists_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="empty folder"):
        read_dataset(tmp_path)
    save(tmp_path / "a.png", texture(0))
    with pytest.raises(UserError) as caught:
        read_dataset(tmp_path)
    assert all(known.looks_like in str(caught.value) for known in LAYOUTS.values())
    with pytest.raises(UserError, match="no such file or folder"):
        read_dataset(tmp_path / "missing")
    with pytest.raises(UserError, match="layout is 'dicom'"):
        read_dataset(tmp_path, "dicom")
    with pytest.raises(UserError, match="not a busi data set"):
        read_dataset(tmp_path, "busi")


def test_folder_that_cannot_be_listed(busi, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(UserError, match="cannot be listed .Permission denied"):
        read_dataset(busi)


def test_manifest_every_column(listed):
    index = listed(
        "image,mask,class,split,group\n"
        "images/0.png,masks/0.png; masks/1.png,b,train,p1\n"
        "images/1.png,,a,validation,p1\n"
        "images/2.png,empty,,test,\n"
        "images\\3.png,,,,\n"
    )
    assert index.layout == "manifest" and index.classes == ("a", "b") and index.problems == []
    first, second, third, fourth = index.cases
    assert [path.name for path in first.masks] == ["0.png", "1.png"] and first.mask_known
    assert (first.label, first.split, first.group) == ("b", "train", "p1")
    assert (second.mask_known, second.split) == (False, "val")
    assert third.mask_known and third.masks == () and third.label is None
    assert (fourth.id, fourth.label, fourth.split, fourth.group) == ("images/3.png", None, None, None)
    assert read_dataset(listed.folder) == index


def test_manifest_only_images_in_any_order_with_a_byte_order_mark(listed):
    index = listed(b"\xef\xbb\xbfclass , IMAGE\r\na,images/1.png\r\nb,images/0.png\r\n")
    assert [(case.id, case.label) for case in index.cases] == [("images/0.png", "b"), ("images/1.png", "a")]


def test_manifest_bad_rows_become_problems(listed):
    index = listed(
        "image,mask,split\n"
        "images/0.png,masks/0.png,train\n"
        "images/missing.png,,train\n"
        "images/1.png,masks/missing.png,train\n"
        "images/2.png,,holdout\n"
        "images/0.png,,test\n"
        ",,train\n"
        "images/3.png,,train,extra\n"
    )
    assert [case.id for case in index.cases] == ["images/0.png"]
    assert kinds(index) == ["bad-row"] * 6 and all(problem.excluded for problem in index.problems)
    messages = [problem.message for problem in index.problems]
    for message, (line, part) in zip(
        messages,
        [
            (3, "images/missing.png: no such file"),
            (4, "masks/missing.png: no such file"),
            (5, "split is 'holdout'"),
            (6, "listed twice"),
            (7, "no image named"),
            (8, "more values than columns"),
        ],
        strict=True,
    ):
        assert f"line {line}:" in message and part in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("image,label\nimages/0.png,a\n", "unknown column label"),
        ("file,class\nimages/0.png,a\n", "unknown column file"),
        ("mask,class\nmasks/0.png,a\n", "no image column"),
        ("image;class\nimages/0.png;a\n", "needs commas"),
        ("image,class,class\nimages/0.png,a,b\n", "class appears twice"),
        ("", "empty file"),
        ("image\n", "no usable image"),
        (b"image\nimages/\xff.png\n", "not UTF-8"),
        ('image\n"' + "x" * 200_000 + '"\n', "not a CSV file"),
    ],
)
def test_manifest_refused(listed, text, part):
    with pytest.raises(UserError) as caught:
        listed(text)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_manifest_of_another_data_set_is_not_taken_for_ours(tmp_path):
    (tmp_path / "manifest.csv").write_text("relative_path,filename\na,b\n")
    with pytest.raises(
        UserError, match="no known data set layout found; its manifest.csv has no column image"
    ):
        read_dataset(tmp_path)


def test_manifest_beside_class_folders_is_not_passed_over(busi):
    (busi / "manifest.csv").write_text("image,class,group\nbenign/benign (1).png,b,patient 1\n")
    with pytest.raises(UserError, match="fits the layouts busi and manifest; say which with --layout"):
        read_dataset(busi)
    assert len(read_dataset(busi, "busi")) == 12 and len(read_dataset(busi, "manifest")) == 1


def test_manifest_rows_of_a_spreadsheet(listed):
    index = listed("image,class\nimages/0.png,a,,\n,\nimages/1.png,b\n,,,,\n")
    assert len(index) == 2 and index.problems == []


def test_manifest_mistakes_that_would_train_in_silence(listed):
    long = "x" * 5000
    index = listed(
        "image,mask,class\nimages/0.png,images/0.png,a\nimages/1.png,masks/1.png,Benign\n"
        f"images/2.png,,benign\n{long},,a\n"
    )
    assert [case.label for case in index.cases] == ["Benign", "benign"]
    assert kinds(index) == ["bad-row", "bad-row", "similar-classes"]
    for problem, part in zip(
        index.problems, ("the mask is the image itself", "too long", "'Benign' and 'benign'"), strict=True
    ):
        assert part in problem.message and len(problem.message) < 500


def test_images_turned_by_their_exif_tag(listed):
    """Half a turn leaves the size as it was, so that only the tag tells; a quarter gives another size."""
    for name, tag in (("half", 3), ("quarter", 6)):
        exif = Image.Exif()
        exif[0x0112] = tag
        save(listed.folder / "images" / f"{name}.jpg", texture(5), exif=exif)
        save(listed.folder / "masks" / f"{name}.jpg", square_mask(), exif=exif)
    index = listed(
        "image,mask\nimages/half.jpg,masks/0.png\nimages/quarter.jpg,masks/1.png\nimages/2.png,masks/0.png\n"
    )
    assert [case.image.stem for case in index.cases] == ["2", "half"]
    assert kinds(index) == ["mask-size", "exif-turned"]
    assert "upright as the image's EXIF tag" in index.problems[0].message and not index.problems[1].excluded
    tagged = listed("image,mask\nimages/half.jpg,masks/half.jpg\nimages/quarter.jpg,masks/quarter.jpg\n")
    assert len(tagged) == 2 and tagged.problems == []


def test_real_busi(shared_dir):
    index = read_dataset(shared_dir / "data" / "BUSI")
    labels = [case.label for case in index.cases]
    assert [labels.count(name) for name in index.classes] == [437, 210, 133] and index.problems == []
    assert sum(len(case.masks) for case in index.cases) == 798
    assert sum(len(case.masks) > 1 for case in index.cases) == 17
    assert np.all([case.mask_known for case in index.cases])
