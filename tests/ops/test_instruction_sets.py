"""gated_fusion and task_interaction in C++ on every instruction set of this machine and any thread count."""

from __future__ import annotations

import pytest
import torch

import bti_fast
from bti_fast import _library
from tests.ops import test_contract as contract
from tests.ops.operators import CASES, identify, inputs_of, value_and_gradients

native, reason = _library.native()
reason = reason or _library.load("cpu")
if reason:
    pytest.skip(f"no compiled CPU library: {reason}", allow_module_level=True)

CASES_HERE = [case for case in CASES if case.name.startswith(("gated_fusion", "task_interaction"))]
OPERATORS = pytest.mark.parametrize("case", CASES_HERE, ids=identify)


@pytest.fixture(params=native.supported_isas())
def isa(request):
    native.force_isa(request.param)
    yield request.param
    native.force_isa("auto")


@OPERATORS
@pytest.mark.parametrize("dtype", contract.NARROW, ids=str)
def test_within_the_error_budget(isa, case, dtype):
    contract.test_within_the_error_budget(case, "cpu", dtype)


@OPERATORS
def test_any_layout_gives_the_same_numbers(isa, case):
    contract.test_any_layout_gives_the_same_numbers(case, "cpu")


@OPERATORS
@pytest.mark.parametrize("shape", ((3, 48, 19, 23), (2, 20, 6, 9, 11)), ids=str)
def test_the_number_of_threads_does_not_change_a_bit(isa, case, shape):
    inputs = [value.float() for value in inputs_of(case, shape)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with bti_fast.backend("cpu"):
                results.append(value_and_gradients(case, inputs))
    finally:
        torch.set_num_threads(before)
    for outputs, grads in results[1:]:
        for got, expected in zip((*outputs, *grads), (*results[0][0], *results[0][1]), strict=True):
            assert torch.equal(got, expected)


@OPERATORS
@pytest.mark.parametrize("channels_last", (False, True))
def test_a_map_of_many_tiles(isa, case, channels_last):
    """More pixels than one tile, one run and one set of partial sums hold."""
    inputs = [value.float() for value in inputs_of(case, (2, 17, 67, 131))]
    with bti_fast.backend("reference"):
        expected, expected_grads = value_and_gradients(case, [value.double() for value in inputs])
    if channels_last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    with bti_fast.backend("cpu"):
        got, grads = value_and_gradients(case, inputs)
    for one, two in zip(got, expected, strict=True):
        assert contract.error(one, two) <= 1e-5
    for one, two in zip(grads, expected_grads, strict=True):
        assert contract.error(one, two, expected_grads) <= 1e-4
