"""Shapes nobody chose: one pixel, one channel, primes, no multiple of a vector, any memory order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import bti_fast
from bti_fast import _library, ops
from tests.ops.operators import (
    Case,
    call_interaction,
    call_interaction_training,
    fusion_inputs,
    interaction_inputs,
    value_and_gradients,
)
from tests.ops.test_contract import error

SIZES = st.sampled_from((1, 2, 3, 5, 7, 8, 9, 11, 13, 16, 17, 23, 31))
SPATIAL = st.integers(1, 3).flatmap(
    lambda rank: st.tuples(*[SIZES] * rank).filter(lambda size: torch.Size(size).numel() <= 1200)
)
CHANNELS = st.sampled_from((1, 2, 3, 7, 8, 12, 13, 16, 17, 31, 33))
# The same cases in every run, and none of the hundreds that shrinking a failure would take.
FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


def agrees(case: Case, inputs: list, order: str) -> None:
    """The compiled operator against the reference in float64: values to 1e-5, gradients to 1e-4.

    Batch statistics leave gradients of nothing but rounding: those may lose 3x what eager float32 does.
    """
    narrow = [value.float() for value in inputs]
    with bti_fast.backend("reference"):
        truth, true_grads = value_and_gradients(case, [value.double() for value in narrow])
        _, eager_grads = value_and_gradients(case, narrow)
    narrow[0] = reorder(narrow[0], order)
    with bti_fast.backend("cpu"):
        got, grads = value_and_gradients(case, narrow)
    for out, exact in zip(got, truth, strict=True):
        assert error(out, exact) <= 1e-5
    for grad, eager, exact in zip(grads, eager_grads, true_grads, strict=True):
        assert error(grad, exact, true_grads) <= max(1e-4, 3 * error(eager, exact, true_grads))
    assert got[0].stride() == torch.empty_like(narrow[0]).stride()


def reorder(x: torch.Tensor, order: str) -> torch.Tensor:
    if order == "channels last" and x.dim() > 3:
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if order == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x


ORDERS = st.sampled_from(("contiguous", "channels last", "transposed"))
if _library.load("cpu") is not None:
    pytest.skip(f"no compiled CPU library: {_library.load('cpu')}", allow_module_level=True)


@FEW
@given(st.integers(1, 3), CHANNELS, st.integers(1, 5), SPATIAL, ORDERS, st.integers(0, 99))
def test_gated_fusion(batch, channels, classes, spatial, order, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = fusion_inputs((batch, channels, *spatial), generator)
    inputs["seg_logits"] = 2 * torch.randn(batch, classes, *spatial, dtype=torch.float64, generator=generator)
    case = Case("gated_fusion", None, lambda *values: tuple(ops.gated_fusion(*values)), (), (), ())
    agrees(case, list(inputs.values()), order)


@FEW
@given(st.integers(1, 3), CHANNELS, SPATIAL, ORDERS, st.integers(0, 99))
def test_task_interaction(batch, channels, spatial, order, seed):
    inputs = interaction_inputs((batch, channels, *spatial), torch.Generator().manual_seed(seed))
    agrees(Case("task_interaction", None, call_interaction, (), (), ()), list(inputs.values()), order)


@FEW
@given(st.integers(3, 6), CHANNELS, SPATIAL, ORDERS, st.integers(0, 99))
def test_task_interaction_in_training(batch, channels, spatial, order, seed):
    # One hidden channel normalises to a multiple of itself: gradients that are zero but for rounding.
    inputs = interaction_inputs((batch, max(channels, 4), *spatial), torch.Generator().manual_seed(seed))
    case = Case("task_interaction_training", None, call_interaction_training, (), (), ())
    agrees(case, list(inputs.values()), order)
