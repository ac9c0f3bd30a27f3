"""Who else computes a case: eager PyTorch, torch.compile, pinned attention backends, one instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bti_fast import _library

from .harness import Case, Provider

EAGER, COMPILE, MAX_AUTOTUNE, OURS = "eager", "compile", "compile max-autotune", "bti_fast"
SWEEP_PEERS = (EAGER, "sdpa", OURS)  # torch.compile would compile every size anew


@dataclass(frozen=True)
class Choice:
    """What a run measures besides ours and eager PyTorch: torch.compile ("none", "default" or "all" cases),
    its max-autotune mode, pinned attention backends, and instruction sets of the CPU library by name."""

    compile: str = "default"
    max_autotune: bool = False
    pinned: bool = True
    isas: tuple[str, ...] = ("auto",)


def providers(case: Case, choice: Choice) -> tuple[list[Provider], dict[str, str]]:
    """Those who take part, eager PyTorch first and ours last, and the others with the reason why not."""
    chosen, absent = [Provider(EAGER, case.reference, case.within)], {}
    sweep = case.group.startswith("sweep")
    for name, peer in case.peers.items():
        if isinstance(peer, str):
            absent[name] = peer
        elif (choice.pinned or " " not in name) and (not sweep or name in SWEEP_PEERS):
            chosen.append(Provider(name, *peer))
    if sweep:
        absent.clear()  # the same reasons stand at the operator's own cases
    elif choice.compile == "all" or (choice.compile == "default" and case.compiled):
        chosen.append(Provider(COMPILE, _compiled(case), case.within))
        if choice.max_autotune:
            chosen.append(Provider(MAX_AUTOTUNE, _compiled(case, mode="max-autotune"), case.within))
    else:
        absent[COMPILE] = "left out of this run (--compile all measures it everywhere)"
    for isa in choice.isas:
        if isa == "auto":
            chosen.append(Provider(OURS, case.ours, ours=True))
        elif reason := _isa_missing(isa):
            absent[f"{OURS}:{isa}"] = reason
        else:
            chosen.append(Provider(f"{OURS}:{isa}", case.ours, lambda isa=isa: forced_isa(isa), ours=True))
    return chosen, absent


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Within: the CPU library runs with one instruction set."""
    native, _ = _library.native()
    native.force_isa(name)
    try:
        yield
    finally:
        native.force_isa("auto")


def isa_in_use() -> str:
    """The instruction set that the CPU library has chosen, or "none"."""
    native, reason = _library.native()
    return "none" if reason or _library.load("cpu") else native.isa()


def _isa_missing(name: str) -> str | None:
    native, reason = _library.native()
    if reason := reason or _library.load("cpu"):
        return reason
    found = native.supported_isas()
    return None if name in found else f"this processor or build has {', '.join(found)}"


def _compiled(case: Case, **options):
    # One shape at a time: code for any shape would be slower, and is what a second size would turn it into.
    return torch.compile(case.reference, dynamic=False, **options)
