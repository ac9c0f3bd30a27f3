"""The check names what was planted in a data set, as JSON and on the terminal, and passes a clean one."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from rich.console import Console

from bti_fast.cli import main
from bti_fast.data import check_dataset, make_phantoms, read_dataset, split_cases
from tests.data.files import make_busi, save, square_mask, texture


def kinds(report) -> list[str]:
    return sorted(problem.kind for problem in report.problems)


def rendered(report, width: int = 100) -> str:
    stream = io.StringIO()
    report.render(Console(file=stream, width=width))
    return stream.getvalue()


@pytest.fixture
def busi(tmp_path):
    return make_busi(tmp_path) / "Dataset_BUSI_with_GT"


def test_clean_data(busi):
    report = check_dataset(read_dataset(busi))
    assert report.ok and report.problems == () and report.pairs == () and report.images == 12
    assert report.counts == {"benign": {"": 4}, "malignant": {"": 4}, "normal": {"": 4}}
    assert report.masks == {"lesion": 8, "empty": 4, "unknown": 0}
    assert report.sizes == {"smallest": (40, 50), "median": (40, 50), "largest": (40, 50)}
    assert "OK: every listed image" in rendered(report)


def test_everything_planted_is_found(busi):
    (busi / "benign" / "benign (1).png").write_bytes(b"broken")
    save(busi / "benign" / "benign (2)_mask.png", square_mask(10, 10))
    save(busi / "benign" / "benign (3)_mask.png", 0 * square_mask())
    grey = square_mask()
    grey[0, :3] = (100, 100, 200)
    save(busi / "malignant" / "malignant (1)_mask.png", grey)
    save(busi / "malignant" / "malignant (2).png", texture(0).astype(np.uint16))
    (busi / "malignant" / "malignant (3)_mask.png").unlink()
    save(busi / "malignant" / "malignant (4)_mask.png", 255 - square_mask())
    save(busi / "normal" / "normal (1)_mask.png", square_mask())
    (busi / "normal" / "normal (2).png").write_bytes((busi / "benign" / "benign (4).png").read_bytes())
    report = check_dataset(read_dataset(busi))
    assert kinds(report) == [
        "dark-16-bit",
        "empty-mask",
        "filled-mask",
        "grey-mask",
        "inverted-mask",
        "mask-size",
        "missing-mask",
        "unreadable-image",
    ]
    assert not report.ok and sorted(p.kind for p in report.errors) == ["mask-size", "unreadable-image"]
    message = {problem.kind: problem.message for problem in report.problems}
    assert "3 mask pixels between 0 and 255 (values 100, 200)" in message["grey-mask"]
    assert "mask is 10 x 10 but its image is 50 x 40" in message["mask-size"]
    (pair,) = report.cross_class
    assert (pair.a, pair.b, pair.exact) == ("benign/benign (4).png", "normal/normal (2).png", True)
    assert report.masks == {"lesion": 5, "empty": 4, "unknown": 1}
    assert "normal/normal (2).png  (same pixels)" in rendered(report)


def test_json_and_tables_tell_the_same(busi):
    (busi / "benign" / "benign (1).png").write_bytes(b"broken")
    report = check_dataset(read_dataset(busi))
    found = json.loads(report.to_json())
    assert found == report.to_dict() and found["ok"] is False and found["images"] == 11
    assert found["problem_counts"] == {"unreadable-image": 1}
    assert found["problems"][0]["severity"] == "error" and found["problems"][0]["excluded"] is True
    text = rendered(report)
    assert "benign (1).png: not an image" in text and "NOT OK: 1 unusable" in text


def test_files_that_break_after_reading_are_found(busi):
    index = read_dataset(busi)
    (busi / "benign" / "benign (1).png").write_bytes(b"broken")
    (busi / "benign" / "benign (2)_mask.png").write_bytes(b"")
    report = check_dataset(index)
    assert kinds(report) == ["unreadable-image", "unreadable-mask"] and not report.ok


def test_leaks_between_declared_and_between_given_splits(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", texture(i % 5))
    rows = ["0,a,train,", "1,a,train,p", "2,b,val,p", "3,,test,", "4,b,train,", "5,a,test,"]
    lines = [f"{row.split(',', 1)[0]}.png,{row.split(',', 1)[1]}" for row in rows]
    (tmp_path / "manifest.csv").write_text("\n".join(["image,class,split,group", *lines]) + "\n")
    index = read_dataset(tmp_path)
    report = check_dataset(index)
    assert set(report.leaks) == {("0.png", "5.png"), ("1.png", "2.png")} and not report.ok
    assert report.counts == {
        "a": {"train": 2, "val": 0, "test": 1},
        "b": {"train": 1, "val": 1, "test": 0},
        None: {"train": 0, "val": 0, "test": 1},
    }
    assert report.masks["unknown"] == 6 and report.cross_class == ()
    text = rendered(report)
    assert "(no class)" in text and "2 leaks between splits" in text
    assert json.loads(report.to_json())["leaks"] == [list(group) for group in report.leaks]
    assert check_dataset(index, splits=split_cases(index, fractions=(0.5, 0.25, 0.25))).ok


def test_names_that_are_no_text_are_shown_on_any_terminal(tmp_path, capsys):
    make_phantoms(tmp_path, 4, size=32)
    name = os.fsdecode(b"stray\xff.png")
    rows = f"image,class\nimages/phantom_0000.png,a\nimages/{name},a\n"
    (tmp_path / "manifest.csv").write_text(rows, errors="surrogateescape")
    assert main(["data", "check", str(tmp_path)]) == 2  # a CSV file in UTF-8 cannot say that name
    busi = make_busi(tmp_path / "busi") / "Dataset_BUSI_with_GT"
    try:
        (busi / "benign" / name).write_bytes(b"")
    except OSError:
        pytest.skip("this disk takes names in UTF-8 only")
    assert main(["data", "check", str(busi)]) == 1
    assert "stray" in capsys.readouterr().out


def test_names_with_markup_and_no_class_at_all(tmp_path):
    save(tmp_path / "[red]x.png", texture(0))
    save(tmp_path / "[red]y.png", texture(0))
    (tmp_path / "manifest.csv").write_text("image\n[red]x.png\n[red]y.png\n[red]z.png\n")
    report = check_dataset(read_dataset(tmp_path))
    assert "[red]z.png: no such file" in rendered(report, width=300)
    assert report.duplicate_images == 2 and report.counts == {None: {"": 2}}


def test_long_lists_are_cut_on_the_terminal_only(tmp_path):
    make_phantoms(tmp_path, 1, 32)
    rows = "".join(f"images/missing_{i}.png\n" for i in range(40))
    (tmp_path / "manifest.csv").write_text("image\nimages/phantom_0000.png\n" + rows)
    report = check_dataset(read_dataset(tmp_path))
    assert len(report.to_dict()["problems"]) == 40 and "and 28 more" in rendered(report)


def test_real_busi(shared_dir):
    report = check_dataset(read_dataset(shared_dir / "data" / "BUSI", verify=False))
    assert report.ok and report.problems == () and len(report.cross_class) == 7
    assert report.masks == {"lesion": 647, "empty": 133, "unknown": 0}
    assert 254 <= report.duplicate_images <= 258
