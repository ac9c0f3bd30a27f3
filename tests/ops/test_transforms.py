"""Derivatives other than one backward pass: torch.func, forward mode, and gradients of gradients."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import bti_fast
from bti_fast import ops
from tests.ops.operators import CASES, identify, inputs_of, value_and_gradients, with_gradients

EVERY = pytest.mark.parametrize("case", CASES, ids=identify)


def loss(case):
    """A scalar of all outputs with a curvature of its own; float64, so that no precision hides a mistake."""
    return lambda *inputs: sum(out.double().square().sum() for out in case.call(*inputs))


@EVERY
def test_gradients_of_gradients(case):
    inputs = with_gradients(case, inputs_of(case, case.shapes[0]))
    assert torch.autograd.gradgradcheck(case.call, inputs, fast_mode=True)


@EVERY
def test_the_gradient_of_a_gradient_in_float32_is_not_zero(case):
    def second(inputs):
        made = with_gradients(case, inputs)
        wanted = [value for value in made if value.requires_grad]
        first = torch.autograd.grad(loss(case)(*made), wanted, create_graph=True)
        return torch.autograd.grad(sum(value.double().square().sum() for value in first), wanted)

    exact = inputs_of(case, case.shapes[0])
    truth = second(exact)
    peak = max(value.abs().max() for value in truth)
    for got, needed in zip(second([value.float() for value in exact]), truth, strict=True):
        assert (got - needed).abs().max() <= 1e-4 * peak


@EVERY
def test_forward_mode(case):
    inputs = inputs_of(case, case.shapes[0])
    along = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    def call(first):
        return case.call(first, *inputs[1:])

    _, tangents = jvp(call, (inputs[0],), (along,))
    with forward_ad.dual_level():
        duals = call(forward_ad.make_dual(inputs[0], along))
        in_dual_level = [forward_ad.unpack_dual(out).tangent for out in duals]
    step = 1e-6
    above, below = call(inputs[0] + step * along), call(inputs[0] - step * along)
    for one, two, more, less in zip(tangents, in_dual_level, above, below, strict=True):
        torch.testing.assert_close(one, (more - less) / (2 * step), rtol=1e-5, atol=1e-6)
        assert two is not None or not one.any()  # None: does not depend on it
        assert two is None or torch.equal(two, one)


@EVERY
def test_func_grad_is_the_gradient(case):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    positions = tuple(i for i, value in enumerate(with_gradients(case, inputs)) if value.requires_grad)
    got = grad(loss(case), argnums=positions)(*inputs)
    outputs, _ = value_and_gradients(case, inputs)
    _, needed = value_and_gradients(case, inputs, [2 * out.double() for out in outputs])
    for one, two in zip(got, needed, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.name.endswith("training")],  # many batches cannot move one average
    ids=identify,
)
def test_vmap_over_a_part_of_the_inputs(case):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    several = torch.stack([inputs[0], inputs[0].flip(-1), 2 * inputs[0]])
    several = several.transpose(2, 3).contiguous().transpose(2, 3)  # no output lies so by itself
    together = vmap(lambda first: tuple(case.call(first, *inputs[1:])))(several)
    apart = [case.call(one, *inputs[1:]) for one in several]
    for got, needed in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(needed), rtol=1e-4, atol=1e-4)


@EVERY
def test_compiled_transforms(case):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    torch.compiler.reset()

    def gradient(first):
        return grad(lambda value: loss(case)(value, *inputs[1:]))(first)

    def derivative(first):
        return jvp(lambda value: case.call(value, *inputs[1:]), (first,), (first.detach(),))[1]

    for function in (gradient, derivative):
        compiled = torch.compile(function, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs[0]), function(inputs[0]), rtol=1e-4, atol=1e-4)


@EVERY
def test_autocast_does_not_reach_into_the_reference(case):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    if "attention" in case.name:
        inputs = [value.bfloat16() for value in inputs]  # as autocast hands them over

    def derivative():
        return jvp(lambda first: case.call(first, *inputs[1:]), (inputs[0],), (inputs[0],))

    expected = derivative()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = derivative()
    for one, two in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


def test_gradients_a_sample():
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    gates = torch.rand(4, 2)
    coeffs = torch.tensor([1.5, 0.7, -0.3])

    def of_sample(coeffs, logits, prior):
        x = logits[None, :2].square()
        return ops.gated_fusion(x, logits[None], prior[None], prior[:1], coeffs).x.square().sum()

    got = vmap(grad(of_sample), in_dims=(None, 0, 0))(coeffs, logits, gates)
    for one, sample, prior in zip(got, logits, gates, strict=True):
        made = coeffs.clone().requires_grad_()
        of_sample(made, sample, prior).backward()
        torch.testing.assert_close(one, made.grad)


def test_a_forced_backend_that_cannot_says_so():
    x = torch.randn(2, 3, 4, requires_grad=True)
    with bti_fast.backend("cpu"):
        with pytest.raises(bti_fast.errors.BackendUnavailable, match="'cpu' cannot run.*torch.func"):
            grad(lambda a: ops.entropy_uncertainty(a).sum())(x.detach())
        u = ops.entropy_uncertainty(x).sum()
    with pytest.raises(bti_fast.errors.BackendUnavailable, match="'cpu' cannot run.*gradients of gradients"):
        torch.autograd.grad(u, x, create_graph=True)
