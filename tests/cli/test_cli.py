"""The command line: exit codes, one line per mistake, help without torch, and the whole job from end to
end."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from bti_fast.cli import EXAMPLES, build_parser, main

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """bti-fast in a process of its own, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bti_fast.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; from bti_fast.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'lightning', 'monai', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (
        "--learning-rate X" in done.stdout
        and "Adam's step size at the start. (default: 0.0003)" in done.stdout
    )
    assert "typing" not in done.stdout and "Optional" not in done.stdout


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "bti_fast"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, code in ((["--version"], 0), (["data"], 2)):
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == code and (done.stdout + done.stderr).startswith("bti-fast")


def test_every_option_has_a_sentence_of_help() -> None:
    parser = build_parser()
    commands = next(a for a in parser._actions if a.choices and "train" in a.choices).choices
    assert set(commands) == {
        "train", "evaluate", "ablate", "calibrate", "failures", "predict", "convert", "data", "demo",
        "doctor",         "benchmark",
    }  # fmt: skip
    for name in ("train", "evaluate", "ablate", "calibrate", "failures", "predict", "convert", "demo"):
        for action in commands[name]._actions:
            if action.dest not in ("help", "print_config"):
                assert action.help and action.help.rstrip().endswith("."), (name, action.dest)
    assert "bti-fast train --data BUSI --out runs/first" in EXAMPLES


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "predict runs/first scans/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--bogus", "3"], "unknown option --bogus 3"),
        (["evaluate", "run", "--treshold", "1"], "unknown option --treshold"),
        (["train", "--batch-size", "x"], "--batch-size x: must be a whole number"),
        (["train", "--devices", "two"], "--devices two: must be a whole number"),
        (["train", "--data", ".", "--devices", "0"], "--devices 0: must lie between 1 and 1024"),
        (["train", "--data", ".", "--strategy", "fsdp"], "--strategy fsdp: must be one of 'auto', 'ddp'"),
        (["train", "--learning-rate", "fast"], "--learning-rate fast: must be a number"),
        (["train", "--interaction", "foo"], "--interaction foo: must be one of 'encoder-sharing', 'none'"),
        (["train", "--batch-size"], "argument --batch-size: expected one argument"),
        (["train", "--config", "/nowhere.yaml"], "--config: File does not exist"),
        (["train", "--out", "run"], "no data: give the folder"),
        (["train", "--data", "."], "no run folder: give --out DIR"),
        (["train", "--data", "/nowhere", "--out", "{tmp}/run"], "/nowhere: no such file or folder"),
        (["train", "--data", "{tmp}/empty", "--out", "{tmp}/run"], "empty: empty folder; needs a data set"),
        (["train", "--data", ".", "--out", "{tmp}/file/run"], "output folder cannot be written"),
        (["train", "--resume", "{tmp}/empty"], "no config.yaml in it, so there is no run to resume"),
        (["train", "--data", ".", "--out", "{tmp}/r", "--encoder", "resnet"], "encoder: found 'resnet'"),
        (["evaluate"], "no model: give a run folder"),
        (["ablate", "--data", "."], "no output folder: give --out DIR"),
        (
            ["ablate", "fuzzy", "--data", ".", "--out", "{tmp}/a"],
            "row fuzzy: must be one of encoder-sharing,",
        ),
        (["ablate", "--interaction", "none"], "unknown option --interaction"),
        (["calibrate"], "no model: give a run folder"),
        (["failures", "/nowhere"], "/nowhere: no such run folder or checkpoint"),
        (["failures", "run", "--target-rate", "1.5"], "--target-rate 1.5: must lie between 0 and 0.99"),
        (["evaluate", "/nowhere"], "/nowhere: no such run folder or checkpoint"),
        (["predict", "/nowhere", "a.png", "--out", "{tmp}/p"], "/nowhere: no such run folder or checkpoint"),
        (["predict", "{tmp}/bomb.safetensors", "{tmp}/a.png", "--out", "{tmp}/p"], "a pickle"),
        (["predict", "{tmp}/cut.safetensors", "{tmp}/a.png", "--out", "{tmp}/p"], "damaged, truncated"),
        (["convert", "/nowhere.keras", "{tmp}/m.safetensors"], "/nowhere.keras"),
        (["convert"], "SOURCE is missing"),
        (["data"], "bti-fast: data: say check, pack or phantoms"),
        (["data", "phantoms", "{tmp}"], "is not empty; phantoms need a folder of their own"),
        (["calibrate", "{tmp}/empty", "--layout", "busi"], "--layout busi: is that of --data"),
        (["train", "--config", "{tmp}/file"], "--config: needs lines such as batch_size: 4"),
        (["data", "check", "/nowhere"], "/nowhere: no such file or folder"),
        (["data", "pack", "/nowhere", "{tmp}/p.zip"], "/nowhere: no such file or folder"),
        (["data", "pack", "/nowhere"], "FILE is missing"),
        (["data", "phantoms", "{tmp}/ph", "--count", "0"], "phantom count is 0"),
        (["trian"], "invalid choice: 'trian'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bti_fast.data import make_phantoms

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(print))
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "a.png").write_bytes(b"not an image")
    if "resnet" in arguments:
        make_phantoms(tmp_path / "data", 12, size=24)
        arguments = [str(tmp_path / "data") if word == "." else word for word in arguments]
    assert main([word.replace("{tmp}", str(tmp_path)) for word in arguments]) == 2
    assert not list(tmp_path.rglob("config.yaml"))  # nothing half begun is taken for a run
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("bti-fast: ")
    assert len([line for line in said if line.startswith("bti-fast: ")]) == 1
    assert "Traceback" not in "\n".join(said)


