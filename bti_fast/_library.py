"""The compiled operator libraries: loaded on first use, every cause of failure kept."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "lib"
NAMES = ("cpu", "cuda")

_lock = threading.Lock()
_outcome: dict[str, str | None] = {}


def path(name: str) -> Path:
    """Where the library `name` lies, built or not."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    return FOLDER / f"libbti_fast_{name}{suffix}"


def load(name: str) -> str | None:
    """Load the compiled library "cpu" or "cuda" once: None when its operators are there, else why not."""
    if name not in NAMES:
        raise ValueError(f"library must be one of {', '.join(NAMES)}; got {name!r}")
    if name not in _outcome:
        with _lock:
            if name not in _outcome:
                _outcome[name] = _load(name)
    return _outcome[name]


def _load(name: str) -> str | None:
    file = path(name)
    if not file.is_file():
        return _why_not_built(name)
    import torch

    try:
        torch.ops.load_library(str(file))
    except Exception as cause:  # a truncated file, a missing libtorch_cuda, an ABI break: all are kept
        return f"{file.name} does not load: {_one_line(cause)}"
    return None


def build_record() -> dict:
    """What the installation compiled and why not the rest; empty where nothing was recorded."""
    try:
        return json.loads((FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}


def _why_not_built(name: str) -> str:
    record = build_record()
    reason = record.get("cuda_reason" if name == "cuda" else "native_reason")
    missing = f"the compiled {name} library is not there"
    if reason:
        return f"{missing}: the installation left it out ({reason})"
    if record:
        return f"{missing}: the installation built it, but {path(name)} is gone"
    return f"{missing}: not installed with pip (no record of a build in {FOLDER})"


def native() -> tuple[object | None, str | None]:
    """(module bti_fast._native, None), or (None, why it does not import)."""
    try:
        from bti_fast import _native
    except Exception as cause:
        return None, build_record().get("native_reason") or f"bti_fast._native: {_one_line(cause)}"
    return _native, None


def describe() -> dict:
    """State of each library: file, whether it is loaded, and why not; loads what can be loaded."""
    state = {}
    for name in NAMES:
        file, reason = path(name), load(name)
        state[name] = {
            "file": str(file),
            "built": file.is_file(),
            "loaded": reason is None,
            "reason": reason,
        }
    return state


def _one_line(cause: Exception) -> str:
    return " ".join(f"{type(cause).__name__}: {cause}".split())
