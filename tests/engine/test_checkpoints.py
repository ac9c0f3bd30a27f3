"""Damaged and foreign checkpoints and resume states: one line that names the file, and no code of theirs
run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bti_fast.engine import run_folder
from bti_fast.engine.config import TrainConfig
from bti_fast.engine.state import load_state, save_state
from bti_fast.errors import UserError
from tests.engine.tiny import TinyEncoder, tiny_train


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_folder.load_model(path, TinyEncoder())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_checkpoint_loads(finished_run: Path) -> None:
    path, run = run_folder.find_model(finished_run)
    assert run == finished_run and run_folder.find_model(path) == (path, finished_run)
    model = run_folder.load_model(path, TinyEncoder())
    assert model.classes == ("benign", "malignant", "normal")
    assert (model.config["image_size"], model.config["in_channels"]) == (32, 3)
    assert (model.metadata["stage"], model.metadata["mask_threshold"]) == (2, 0.5)
    assert not model.training


def test_truncated_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    whole = (finished_run / "model.safetensors").read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(whole[:length])
        refused(path, "damaged, truncated, or not a safetensors file")


def test_pickle_instead_of_a_checkpoint(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    torch.save(Bomb(flag), tmp_path / "new.safetensors")
    (tmp_path / "old.safetensors").write_bytes(pickle.dumps(Bomb(flag)))
    for name in ("new", "old"):
        refused(tmp_path / f"{name}.safetensors", "a pickle .* is not run")
    assert not flag.exists()


def test_checkpoint_of_another_configuration(finished_run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(finished_run / "model.safetensors", "pt") as file:
        header = dict(file.metadata())
    config = json.loads(header["config"])
    header["config"] = json.dumps({**config, "cls_classes": 4})
    header["classes"] = json.dumps(None)
    tensors = load_file(finished_run / "model.safetensors")
    save_file(tensors, tmp_path / "four.safetensors", header)
    refused(tmp_path / "four.safetensors", "of another configuration: cls_out.weight has shape")
    for name, key, value, said in (
        ("names", "classes", 5, "class names cannot be read .found 5"),
        (
            "size",
            "config",
            {**config, "image_size": 5},
            "image_size: found 5, needed a whole number of at least 32",
        ),
        ("sides", "config", {**config, "image_size": "abc"}, "image_size: found 'abc'"),
        ("inputs", "config", {**config, "in_channels": 10**13}, "does not describe a BTINet"),
    ):
        header = {**header, "config": json.dumps(config), "classes": json.dumps(None), key: json.dumps(value)}
        save_file(tensors, tmp_path / f"{name}.safetensors", header)
        refused(tmp_path / f"{name}.safetensors", said)
    save_file(tensors, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "not a BTINet checkpoint")


def test_weights_that_are_not_numbers(finished_run: Path, tmp_path: Path) -> None:
    model = run_folder.load_model(finished_run / "model.safetensors", TinyEncoder())
    with torch.no_grad():
        model.seg_out.bias.fill_(float("nan"))
    model.save(tmp_path / "nan.safetensors")
    refused(tmp_path / "nan.safetensors", "hold NaN or infinity, first in seg_out.bias")
    with torch.no_grad():
        model.seg_out.bias.zero_()
        model.cls_bn.running_var[0] = float("inf")  # what a diverged training leaves in a buffer
    model.save(tmp_path / "buffer.safetensors")
    refused(tmp_path / "buffer.safetensors", "hold NaN or infinity, first in cls_bn.running_var")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder or checkpoint"):
        run_folder.find_model(tmp_path / "gone")
    with pytest.raises(UserError, match="no model.safetensors in it \\(not a run folder\\)"):
        run_folder.find_model(tmp_path)
    (tmp_path / "config.yaml").write_text("size: 32\n")
    with pytest.raises(UserError, match="its training has not finished an epoch"):
        run_folder.find_model(tmp_path)


def test_paths_in_settings_are_kept_as_text(tmp_path: Path) -> None:
    weights = tmp_path / "b0.pth"
    weights.touch()
    run_folder.write_config(tmp_path, TrainConfig(data=tmp_path, encoder_weights=weights).checked())
    stored = run_folder.read_config(tmp_path)
    assert (stored.data, stored.encoder_weights) == (str(tmp_path), str(weights))


def test_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("size: [1, 2\n")
    with pytest.raises(UserError, match="config.yaml: cannot be read"):
        run_folder.read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("just words\n")
    with pytest.raises(UserError, match="config.yaml: damaged"):
        run_folder.read_config(tmp_path)


@pytest.fixture
def half_run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its second epoch."""
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(KeyboardInterrupt):
        tiny_train(phantoms, run, encoder=TinyEncoder(5, KeyboardInterrupt()))
    return run


def test_bad_resume_states(phantoms: Path, half_run: Path, tmp_path: Path) -> None:
    whole = (half_run / "state.pt").read_bytes()
    flag = tmp_path / "ran"

    def resume(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            tiny_train(phantoms, half_run, resume=True)
        assert "state.pt" in str(caught.value) and "\n" not in str(caught.value)

    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        (half_run / "state.pt").write_bytes(whole[:length])
        resume("truncated or not a resume state")
    torch.save({"model": Bomb(flag)}, half_run / "state.pt")
    resume("a pickle with code in it, which is not run")
    (half_run / "state.pt").write_bytes(pickle.dumps(Bomb(flag)))
    resume("truncated or not a resume state")
    assert not flag.exists()
    torch.save({"model": {}}, half_run / "state.pt")
    resume("not a resume state of bti-fast train")
    (half_run / "state.pt").write_bytes(whole)
    state = load_state(half_run)
    state["model"].pop("seg_out.bias")
    save_state(half_run, state)
    resume("weights of another configuration")
    save_state(half_run, {**state, "format": 99})
    resume("resume state of format 99")


def test_resume_state_holds_no_code(half_run: Path) -> None:
    state = torch.load(half_run / "state.pt", weights_only=True)
    assert state["epoch"] == 1 and len(state["history"]) == 1
    shutil.rmtree(half_run)