def test_of_several_processes_one_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert main(["train", "--out", "run"]) == 2
        assert main(["ablate", "--data", ".", "--out", "a"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("bti-fast: no data: give the folder")
    assert said[1] == (
        "bti-fast: ablate: torchrun started 2 processes, this command is one; "
        "give --devices in place of torchrun"
    )


def test_unknown_setting_in_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("batch_sise: 4\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "batch_sise" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("batch_size: [4\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bti-fast: ") and said.count("\n") == 1


def test_a_demo_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds a demo already; remove it or choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(values: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules["bti_fast.cli"].COMMANDS, "doctor", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def incomplete(values: object) -> int:
        raise ModuleNotFoundError("No module named 'lightning'", name="lightning")

    monkeypatch.setitem(sys.modules["bti_fast.cli"].COMMANDS, "doctor", incomplete)
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said == "bti-fast: lightning is not installed; needed: pip install 'bti_fast[train]'\n"


def test_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bti_fast.engine.train

    def interrupted(config: object, **more: object) -> None:
        (tmp_path / "config.yaml").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["bti_fast.engine.train"], "train", interrupted)
    assert main(["train", "--data", ".", "--out", str(tmp_path)]) == 130
    assert (
        capsys.readouterr().err == f"bti-fast: interrupted; go on with: bti-fast train --resume {tmp_path}\n"
    )
    assert bti_fast.engine.train is not None


def test_the_whole_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phantoms, check, both stages with settings from YAML and flags, evaluate, predict, resume of a
    finished run."""
    data, out = tmp_path / "data", tmp_path / "run"
    assert main(["data", "phantoms", str(data), "--count", "12", "--size", "48"]) == 0
    assert main(["data", "check", str(data), "--json", str(tmp_path / "check.json")]) == 0
    assert json.loads((tmp_path / "check.json").read_text())["images"] == 12
    (tmp_path / "small.yaml").write_text(
        "encoder: efficientnet-b0\nsize: 96\nepochs: 1\ngate_epochs: 1\nbatch_size: 4\nlearning_rate: 1e-3\n"
    )
    done = run(
        "train",
        "--config",
        str(tmp_path / "small.yaml"),
        "--size",
        "64",
        "--data",
        str(data),
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    assert "stage 1  epoch 1/1" in done.stderr and "stage 2  epoch 1/1" in done.stderr
    assert "\x1b" not in done.stderr  # no bars or colours where there is no terminal
    assert {"model.safetensors", "metrics.csv", "split.csv", "config.yaml", "report.html", "tensorboard"} <= {
        path.name for path in out.iterdir()
    }
    assert any((out / "tensorboard").glob("events.*"))
    assert "size: 64" in (out / "config.yaml").read_text()

    assert main(["evaluate", str(out), "--split", "train", "--threads", "1"]) == 0
    assert json.loads((out / "evaluate-train" / "metrics.json").read_text())["summary"]["cases"] > 0
    assert main(["evaluate", str(out), "--split", "train", "--threads", "1"]) == 2
    (data / "images" / "bad.png").write_bytes(b"not an image")
    target = tmp_path / "predictions"
    assert main(["predict", str(out), str(data / "images"), "--out", str(target), "--threads", "1"]) == 0
    with open(target / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in rows] == [False] * 12 + [True]
    assert len(list((target / "masks").glob("*.png"))) == len(list((target / "overlays").glob("*.png"))) == 12
    capsys.readouterr()
    assert main(["train", "--resume", str(out)]) == 0
    assert "nothing to resume" in capsys.readouterr().err
