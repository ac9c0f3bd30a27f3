"""The contract of SPEC 2, for every operator on every backend that runs on this machine."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bti_fast
from tests.ops.operators import (
    CASES,
    DEVICE,
    call_masked_attention,
    cotangents_for,
    frozen,
    identify,
    inputs_of,
    operator_of,
    pairs,
    some_shapes,
    value_and_gradients,
    with_gradients,
)

PAIRS = pytest.mark.parametrize(("case", "backend"), pairs(), ids=identify)
NARROW = (torch.float32, torch.float16, torch.bfloat16)


def cast(inputs, dtype):
    return [value.to(dtype) for value in inputs]


def error(got, truth, among=()) -> float:
    """Largest deviation relative to the largest true value; NaN never passes a bound.

    A truth that is zero by its mathematics is measured against 1 % of the largest value ``among`` its peers.
    """
    if truth.numel() == 0:
        return 0.0
    peak = max((float(value.abs().max()) for value in among if value.numel()), default=0.0)
    return float((got.double() - truth).abs().max() / max(float(truth.abs().max()), 0.01 * peak, 1e-12))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@PAIRS
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_within_the_error_budget(case, backend, dtype):
    """At most 2x (gradients 3x) what the eager reference loses in the same dtype; fp32 1e-5 and 1e-4.

    The reference is float32 inside and rounds its results alone. Of 16-bit cross_attention that asks more
    than its docstring says (eager maths in that dtype), and holds for ordinary logits.
    """
    for shape in case.shapes:
        inputs = cast(inputs_of(case, shape), dtype)
        exact = [value.double() for value in inputs]
        with bti_fast.backend("reference"):
            truth, true_grads = value_and_gradients(case, exact)
            eager, eager_grads = value_and_gradients(case, inputs, cotangents_for(truth))
        with bti_fast.backend(backend):
            got, grads = value_and_gradients(case, inputs, cotangents_for(truth))
        floor = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
        for out, ref, exact_out in zip(got, eager, truth, strict=True):
            assert error(out, exact_out) <= max(2 * error(ref, exact_out), floor), (shape, "forward")
        for grad, ref, exact_grad in zip(grads, eager_grads, true_grads, strict=True):
            allowed = 3 * error(ref, exact_grad, true_grads)
            bound = 1e-4 if dtype == torch.float32 else max(allowed, floor)
            assert error(grad, exact_grad, true_grads) <= bound, (shape, "gradient")


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_gradcheck_of_the_reference(case):
    for shape in case.shapes[:3]:
        inputs = with_gradients(case, inputs_of(case, shape))
        with bti_fast.backend("reference"):
            assert torch.autograd.gradcheck(
                case.call, inputs, eps=1e-6, atol=1e-5, nondet_tol=0.0, fast_mode=True
            )


@PAIRS
def test_opcheck(case, backend):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    operator = operator_of(case)
    with bti_fast.backend(backend):
        for differentiable in (False, True):
            made = with_gradients(case, inputs) if differentiable else inputs
            torch.library.opcheck(operator.op, raw_arguments(case, made))


def raw_arguments(case, inputs):
    if case.name.startswith("task_interaction"):
        return (inputs[0], inputs[1], inputs[2:], 0.7, case.name.endswith("training"))
    if case.name.startswith("cross_attention"):
        q, k = inputs[:2]
        masks = (
            (torch.arange(q.shape[2], device=DEVICE) > 3).expand(q.shape[0], -1),
            (torch.arange(k.shape[2], device=DEVICE) < 3).expand(q.shape[0], -1),
        )
        return (*inputs, *(masks if case.name.endswith("masked") else (None, None)), 0.25)
    return (*inputs, 0.7) if case.name == "gated_fusion" else tuple(inputs)


def layouts(value):
    """The same numbers channels-last, sliced out of a larger tensor, transposed, and reversed in memory."""
    if value.dim() in (4, 5):
        fmt = torch.channels_last if value.dim() == 4 else torch.channels_last_3d
        yield "channels_last", value.contiguous(memory_format=fmt)
    wide = torch.full([n + 3 for n in value.shape], torch.nan, dtype=value.dtype, device=DEVICE)
    window = wide[tuple(slice(1, 1 + n) for n in value.shape)]
    window.copy_(value)
    yield "sliced", window
    yield "transposed", value.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield (
        "permuted",
        value.permute(*reversed(range(value.dim()))).contiguous().permute(*reversed(range(value.dim()))),
    )


@PAIRS
def test_any_layout_gives_the_same_numbers(case, backend):
    for shape in some_shapes(case, backend):
        inputs = [value.float() for value in inputs_of(case, shape)]
        with bti_fast.backend(backend):
            plain, plain_grads = value_and_gradients(case, inputs)
            strided = [dict(layouts(value)) if value.dim() > 2 else {} for value in inputs]
            for layout in ("channels_last", "sliced", "transposed", "permuted"):
                changed = [made.get(layout, value) for made, value in zip(strided, inputs, strict=True)]
                got, grads = value_and_gradients(case, changed, cotangents_for(plain))
                for out, expected in zip((*got, *grads), (*plain, *plain_grads), strict=True):
                    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
                if case.keeps_format:
                    anchor = changed[2] if case.name.startswith("cross") else changed[0]
                    assert got[0].stride() == torch.empty_like(anchor).stride(), layout


@PAIRS
def test_empty_inputs_give_empty_results(case, backend):
    for shape in case.empties:
        inputs = [value.float() for value in inputs_of(case, shape)]
        with bti_fast.backend(backend):
            outputs = case.call(*inputs)
            full = case.call(*[value.float() for value in inputs_of(case, [max(n, 2) for n in shape])])
        assert [out.dim() for out in outputs] == [out.dim() for out in full]
        assert outputs[0].numel() == 0 or shape[0] > 0


@pytest.mark.parametrize(
    ("case", "backend"),
    [pair for pair in pairs() if not pair[0].name.endswith("training")],  # batch statistics mix the samples
    ids=identify,
)
@pytest.mark.parametrize("poison", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf_stay_in_their_sample(case, backend, poison):
    shape = next(shape for shape in case.shapes if shape[0] > 1)
    clean = [value.float() for value in inputs_of(case, shape)]
    dirty = [value.clone() for value in clean]
    dirty[0][1].view(-1)[0] = poison
    with bti_fast.backend("reference"):
        eager = case.call(*dirty)
    with bti_fast.backend(backend):
        expected, got = case.call(*clean), case.call(*dirty)
    for out, dirty_out, eager_out in zip(expected, got, eager, strict=True):
        torch.testing.assert_close(dirty_out[0], out[0], rtol=0, atol=0)
        assert torch.equal(torch.isfinite(dirty_out), torch.isfinite(eager_out))
    with bti_fast.backend(backend):
        (_, (clean_grad, *_)), (_, (dirty_grad, *_)) = (value_and_gradients(case, x) for x in (clean, dirty))
    torch.testing.assert_close(dirty_grad[0], clean_grad[0], rtol=0, atol=0)


@PAIRS
def test_bitwise_deterministic(case, backend):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    with bti_fast.backend(backend):
        first, first_grads = value_and_gradients(case, inputs)
        second, second_grads = value_and_gradients(case, inputs)
    for one, two in zip((*first, *first_grads), (*second, *second_grads), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_compiles_as_one_graph(case, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in case.shapes[:1] if not dynamic else (case.shapes[0], tuple(n + 2 for n in case.shapes[0])):
        inputs = [value.float() for value in inputs_of(case, shape)]
        expected, expected_grads = value_and_gradients(case, inputs)
        made = with_gradients(case, inputs)
        outputs = compiled(*made)
        total = sum(
            (out * cot.to(out.dtype)).sum() for out, cot in zip(outputs, cotangents_for(outputs), strict=True)
        )
        grads = torch.autograd.grad(total, [value for value in made if value.requires_grad])
        for one, two in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_exports(case):
    class Wrapped(torch.nn.Module):
        def forward(self, *inputs):
            return case.call(*inputs)

    inputs = tuple(value.float() for value in inputs_of(case, case.shapes[0]))
    program = torch.export.export(Wrapped(), inputs)
    assert any(str(node.target).startswith("bti_fast.") for node in program.graph.nodes)
    for one, two in zip(program.module()(*inputs), case.call(*inputs), strict=True):
        torch.testing.assert_close(one, two)


@PAIRS
def test_under_autocast_each_tensor_keeps_its_dtype(case, backend):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    inputs[0] = inputs[0].bfloat16()
    with bti_fast.backend(backend):
        expected = case.call(*(value.bfloat16() if "attention" in case.name else value for value in inputs))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = case.call(*inputs)
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@PAIRS
def test_activation_checkpointing(case, backend):
    inputs = with_gradients(case, [value.float() for value in inputs_of(case, case.shapes[0])])
    wanted = [value for value in inputs if value.requires_grad]
    with bti_fast.backend(backend):
        plain = torch.autograd.grad(sum(out.sum() for out in case.call(*inputs)), wanted)
        again = torch.autograd.grad(
            sum(out.sum() for out in checkpoint(case.call, *inputs, use_reentrant=False)), wanted
        )
    for one, two in zip(plain, again, strict=True):
        assert torch.equal(one, two)


@PAIRS
def test_float64_runs_or_says_why_not(case, backend):
    inputs = inputs_of(case, case.shapes[0])
    reason = operator_of(case).backends[backend].predicate(*inputs)
    with bti_fast.backend(backend):
        if reason is None:
            assert case.call(*inputs)[0].dtype == torch.float64
        else:
            with pytest.raises(bti_fast.errors.BackendUnavailable, match="float64"):
                case.call(*inputs)


def test_masked_tokens_reach_nobody():
    inputs = [value.float() for value in inputs_of(CASES[-1], (2, 2, 9, 16, 5, 16))]
    for backend in ("reference", "sdpa"):
        with bti_fast.backend(backend):
            expected = call_masked_attention(*inputs)
            dirty = [value.clone() for value in inputs]
            dirty[0][:, :, 1::3] = torch.nan
            dirty[2][:, :, 1::3] = torch.inf
            dirty[1][:, :, 0::4] = torch.nan
            dirty[3][:, :, 0::4] = torch.inf
            got, grads = value_and_gradients(CASES[-1], dirty)
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two)
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert got[0][:, :, 1::3].abs().max() == 0 and got[1][:, :, 0::4].abs().max() == 0


def test_running_statistics_carry_no_gradient():
    assert frozen(CASES[2]) == (8, 9)
