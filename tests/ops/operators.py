"""What the contract tests need to know of each operator: how to make inputs for it and how to call it.

A new backend is tested by being registered; a new operator by one entry here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bti_fast import ops

# On a GPU: BTI_FAST_TEST_DEVICE=cuda pytest tests/ops/test_contract.py
DEVICE = os.environ.get("BTI_FAST_TEST_DEVICE", "cpu")
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS_HERE = (
    ("reference", "triton", "cuda", "sdpa")
    if DEVICE == "cuda"
    else ("reference", "cpu", *(("triton",) if INTERPRETED else ()), "sdpa")
)


@dataclass(frozen=True)
class Case:
    """One operator under test.

    ``make(shape, generator)`` gives float64 inputs by name, the first of them the anchor whose memory format
    the first output keeps; ``call`` takes them and returns the float outputs.
    """

    name: str
    make: Callable[[tuple, torch.Generator], dict[str, Tensor]]
    call: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    empties: tuple[tuple[int, ...], ...]
    keeps_format: bool = True
    not_on: tuple[str, ...] = ()  # backends that name a reason against all of these shapes


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def entropy_inputs(shape, generator):
    return {"logits": normal(generator, *shape, scale=2.0)}


def fusion_inputs(shape, generator, classes=3):
    batch, channels, *spatial = shape
    return {
        "x": normal(generator, *shape),
        "seg_logits": normal(generator, batch, classes if channels % 2 else 1, *spatial, scale=2.0),
        "prior": uniform(generator, batch, channels),
        "cls_uncertainty": uniform(generator, batch),
        "coeffs": torch.tensor([1.5, 0.7, -0.3], dtype=torch.float64),
    }


def interaction_inputs(shape, generator, features=10):
    channels = shape[1]
    hidden = max(1, channels // 2)
    sizes = {
        "conv_weight": (hidden, channels),
        "conv_bias": (hidden,),
        "fc_weight": (features, hidden),
        "fc_bias": (features,),
        "bn_weight": (features,),
        "bn_bias": (features,),
        "bn_mean": (features,),
        "bn_var": (features,),
        "cls_gate_weight": (features, features),
        "cls_gate_bias": (features,),
        "prior_weight": (channels, features),
        "prior_bias": (channels,),
        "seg_gate_weight": (channels, channels),
        "seg_gate_bias": (channels,),
        "seg_proj": (64, channels),
        "cls_proj": (64, features),
        "gate1_weight": (32, 3),
        "gate1_bias": (32,),
        "gate2_weight": (2, 32),
        "gate2_bias": (2,),
    }
    inputs = {"x": normal(generator, *shape), "y": normal(generator, shape[0], features)}
    for field, size in sizes.items():
        inputs[field] = normal(generator, *size, scale=size[-1] ** -0.5)
    inputs["fc_bias"] = inputs["fc_bias"] + 0.5
    inputs["bn_var"] = uniform(generator, features) + 0.3
    return inputs


def attention_inputs(shape, generator):
    batch, heads, n, d, m, e = shape
    return {
        "q": normal(generator, batch, heads, n, d),
        "k": normal(generator, batch, heads, m, d),
        "v_q": normal(generator, batch, heads, n, e),
        "v_k": normal(generator, batch, heads, m, e),
    }


def call_interaction(x, y, *weights, training=False):
    return tuple(ops.task_interaction(x, y, ops.TaskInteractionWeights(*weights), training=training))


def call_interaction_training(x, y, *weights):
    weights = ops.TaskInteractionWeights(*weights)
    weights = weights._replace(
        bn_mean=weights.bn_mean.detach().clone(), bn_var=weights.bn_var.detach().clone()
    )
    return tuple(ops.task_interaction(x, y, weights, training=True))


def call_attention(q, k, v_q, v_k):
    return tuple(ops.cross_attention(q, k, v_q, v_k))


def call_masked_attention(q, k, v_q, v_k):
    q_mask = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1) % 3 != 1
    k_mask = (
        torch.arange(k.shape[2], device=q.device).expand(q.shape[0], -1) % 4 != 0
    )  # M = 1: nothing is left
    return tuple(ops.cross_attention(q, k, v_q, v_k, q_mask=q_mask, k_mask=k_mask, scale=0.3))


MAPS = ((2, 3, 9, 13), (3, 1, 8, 8), (1, 5, 1, 1), (2, 4, 37), (2, 3, 5, 8, 7), (2, 8, 11, 5))
EMPTY_MAPS = ((0, 3, 9, 13), (2, 3, 0, 13))
ATTENTION = ((2, 2, 35, 16, 5, 32), (1, 1, 1, 16, 1, 16), (1, 3, 50, 32, 9, 64), (2, 1, 130, 32, 1, 32))
ODD_ATTENTION = ((2, 3, 4, 8, 9, 5), (1, 1, 7, 3, 300, 24))
EMPTY_ATTENTION = ((0, 2, 7, 16, 3, 16), (2, 2, 0, 16, 3, 16), (2, 2, 7, 16, 0, 16))

CASES = (
    Case(
        "entropy_uncertainty",
        entropy_inputs,
        lambda logits: (ops.entropy_uncertainty(logits),),
        (*MAPS, (5, 7), (4, 1)),
        (*EMPTY_MAPS, (0, 4)),
        keeps_format=False,
    ),
    Case(
        "gated_fusion",
        fusion_inputs,
        lambda *inputs: tuple(ops.gated_fusion(*inputs)),
        MAPS,
        EMPTY_MAPS,
    ),
    Case("task_interaction", interaction_inputs, call_interaction, MAPS, EMPTY_MAPS),
    Case(
        "task_interaction_training",
        interaction_inputs,
        call_interaction_training,
        # Two samples normalise to +-1, and one hidden channel to a multiple of it: no gradient to measure.
        tuple((shape[0] + 2, max(shape[1], 3), *shape[2:]) for shape in MAPS),
        EMPTY_MAPS,
    ),
    Case("cross_attention", attention_inputs, call_attention, ATTENTION, EMPTY_ATTENTION),
    Case("cross_attention_odd", attention_inputs, call_attention, ODD_ATTENTION, (), not_on=("cpu", "cuda")),
    Case("cross_attention_masked", attention_inputs, call_masked_attention, ATTENTION, ()),
)


def some_shapes(case: Case, backend: str) -> tuple[tuple[int, ...], ...]:
    """The shapes for tests of many runs each; only two where the interpreter would take a minute for all."""
    return case.shapes[:5:4] if backend == "triton" and INTERPRETED else case.shapes[:5]


def operator_of(case: Case) -> ops.dispatch.Operator:
    name = case.name.removesuffix("_training").removesuffix("_masked").removesuffix("_odd")
    return ops.OPERATORS[name]


def pairs(backends: tuple[str, ...] = BACKENDS_HERE) -> list[tuple[Case, str]]:
    """Every (operator, backend) pair that is registered and can run on this machine."""
    return [
        (case, name)
        for case in CASES
        for name in backends
        if name in operator_of(case).backends and name not in case.not_on
    ]


def identify(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


def inputs_of(case: Case, shape: tuple, seed: int = 0) -> list[Tensor]:
    made = case.make(shape, torch.Generator().manual_seed(seed))
    return [value.to(DEVICE) for value in made.values()]


def frozen(case: Case) -> tuple[int, ...]:
    """Positions of the inputs that carry no gradient: the running statistics."""
    if not case.name.startswith("task_interaction"):
        return ()
    fields = ops.TaskInteractionWeights._fields
    return tuple(2 + fields.index(name) for name in ("bn_mean", "bn_var"))


def with_gradients(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    skip = frozen(case)
    return [value.detach().requires_grad_(i not in skip) for i, value in enumerate(inputs)]


def value_and_gradients(
    case: Case, inputs: list[Tensor], cotangents: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of sum(output * cotangent) for every differentiable input."""
    inputs = with_gradients(case, inputs)
    outputs = case.call(*inputs)
    if cotangents is None:
        cotangents = cotangents_for(outputs)
    wanted = [value for value in inputs if value.requires_grad]
    total = sum((out * cot.to(out.dtype)).sum() for out, cot in zip(outputs, cotangents, strict=True))
    return [out.detach() for out in outputs], list(torch.autograd.grad(total, wanted))


def cotangents_for(outputs) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [
        torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.device) for out in outputs
    ]
