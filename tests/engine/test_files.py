"""Files come whole or not at all, and a bad output folder is named before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bti_fast.engine import files
from bti_fast.errors import UserError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")

    def half(path: Path) -> None:
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"table.csv: cannot be written \(No space left on device\)"):
        files.write_atomic(target, half)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "table.csv", half)
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(tmp_path / "a.json", {"iou": float("nan")})
    assert not (tmp_path / "a.json").exists()
    files.write_json(tmp_path / "a.json", {"iou": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"iou": None}


def test_csv_quotes_and_leaves_unknowns_blank(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "a.csv", [{"id": 'a,"b"', "iou": None}, {"id": "c", "iou": 0.5}])
    assert (tmp_path / "a.csv").read_text() == 'id,iou\n"a,""b""",\nc,0.5\n'


def test_link_replaces_the_target_and_keeps_the_source(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("2")
    (tmp_path / "model").write_text("1")
    files.link_atomic(tmp_path / "best", tmp_path / "model")
    assert (tmp_path / "model").read_text() == (tmp_path / "best").read_text() == "2"


def test_output_folder(tmp_path: Path) -> None:
    made = files.output_folder(tmp_path / "a" / "b", marker="metrics.json")
    assert made.is_dir() and list(made.iterdir()) == []
    (made / "metrics.json").write_text("{}")
    with pytest.raises(
        UserError, match="already holds metrics.json; choose another folder or give --overwrite"
    ):
        files.output_folder(made, marker="metrics.json")
    assert files.output_folder(made, marker="metrics.json", overwrite=True) == made


def test_unwritable_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: output folder cannot be written \(Not a directory\)"):
        files.output_folder(tmp_path / "file" / "run")


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".state.pt.4711.part").write_text("half")
    (tmp_path / "state.pt").write_text("whole")
    files.sweep_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
