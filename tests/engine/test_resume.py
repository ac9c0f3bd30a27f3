"""A run that is killed and resumed ends with the same bits as one that is left alone."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bti_fast.data import make_phantoms
from bti_fast.engine import recorder, train
from bti_fast.engine.state import load_state
from bti_fast.errors import UserError
from tests.engine.tiny import TinyEncoder, tiny_config, tiny_train

ROOT = Path(__file__).resolve().parents[2]
BATCHES = 3  # of an epoch: 12 training cases in batches of 4


def assert_same_run(run: Path, whole: Path) -> None:
    """Every checkpoint bit for bit, and the same history but for the clock."""
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for name in ("model.safetensors", *(f"checkpoints/{name}" for name in names)):
        ours, theirs = load_file(run / name), load_file(whole / name)
        assert ours.keys() == theirs.keys() and len(ours) > 100
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert different == [], name
    assert history(run) == history(whole)


def history(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
        ]


def killed(data: Path, out: Path, kill_at: int, *more: str) -> None:
    """Trains in a process of its own that SIGKILL ends at its `kill_at`-th training batch."""
    command = [
        sys.executable,
        "-m",
        "tests.engine.tiny",
        str(data),
        str(out),
        "--kill-at",
        str(kill_at),
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_in_both_stages(phantoms: Path, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed(phantoms, run, BATCHES + 2)  # second batch of stage 1's second epoch
    state = load_state(run)
    assert (state["stage"], state["epoch"]) == (1, 1)
    killed(
        phantoms, run, BATCHES + BATCHES + 2, "--resume"
    )  # the rest of stage 1, then stage 2's second epoch
    state = load_state(run)
    assert (state["stage"], state["epoch"]) == (2, 1)
    text = tiny_train(phantoms, run, resume=True)
    assert "after stage 2, epoch 1" in text
    assert_same_run(run, finished_run)
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("at", [1, 2 * BATCHES + 1])
def test_interrupted_anywhere(phantoms: Path, finished_run: Path, tmp_path: Path, at: int) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tiny_train(phantoms, run, encoder=TinyEncoder(at, KeyboardInterrupt()))
    tiny_train(phantoms, run, resume=True)
    assert_same_run(run, finished_run)


@pytest.mark.parametrize("step", ["save_state", "publish"])
def test_interrupted_while_writing(
    phantoms: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Weights written but not the state, and the state written but nothing that follows from it."""
    calls = []

    def stop(*arguments: object) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    home = recorder if step == "save_state" else recorder.run_folder
    with monkeypatch.context() as patched:
        patched.setattr(home, step, stop)
        with pytest.raises(KeyboardInterrupt):
            tiny_train(phantoms, tmp_path / "run")
    assert len(calls) == 1
    tiny_train(phantoms, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished_run)


def test_another_seed_gives_other_weights(phantoms: Path, finished_run: Path, tmp_path: Path) -> None:
    """The comparison above would notice a difference."""
    tiny_train(phantoms, tmp_path / "run", seed=1, epochs=1, gate_epochs=0)
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "run", finished_run))
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


def test_reading_in_other_processes_changes_nothing(
    phantoms: Path, finished_run: Path, tmp_path: Path
) -> None:
    tiny_train(phantoms, tmp_path / "run", workers=1, cache_mb=0)
    assert_same_run(tmp_path / "run", finished_run)


def test_finished_run_is_left_alone(phantoms: Path, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    assert "nothing to resume" in tiny_train(phantoms, finished_run, resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()} == before


def test_existing_run_is_not_overwritten(phantoms: Path, finished_run: Path) -> None:
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        tiny_train(phantoms, finished_run)


def test_resume_with_another_setting(phantoms: Path, finished_run: Path) -> None:
    with pytest.raises(UserError, match="was started with --batch-size 4, not 5"):
        tiny_train(phantoms, finished_run, resume=True, batch_size=5)


def test_resume_without_a_run(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.yaml in it, so there is no run to resume"):
        tiny_train(phantoms, tmp_path, resume=True)


def test_resume_with_data_changed(phantoms: Path, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "split.csv"):
        shutil.copy(finished_run / name, run)
    fewer = make_phantoms(tmp_path / "fewer", 6, size=40, seed=3)
    config = (run / "config.yaml").read_text().replace(str(phantoms), str(fewer))
    (run / "config.yaml").write_text(config)
    with pytest.raises(UserError, match="lacks 12 of the run's 18 cases"):
        train(tiny_config(fewer, run), resume=True, encoder=TinyEncoder())
