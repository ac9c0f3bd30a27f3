"""The compiled operator libraries: loaded on first use, every cause of failure kept."""

from __future__ import annotations

import json
import struct
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
    if _truncated(file):
        return f"{file.name} does not load: the file is truncated ({file.stat().st_size} bytes)"
    import torch

    try:
        torch.ops.load_library(str(file))
    except Exception as cause:  # not a library, a missing libtorch_cuda, an ABI break: all are kept
        return f"{file.name} does not load: {_one_line(cause)}"
    return None


def _truncated(file: Path) -> bool:
    """True for a 64-bit ELF file that ends before its section table: mapping one kills the process."""
    with file.open("rb") as stream:
        header = stream.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False  # the loader refuses it by itself, or it is no ELF platform
    (table,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    return table + entry_size * entries > file.stat().st_size


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


def _one_line(cause: BaseException | None) -> str:
    """The whole chain of causes: torch wraps the loader's message in one that says nothing."""
    links = []
    while cause is not None:
        links.append(" ".join(f"{type(cause).__name__}: {cause}".split()))
        cause = cause.__cause__
    return "; caused by ".join(links)
