"""Training in two processes: equal to one process with the joint batch, ended by a kill, taken up again."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bti_fast.data import CaseDataset, read_dataset
from bti_fast.engine.place import Place
from bti_fast.engine.state import load_state
from bti_fast.engine.train import _data_sets
from bti_fast.errors import UserError
from tests.engine.tiny import TinyEncoder, tiny_config, tiny_train

ROOT = Path(__file__).resolve().parents[2]
# Uneven parts: 11 training cases, some without mask or class, are joint batches of 4, 4 and 3.
SETTINGS = {
    "batch_size": 2,
    "gate_epochs": 1,
    "dropout": 0.0,
    "sampling": "balanced",
    "class_loss": "balanced",
}


class DoubleEncoder(TinyEncoder):
    """Makes the network around it one of float64, in whichever process it arrives.

    Rounding in fp32 is no measure here: Adam makes steps of full size from gradients that are noise.
    """

    def __setstate__(self, state: dict) -> None:
        torch.set_default_dtype(torch.float64)
        super().__setstate__(state)


@pytest.fixture(scope="module")
def encoder():
    """Makes a DoubleEncoder, and everything else in this process float64 too."""
    torch.set_default_dtype(torch.float64)
    yield DoubleEncoder
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def killed(partial: Path, tmp_path_factory: pytest.TempPathFactory, encoder) -> tuple[Path, str, dict]:
    """A run of two processes, one of which is killed in the second batch of the second epoch; what it said
    and the state that it left."""
    run = tmp_path_factory.mktemp("pair") / "run"
    with pytest.raises(UserError) as caught:
        tiny_train(partial, run, encoder=encoder(kill_at=5, rank=1), devices=2, **SETTINGS)
    return run, str(caught.value), load_state(run)


@pytest.fixture(scope="module")
def resumed(partial: Path, killed: tuple[Path, str, dict]) -> tuple[Path, str]:
    """The same run, taken up again under torchrun, and what was said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.engine.test_many_devices", str(partial), str(killed[0])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return killed[0], done.stdout


def history(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
        ]


def test_a_kill_in_one_process_ends_the_run(killed: tuple[Path, str, dict]) -> None:
    run, said, state = killed
    assert said == (
        "process 1 of 2 was killed (SIGKILL; out of memory, perhaps), so the others were stopped; "
        f"go on with: bti-fast train --resume {run}"
    )
    assert (state["stage"], state["epoch"], state["processes"]) == (1, 1, 2)


def test_killed_and_resumed_two_processes_are_one_with_the_joint_batch(
    partial: Path, resumed: tuple[Path, str], tmp_path: Path, encoder
) -> None:
    """Losses, validation figures and weights of both stages, to 1e-8 where 1e-5 is asked for."""
    tiny_train(partial, tmp_path / "run", encoder=encoder(), **{**SETTINGS, "batch_size": 4})
    ours, truth = history(resumed[0]), history(tmp_path / "run")
    assert len(ours) == len(truth) == 3
    for row, true in zip(ours, truth, strict=True):
        assert row.keys() == true.keys()
        for name, value in true.items():
            assert (row[name] == "") == (value == "")
            if value:
                assert float(row[name]) == pytest.approx(float(value), abs=1e-9), (name, row)
    mine, theirs = (load_file(run / "model.safetensors") for run in (resumed[0], tmp_path / "run"))
    assert mine.keys() == theirs.keys() and len(mine) > 100
    for name, value in theirs.items():
        # The operator of the paper's module does not count batches; its parts, used in several processes, do.
        if not name.endswith("s2c_bn.num_batches_tracked"):
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-8, msg=name)


def test_what_a_run_in_two_processes_says(resumed: tuple[Path, str]) -> None:
    run, said = resumed
    assert "2 processes, 2 images each and 4 a step" in said
    assert "images per second: " in said and " in 2 processes (stage 1, without validation)" in said
    assert said.count("after stage 1, epoch 1") == said.count("stage 1  epoch 2/2") == 1  # one of them prints
    assert (run / "report.html").is_file() and not list(run.rglob("*.part"))


def test_the_caches_of_a_machine_stay_below_one_limit(partial: Path, tmp_path: Path) -> None:
    """Both data sets of every process together, in bytes; what does not fit is read again."""
    index = read_dataset(partial)
    splits = {"train": list(index.cases[:12]), "val": list(index.cases[12:]), "test": []}
    one = CaseDataset(index.cases[:1], index.classes, 256).cache_bytes
    assert one == 256 * 256 * (3 * 2 + 1) + 1
    for processes, limit, expected in ((1, 4, 4 * 2**20 // one), (2, 4, 2 * 2**20 // one), (2, 0, 0)):
        config = tiny_config(partial, tmp_path, size=256, cache_mb=limit)
        place = Place(0, processes, 0, processes)
        sets = _data_sets(config, splits, index.classes, place, Console(quiet=True))
        assert sum(data.cache_bytes for data in sets) == expected * one <= (limit << 20) // processes
        assert len(sets[1][0]["image"]) == 3


def test_bad_numbers_of_processes(partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"devices": 0}, "--devices 0: must lie between 1 and 1024"),
        ({"devices": 999}, r"--devices 999: this machine has \d+ CPU cores?$"),
        ({"devices": True}, "--devices True: must be a whole number"),
        ({"strategy": "fsdp"}, "--strategy fsdp: must be one of auto, ddp"),
        ({"num_nodes": 2}, "--num-nodes 2: MASTER_ADDR is not set; every machine needs"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_train(partial, tmp_path / "run", **changes)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match="--devices 3: the launcher .torchrun. started 2 processes, 2 on this"
    ):
        tiny_train(partial, tmp_path / "run", devices=3)
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print(tiny_train(Path(sys.argv[1]), Path(sys.argv[2]), resume=True, encoder=DoubleEncoder(), **SETTINGS))
