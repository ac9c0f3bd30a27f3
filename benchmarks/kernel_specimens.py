"""The launches that the kernel report compiles: every kernel at the paper's levels, layouts and dtypes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = {"384x14": (384, 14), "192x28": (192, 28), "96x56": (96, 56), "48x112": (48, 112)}
BATCH = 64
LAST = torch.channels_last


@dataclass(frozen=True)
class Specimen:
    """One call of a launcher, on meta tensors; `wide_loads`: what reads maps must do it by 16 bytes."""

    operator: str
    name: str
    call: Callable[[], object]
    wide_loads: bool = False


def meta(*shape: int, dtype=torch.float32, memory_format=torch.contiguous_format) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)


def entropy_uncertainty_specimens() -> list[Specimen]:
    kernels = importlib.import_module("bti_fast.kernels.entropy_uncertainty")

    def pair(name: str, logits, wide: bool = False) -> list[Specimen]:
        u = torch.empty(logits.shape[:1] + logits.shape[2:], device="meta")
        forward, backward = kernels.entropy_uncertainty, kernels.entropy_uncertainty_backward
        return [
            Specimen("entropy_uncertainty", f"forward {name}", lambda: forward(logits), wide),
            Specimen("entropy_uncertainty", f"backward {name}", lambda: backward(u, logits), wide),
        ]

    return [
        *pair("K=1 fp32", meta(8, 1, 224, 224), wide=True),
        *pair("K=4 fp32", meta(8, 4, 224, 224), wide=True),
        *pair("K=4 bf16", meta(8, 4, 224, 224, dtype=torch.bfloat16)),
        *pair("K=4 fp32 channels_last", meta(8, 4, 224, 224, memory_format=LAST)),
        *pair("K=19 fp16 odd size", meta(3, 19, 7, 5, dtype=torch.float16)),
        *pair("K=2 fp32 beyond 2^31", meta(2100, 2, 1024, 1024), wide=True),
    ]


def maps() -> list[tuple[str, Tensor, bool]]:
    """(name, features, whether 16-byte loads are possible): the variants that both fused operators share."""
    half, full = torch.bfloat16, torch.float32
    found = []
    for level, (channels, side) in LEVELS.items():
        # 14 x 14 positions: a plane of bf16 starts at a multiple of 8 bytes only.
        wide = side != 14
        found.append((f"bf16 {level}", meta(BATCH, channels, side, side, dtype=half), wide))
        last = meta(BATCH, channels, side, side, dtype=half, memory_format=LAST)
        found.append((f"bf16 {level} last", last, True))
    found.append(("fp32 384x14", meta(BATCH, 384, 14, 14), True))
    found.append(("fp32 48x112", meta(BATCH, 48, 112, 112), True))
    found.append(("fp32 48x112 last", meta(BATCH, 48, 112, 112, dtype=full, memory_format=LAST), True))
    found.append(("fp16 24x9x13 odd", meta(3, 24, 9, 13, dtype=torch.float16), False))
    found.append(("bf16 48x16x64x64", meta(2, 48, 16, 64, 64, dtype=half), True))
    found.append(("bf16 48x112 sliced", meta(BATCH, 48, 120, 120, dtype=half)[..., 4:116, 4:116], False))
    found.append(("bf16 beyond 2^31", meta(512, 96, 256, 256, dtype=half), True))
    return found


def gated_fusion_specimens() -> list[Specimen]:
    kernels = importlib.import_module("bti_fast.kernels.gated_fusion")
    made = []
    for name, x, wide in maps():
        for classes in (1, 4) if name in ("bf16 96x56", "bf16 96x56 last") else (1,):
            made += _fusion_pair(kernels, f"{name} K={classes}", x, classes, wide)
    return made


def _fusion_pair(kernels, name: str, x: Tensor, classes: int, wide: bool) -> list[Specimen]:
    batch, channels, *spatial = x.shape
    logits = meta(batch, classes, *spatial, dtype=x.dtype)
    small = meta(batch, channels), meta(batch), meta(3)
    grads = torch.empty_like(x), meta(batch, channels), meta(batch), meta(batch, *spatial)
    saved = meta(batch, channels), meta(batch)

    def backward():
        return kernels.gated_fusion_backward(*grads, x, logits, *small, *saved, 0.7)

    return [
        Specimen(
            "gated_fusion", f"forward {name}", lambda: kernels.gated_fusion(x, logits, *small, 0.7), wide
        ),
        Specimen("gated_fusion", f"backward {name}", backward, wide),
    ]


def task_interaction_specimens() -> list[Specimen]:
    forward = importlib.import_module("bti_fast.kernels.gate_algebra").gate_algebra
    backward = importlib.import_module("bti_fast.kernels.gate_algebra_backward").gate_algebra_backward
    made = []
    for channels in (384, 48):  # of the levels the most and the fewest
        inputs = meta(BATCH, channels + channels // 2 + 1), meta(BATCH, 256), _vectors(channels), 0.7
        grads = meta(BATCH, channels), meta(BATCH, 256), meta(BATCH, 2), meta(BATCH, 3)
        for name, training in (("gates", False), ("gates, training", True)):
            call = lambda inputs=inputs, training=training: forward(*inputs, training)  # noqa: E731
            pull = lambda inputs=(*grads, *inputs), training=training: backward(*inputs, training)  # noqa: E731
            made.append(Specimen("task_interaction", f"forward {name} C={channels}", call))
            made.append(Specimen("task_interaction", f"backward {name} C={channels}", pull))
    for name, x, wide in maps():
        made += _interaction_pair(name, x, x.dtype, wide)
        if name == "bf16 96x56":
            made += _interaction_pair(f"{name}, fp32 W1", x, torch.float32, wide)
    many = meta(BATCH, 640, 56, 56, dtype=torch.bfloat16)  # more hidden channels than one chunk holds
    return made + _interaction_pair("bf16 640x56", many, torch.bfloat16, True)


def _vectors(channels: int, features: int = 256) -> list[Tensor]:
    """task_interaction's weights without W1 and b1."""
    vector, square = meta(features), meta(features, features)
    norm_and_gate = [meta(features, channels // 2), *[vector] * 5, square, vector]
    prior_and_gate = [meta(channels, features), meta(channels), meta(channels, channels), meta(channels)]
    signals = [meta(64, channels), meta(64, features), meta(32, 3), meta(32), meta(2, 32), meta(2)]
    return norm_and_gate + prior_and_gate + signals


def _interaction_pair(name: str, x: Tensor, weight_dtype, wide: bool) -> list[Specimen]:
    there = importlib.import_module("bti_fast.kernels.task_interaction")
    back = importlib.import_module("bti_fast.kernels.task_interaction_backward")
    batch, channels = x.shape[:2]
    weight, bias = meta(channels // 2, channels, dtype=weight_dtype), meta(channels // 2)
    scale, summary = meta(batch, channels), meta(batch, channels + channels // 2 + 1)

    def forward():
        there.statistics(x, weight, bias)
        there.modulate(x, scale)

    def backward():
        grad = torch.empty_like(x)
        _, signs = back.reduce_gradient(grad, x, weight, bias)
        back.input_gradient(grad, x, weight, signs, scale, summary)

    return [
        Specimen("task_interaction", f"forward {name}", forward, wide),
        Specimen("task_interaction", f"backward {name}", backward, wide),
    ]


SPECIMENS: dict[str, Callable[[], list[Specimen]]] = {
    "entropy_uncertainty": entropy_uncertainty_specimens,
    "gated_fusion": gated_fusion_specimens,
    "task_interaction": task_interaction_specimens,
}
