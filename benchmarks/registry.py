"""Every case of the suite in one list: `bti-fast benchmark` and `pytest benchmarks/` both run from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from bti_fast.errors import UserError

from . import cross_attention, entropy_uncertainty, gated_fusion, gated_interaction, task_interaction
from .harness import PAPER_LEVELS, Case
from .whole_network import INTERACTIONS, Network

OPERATORS = ("entropy_uncertainty", "gated_fusion", "task_interaction", "cross_attention")
MODULES = ("GatedInteraction proxy", "GatedInteraction entropy", "GatedInteraction attention")
KERNELS = (*OPERATORS, *MODULES, "BTINet")
DEFAULT_GROUP = "levels"  # of the operators
GROUPS = (
    DEFAULT_GROUP,
    "batch 1",
    "K=4",
    "3D",
    "dtype",
    "layout",
    "module",
    "network",
    "sweep pixels 2D",
    "sweep pixels 3D",
    "sweep batch",
    "sweep channels",
    "sweep tokens",
    "sweep class tokens",
)
VOLUME = (48, 48, 48)
COMPILED_ATTENTION = ((784, 16), (3136, 64), (12544, 256))
DEFAULT_NETWORK = "efficientnet-b4", 224


def cases(batch: int | None = None, device: str = "cpu") -> list[Case | Network]:
    """All cases; ``batch`` replaces that of the group "levels" (8, and 2 for cross_attention)."""
    return [
        *_levels(batch or 8, device, batch or 2),
        *(case.marked(group="batch 1") for case in _levels(1, device)),
        *_variants(device),
        *_modules(),
        *_networks(),
        *_sweeps(),
    ]


def select(
    found: Iterable[Case | Network],
    only: Sequence[str] = (),
    groups: Sequence[str] = (),
    level: int | None = None,
) -> list[Case | Network]:
    """Those of the kernels, groups and level asked for.

    Without groups: those that the kernels asked for are at home in, "levels" if none is. UserError for an
    unknown name, or where nothing is left.
    """
    kernels = named(only, KERNELS)
    for group in groups:
        if group not in GROUPS:
            raise UserError(f"--group: found {group!r}, needed one of {', '.join(GROUPS)}")
    if level is not None and level not in (1, 2, 3, 4):
        raise UserError(f"--level: found {level}, needed 1, 2, 3 or 4")
    groups = groups or {_home(kernel) for kernel in kernels} or (DEFAULT_GROUP,)
    chosen = [
        case
        for case in found
        if case.group in groups and (not kernels or case.kernel in kernels) and level in (None, case.level)
    ]
    if not chosen:
        raise UserError(
            f"no case of {', '.join(only) or 'any kernel'} in {', '.join(groups)}"
            + (f" at level {level}" if level else "")
        )
    return chosen


def named(only: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known kernels that --only asks for; "GatedInteraction" stands for all three of its kinds.

    UserError for a name that is none of theirs.
    """
    kernels = []
    for name in only:
        found = [kernel for kernel in known if name in (kernel, kernel.split()[0])]
        if not found:
            raise UserError(f"--only: found {name!r}, needed one of {', '.join(known)}")
        kernels += found
    return kernels


def _home(kernel: str) -> str:
    if kernel in OPERATORS:
        return DEFAULT_GROUP
    return "module" if kernel in MODULES else "network"


def _levels(batch: int, device: str, attention_batch: int | None = None) -> list[Case]:
    """The four operators at the paper's levels, and cross_attention where there is a batch for it."""
    made = []
    for level, (channels, side) in enumerate(PAPER_LEVELS, 1):
        spatial = (side, side)
        made += [
            entropy_uncertainty.case(batch, 4, spatial).marked(level=level, compiled=level == 3),
            gated_fusion.case(batch, channels, spatial).marked(level=level),
            task_interaction.case(batch, channels, spatial).marked(level=level),
        ]
    if attention_batch is not None:
        for level, size in enumerate(cross_attention.SIZES, 1):
            case = cross_attention.case(attention_batch, *size, device=device)
            made.append(case.marked(level=level, compiled=size in COMPILED_ATTENTION))
    return sorted(made, key=lambda case: OPERATORS.index(case.kernel))


def _variants(device: str) -> list[Case]:
    """More classes, volumes, dtypes and memory layouts."""
    made = [
        gated_fusion.case(8, c, (side, side), 4).marked(group="K=4", level=level)
        for level, (c, side) in enumerate(PAPER_LEVELS, 1)
    ]
    volumes = (
        entropy_uncertainty.case(1, 4, VOLUME),
        gated_fusion.case(1, 32, VOLUME),
        task_interaction.case(1, 32, VOLUME),
        cross_attention.case(1, 48**3, 16, heads=1, device=device),
    )
    made += [case.marked(group="3D") for case in volumes]
    for dtype in (torch.bfloat16, torch.float16):
        halves = (
            entropy_uncertainty.case(8, 4, (56, 56), dtype),
            gated_fusion.case(8, 96, (56, 56), dtype=dtype),
            task_interaction.case(8, 96, (56, 56), dtype=dtype),
            cross_attention.case(2, 3136, 64, dtype=dtype, device=device),
        )
        made += [case.marked(group="dtype", level=3) for case in halves]
    layouts = (
        gated_fusion.case(8, 96, (56, 56), layout="channels_last"),
        task_interaction.case(8, 96, (56, 56), layout="channels_last"),
        cross_attention.case(2, 3136, 64, layout="channel-major", device=device),
    )
    return [*made, *(case.marked(group="layout", level=3) for case in layouts)]


def _modules() -> list[Case]:
    return [
        gated_interaction.case(8, channels, (side, side), name.split()[1]).marked(group="module", level=level)
        for name in MODULES
        for level, (channels, side) in enumerate(PAPER_LEVELS, 1)
    ]


def _networks() -> list[Network]:
    """Inference and training of BTINet, with every interaction and at two batches."""
    encoder, size = DEFAULT_NETWORK
    return [Network(encoder, size, 8, interaction) for interaction in INTERACTIONS] + [
        Network(encoder, size, 1, "proxy")
    ]


def _sweeps() -> list[Case]:
    """One quantity at a time; x is that quantity."""
    fused = gated_fusion.case, task_interaction.case
    made = []
    for side in (56, 112, 224, 448):
        group = (entropy_uncertainty.case(1, 4, (side, side)), *(case(1, 32, (side, side)) for case in fused))
        made += [case.marked(group="sweep pixels 2D", x=side**2) for case in group]
    for side in (32, 48, 64, 96):
        group = (entropy_uncertainty.case(1, 4, (side,) * 3), *(case(1, 32, (side,) * 3) for case in fused))
        group += (cross_attention.case(1, side**3, 16, heads=1),)
        made += [case.marked(group="sweep pixels 3D", x=side**3) for case in group]
    for batch in (1, 2, 4, 8, 16, 32):
        made += [case(batch, 96, (56, 56)).marked(group="sweep batch", x=batch) for case in fused]
    for channels in (32, 64, 128, 256, 512):
        made += [case(8, channels, (28, 28)).marked(group="sweep channels", x=channels) for case in fused]
    for tokens in (784, 3136, 12544, 50176):
        made.append(cross_attention.case(2, tokens, 64).marked(group="sweep tokens", x=tokens))
    for m in (1, 4, 16, 64, 256):
        made.append(cross_attention.case(2, 3136, m).marked(group="sweep class tokens", x=m))
    return made
