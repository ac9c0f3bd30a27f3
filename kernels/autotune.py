"""Launch shapes by measurement, where BTI_FAST_AUTOTUNE=1 asks for it; else the table's, always.

A kernel is measured at its first call for a device, dtype and size, the host waiting for it, and never while
a CUDA graph is captured. Choices are kept in a file of the user's cache folder: another shape adds partial
sums in another order, so a run gives the same bits as the last one only by the same choice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from .launch import TILES, Tile, entry
from .tiles import positions_of, power_of_two

CANDIDATES = tuple(Tile(elements, warps) for elements in (1024, 2048, 4096, 8192) for warps in (4, 8))

_log = logging.getLogger("bti_fast.autotune")
_chosen: dict[str, Tile] = {}


def tile_for(kernel: str, x: Tensor, format: int, run: Callable[[Tile], object]) -> Tile:
    """The tile with which ``kernel`` is launched on x; ``run`` does its work with a given one."""
    ours = entry(TILES[kernel], x.device)
    if os.environ.get("BTI_FAST_AUTOTUNE") != "1" or x.device.type != "cuda":
        return ours
    return tuned(key_of(kernel, x, format), ours, run)


def tuned(key: str, ours: Tile, run: Callable[[Tile], object], timer: Callable | None = None) -> Tile:
    """The fastest tile for this key: chosen before, or else measured now by ``timer`` (milliseconds)."""
    if key not in _chosen:
        known = read(cache_file())
        if key in known:
            _chosen[key] = known[key]
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return ours
        else:
            _chosen[key] = measure(ours, run, timer or milliseconds)
            _log.info("%s: %s", key, _chosen[key])
            write(cache_file(), key, _chosen[key])
    return _chosen[key]


def measure(ours: Tile, run: Callable[[Tile], object], timer: Callable) -> Tile:
    """The fastest of the table's tile and CANDIDATES; the table's where none is faster by 2 %."""
    times = {}
    for tile in dict.fromkeys((ours, *CANDIDATES)):
        try:
            times[tile] = timer(lambda tile=tile: run(tile))
        except triton.runtime.errors.OutOfResources as cause:
            _log.debug("%s: %s", tile, cause)
    best = min(times, key=times.get, default=ours)
    return best if ours not in times or times[best] < 0.98 * times[ours] else ours


def milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """The shortest time of one call on the current device, after one to compile it."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return min(one.elapsed_time(two) for one, two in zip(marks, marks[1:], strict=False))


def key_of(kernel: str, x: Tensor, format: int) -> str:
    """What a choice holds for: kernel, device, dtype, format, size to powers of two, versions, this code."""
    batch, channels = x.shape[:2]
    size = f"{power_of_two(channels)} channels {power_of_two(max(batch * positions_of(x), 1))} positions"
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{kernel}, {device_name(x.device)}, {dtype}, format {format}, {size}, {versions()}"


@cache
def device_name(device: torch.device) -> str:
    """The product's name, as the driver gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def versions() -> str:
    """Of Triton and PyTorch, and a digest of the kernels."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return f"triton {triton.__version__}, torch {torch.__version__}, kernels {digest}"


def cache_file() -> Path:
    """Where choices are kept: $XDG_CACHE_HOME (or ~/.cache) /bti_fast/launches.json."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bti_fast" / "launches.json"


def read(path: Path) -> dict[str, Tile]:
    """The choices in a file; none where there is no file or it holds something else."""
    try:
        entries = json.loads(path.read_text())
        return {str(key): Tile(int(elements), int(warps)) for key, (elements, warps) in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as cause:
        _log.warning("%s is not a file of launch shapes and will be replaced: %s", path, cause)
        return {}


def write(path: Path, key: str, tile: Tile) -> None:
    """Adds one choice to a file, in one step, so that processes beside this one never read half of it."""
    entries = {**read(path), key: tile}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({name: list(value) for name, value in sorted(entries.items())}, file, indent=1)
        os.replace(file.name, path)
    except OSError as cause:
        _log.warning("launch shapes are not kept: %s", cause)
