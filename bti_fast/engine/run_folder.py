"""What lies where in a run folder, and the checkpoints in it."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bti_fast.engine.config import TrainConfig
from bti_fast.engine.files import link_atomic, output_folder, sweep_parts, write_atomic, write_text
from bti_fast.engine.options import from_dict
from bti_fast.engine.state import first_line
from bti_fast.errors import UserError

CONFIG = "config.yaml"
MODEL = "model.safetensors"
METRICS = "metrics.csv"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"


def new_run(path: str | Path) -> Path:
    """Creates a run folder; UserError if it cannot be written or already holds a run."""
    folder = Path(path)
    if (folder / CONFIG).exists():
        raise UserError(f"{folder}: already holds a run; continue it with --resume, or give another --out")
    return output_folder(folder)


def find_run(path: str | Path) -> Path:
    """A folder that holds a run; UserError if it does not."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} in it, so there is no run to resume")
    return folder


def open_run(path: str | Path) -> Path:
    """A run folder to be continued; UserError if it holds no run or cannot be written."""
    folder = output_folder(find_run(path))
    for place in (folder, folder / CHECKPOINTS):
        sweep_parts(place)
    return folder


def write_config(folder: Path, config: TrainConfig) -> None:
    """Keeps the settings of a run, without its place: run folders may be moved."""
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in dataclasses.asdict(config).items()
        if name != "out"
    }
    write_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))


def read_config(folder: Path) -> TrainConfig:
    """The settings of a run; UserError if the file is damaged."""
    path = folder / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise UserError(f"{path}: cannot be read ({first_line(cause)})") from cause
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged; needs one setting a line")
    return from_dict(TrainConfig, values, str(path))


def save_weights(path: Path, model: Any, metadata: dict[str, Any]) -> None:
    """Saves a BTINet as safetensors in one step."""
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda temporary: model.save(temporary, metadata=metadata))


def publish(folder: Path, best: str, keep: set[str]) -> None:
    """Makes checkpoints/best the run's model and removes the checkpoints that nothing refers to any more."""
    link_atomic(folder / CHECKPOINTS / best, folder / MODEL)
    for stale in (folder / CHECKPOINTS).glob("*.safetensors"):
        if stale.name not in keep | {best}:
            with suppress(OSError):
                stale.unlink()


def find_model(path: str | Path) -> tuple[Path, Path | None]:
    """The weights that a run folder or a file stands for, and the run folder that they lie in, if any.

    UserError if there is nothing there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MODEL).is_file():
            why = (
                "its training has not finished an epoch" if (path / CONFIG).is_file() else "not a run folder"
            )
            raise UserError(f"{path}: no {MODEL} in it ({why})")
        return path / MODEL, path if (path / CONFIG).is_file() else None
    if not path.is_file():
        raise UserError(f"{path}: no such run folder or checkpoint")
    return path, path.parent if path.name == MODEL and (path.parent / CONFIG).is_file() else None


def load_model(path: Path, encoder: Any = None) -> Any:
    """Loads a BTINet from safetensors, in evaluation mode; encoder as in BTINet.load.

    UserError, naming the file, where it is truncated, no safetensors (a pickle is never run), of another
    configuration, or holds weights that are not numbers.
    """
    import torch

    from bti_fast.models import BTINet

    with open(path, "rb") as file:
        head = file.read(16)
    # safetensors starts with the length of its header, eight bytes of any value, and the header with "{".
    if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise UserError(
            f"{path}: a pickle (which may hold code and is not run), not a safetensors checkpoint"
        )
    try:
        model = BTINet.load(path, encoder=encoder)
    except RuntimeError as cause:  # torch's word for tensors that do not fit
        raise UserError(f"{path}: of another configuration ({first_line(cause)})") from cause
    bad = next((name for name, value in model.state_dict().items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise UserError(f"{path}: weights hold NaN or infinity, first in {bad}")
    return model
