"""The resume state of a run: one file, written whole after every epoch, read without running code in it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from bti_fast.engine.files import write_atomic
from bti_fast.errors import UserError

FORMAT = 1
NAME = "state.pt"
_NEEDED = {
    "format",
    "stage",
    "epoch",
    "finished",
    "model",
    "optimizer",
    "counters",
    "history",
    "best",
    "threads",
}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state (tensors and plain values only) as folder/state.pt in one step."""
    write_atomic(folder / NAME, lambda path: torch.save({"format": FORMAT, **state}, path))


def load_state(folder: Path) -> dict[str, Any]:
    """Reads folder/state.pt onto the CPU.

    UserError if it is missing, truncated, holds more than tensors and plain values (a pickle with code is
    refused unexecuted), or was written by another version of the format.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {NAME} in it, so there is no finished epoch to resume from")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated or not a resume state of bti-fast train")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise UserError(
            f"{path}: holds a pickle with code in it, which is not run; not a resume state"
        ) from cause
    except Exception as cause:  # torch reports damage as RuntimeError, EOFError, KeyError, ...
        raise UserError(f"{path}: damaged resume state ({first_line(cause)})") from cause
    if not isinstance(state, dict) or not _NEEDED <= set(state):
        raise UserError(f"{path}: not a resume state of bti-fast train")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: resume state of format {state['format']}, this version reads format {FORMAT}"
        )
    return state


def first_line(cause: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    text = str(cause).strip().splitlines()
    return text[0][:200] if text else type(cause).__name__
