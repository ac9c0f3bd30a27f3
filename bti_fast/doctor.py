"""What is built, loaded and chosen on this machine, and why not the rest."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable
from importlib import metadata

import bti_fast
from bti_fast import _library

# Shapes of one typical call of each operator, in the order of its schema; None stands for an absent mask.
_B, _C, _P, _F, _K = 1, 8, (16, 16), 4, 2


def report() -> dict:
    """Everything `bti-fast doctor` shows, ready for JSON.

    Returns:
        dict with "versions" (name -> version or why it does not import), "cpu" (instruction sets), "devices"
        (name -> description), "libraries" (file, built, loaded, reason), "build" (what the installation
        recorded) and "operators" (operator -> device -> {"chosen", "backends": {name: None or why not}}).
    """
    devices = _devices()
    usable = [name for name, state in devices.items() if state["available"]]
    return {
        "versions": _versions(),
        "cpu": _instruction_sets(),
        "devices": devices,
        "libraries": _library.describe(),
        "build": {**_library.build_record(), **_native_info()},
        "operators": _operators(usable),
    }


def render(state: dict | None = None) -> str:
    """The report as text, one fact per line."""
    state = report() if state is None else state
    lines = ["Versions"]
    lines += [f"  {name:14} {version}" for name, version in state["versions"].items()]
    lines += ["Devices"]
    for name, device in state["devices"].items():
        lines.append(f"  {name:14} {device['name'] if device['available'] else 'no: ' + device['reason']}")
    cpu = state["cpu"]
    if cpu["in_use"]:
        supported = ", ".join(cpu["supported"])
        lines.append(f"  {'instructions':14} {cpu['in_use']} in use (available: {supported})")
    else:
        lines.append(f"  {'instructions':14} unknown: {cpu['reason']}")
    lines += ["Compiled libraries"]
    for name, library in state["libraries"].items():
        lines.append(f"  {name:14} {'loaded' if library['loaded'] else 'no: ' + library['reason']}")
    targets = state["build"].get("cuda_targets")
    if targets:
        lines.append(f"  {'cuda targets':14} {' '.join(targets)} (nvcc {state['build']['cuda_compiler']})")
    lines += ["Operators"]
    if "error" in state["operators"]:
        lines.append(f"  unavailable: {state['operators']['error']}")
        return "\n".join(lines)
    for operator, devices in state["operators"].items():
        for device, choice in devices.items():
            lines.append(f"  {operator} on {device}: {choice['chosen'] or 'none'}")
            for name, reason in choice["backends"].items():
                if name != choice["chosen"]:
                    lines.append(f"    {name:12} {reason or 'available, slower'}")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    versions = {"bti_fast": bti_fast.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "triton"):
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except Exception as cause:  # a broken installation raises anything
            versions[name] = f"does not import: {_one_line(cause)}"
    for name in ("lightning", "monai"):  # importing these takes seconds
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed (pip install bti_fast[train])"
    return versions


def _instruction_sets() -> dict:
    native, reason = _library.native()
    if native is None:
        return {"in_use": None, "supported": [], "reason": reason}
    return {"in_use": native.isa(), "supported": list(native.supported_isas()), "reason": None}


def _native_info() -> dict:
    native, _ = _library.native()
    return {} if native is None else {key: _plain(value) for key, value in native.build_info().items()}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _devices() -> dict[str, dict]:
    found = {"cpu": {"available": True, "name": platform.processor() or platform.machine(), "reason": None}}
    found["cuda"] = {"available": False, "name": None, "reason": None}
    try:
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            found["cuda"]["reason"] = f"torch {torch.__version__} is built for CPUs only"
        elif not torch.cuda.is_available():
            found["cuda"]["reason"] = "torch finds no GPU, or no driver for it"
        else:
            found["cuda"].update(available=True, name=torch.cuda.get_device_name())
    except Exception as cause:
        found["cuda"]["reason"] = _one_line(cause)
    return found


def _operators(devices: list[str]) -> dict:
    try:
        from bti_fast.ops import OPERATORS
    except Exception as cause:  # the doctor must speak where the package is broken
        return {"error": _one_line(cause)}
    chosen: dict[str, dict] = {}
    for name, operator in OPERATORS.items():
        chosen[name] = {}
        for device in devices:
            try:
                why_not = operator.explain(*_EXAMPLES[name](device))
            except Exception as cause:
                why_not = {"(all)": _one_line(cause)}
            first = next((backend for backend, reason in why_not.items() if reason is None), None)
            chosen[name][device] = {"chosen": first, "backends": why_not}
    return chosen


def _entropy_uncertainty(device: str) -> tuple:
    return (_zeros(device, _B, _K, *_P),)


def _gated_fusion(device: str) -> tuple:
    maps = _zeros(device, _B, _C, *_P), _zeros(device, _B, _K, *_P)
    return (*maps, _zeros(device, _B, _C), _zeros(device, _B), _zeros(device, 3), 0.7)


def _task_interaction(device: str) -> tuple:
    half = _C // 2
    sizes = [
        (half, _C), (half,), (_F, half), (_F,), (_F,), (_F,), (_F,), (_F,), (_F, _F), (_F,), (_C, _F), (_C,),
        (_C, _C), (_C,), (64, _C), (64, _F), (32, 3), (32,), (2, 32), (2,),
    ]  # fmt: skip
    weights = [_zeros(device, *size) for size in sizes]
    return _zeros(device, _B, _C, *_P), _zeros(device, _B, _F), weights, 0.7, False


def _cross_attention(device: str) -> tuple:
    dense, tokens = (_B, 2, 64, 32), (_B, 2, 4, 32)
    q, k, v_q, v_k = (_zeros(device, *shape) for shape in (dense, tokens, dense, tokens))
    return q, k, v_q, v_k, None, None, 32**-0.5


_EXAMPLES: dict[str, Callable[[str], tuple]] = {
    "entropy_uncertainty": _entropy_uncertainty,
    "gated_fusion": _gated_fusion,
    "task_interaction": _task_interaction,
    "cross_attention": _cross_attention,
}


def _zeros(device: str, *shape: int):
    import torch

    return torch.zeros(shape, device=device)


def _one_line(cause: Exception) -> str:
    return " ".join(f"{type(cause).__name__}: {cause}".split())


if __name__ == "__main__":
    print(render())
    sys.exit(0)
