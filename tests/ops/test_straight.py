"""Calls that pass by the dispatcher: the same numbers as through it, and only where nothing waits there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bti_fast import ops
from tests.ops.operators import CASES, cotangents_for, identify, inputs_of, operator_of, with_gradients


def run(case, inputs):
    """Outputs, and gradients of all of them and of the last alone."""
    made = with_gradients(case, inputs)
    wanted = [value for value in made if value.requires_grad]
    outputs = case.call(*made)
    given = [cot.to(out.dtype) for out, cot in zip(outputs, cotangents_for(outputs), strict=True)]
    grads = torch.autograd.grad(outputs, wanted, given, retain_graph=True)
    last = torch.autograd.grad(outputs[-1], wanted, given[-1], allow_unused=True)
    return [*(out.detach() for out in outputs), *grads, *last]


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_the_same_bits_as_through_the_dispatcher(case, monkeypatch):
    inputs = [value.float() for value in inputs_of(case, case.shapes[0])]
    operator, called = operator_of(case), []
    with monkeypatch.context() as patch:
        patch.setattr(operator, "op", lambda *args: called.append(args))
        straight = run(case, inputs)
        with torch.no_grad():
            straight += case.call(*inputs)
    assert not called
    monkeypatch.setattr(type(operator), "__call__", lambda self, *args: self.op(*args))
    through = run(case, inputs)
    with torch.no_grad():
        through += case.call(*inputs)
    for one, two in zip(straight, through, strict=True):
        assert torch.equal(one, two) and one.stride() == two.stride()


class Seen(TorchDispatchMode):
    """The operators that the dispatcher shows a mode."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass of Tensor, as image libraries have them."""


def logits(**options):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), **options)


def test_modes_see_the_operator_and_its_backward():
    x = logits(requires_grad=True)
    with Seen() as seen:
        ops.entropy_uncertainty(x).sum().backward()
    assert {"bti_fast.entropy_uncertainty.default", "bti_fast.entropy_uncertainty_backward.default"} <= set(
        seen.names
    )
    u = ops.entropy_uncertainty(x).sum()  # straight, but a mode waits for the backward pass
    with Seen() as seen:
        u.backward()
    assert "bti_fast.entropy_uncertainty_backward.default" in seen.names


def through(monkeypatch, call) -> bool:
    """Whether ``call`` of entropy_uncertainty passes the dispatcher."""
    operator, called = ops.OPERATORS["entropy_uncertainty"], []
    op = operator.op
    with monkeypatch.context() as patch:
        patch.setattr(operator, "op", lambda *args: called.append(args) or op(*args))
        call()
    return bool(called)


def test_what_passes_the_dispatcher(monkeypatch):
    u = ops.entropy_uncertainty
    negated = torch.complex(logits(), logits()).conj().imag
    assert negated.is_neg()
    assert not through(monkeypatch, lambda: u(logits()))
    assert not through(monkeypatch, lambda: u(torch.nn.Parameter(logits())))
    with torch.inference_mode():
        assert not through(monkeypatch, lambda: u(logits()))
        made = logits()
    assert not through(monkeypatch, lambda: u(made))
    assert made.is_inference() and torch.equal(u(made), u(logits()))
    assert through(monkeypatch, lambda: u(logits().as_subclass(Named)))
    assert through(monkeypatch, lambda: u(logits().to("meta")))
    assert through(monkeypatch, lambda: u(negated))
    with FakeTensorMode():
        assert through(monkeypatch, lambda: u(torch.zeros(2, 3, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert through(monkeypatch, lambda: u(logits()))
    assert through(monkeypatch, lambda: torch.func.functionalize(u)(logits()))
    assert torch.equal(u(negated), u(negated.resolve_neg()))
    assert type(u(logits().as_subclass(Named))) is Named


def test_what_a_backward_pass_needs_may_not_change_before_it():
    x = logits(requires_grad=True)
    hidden = x * 1.0
    u = ops.entropy_uncertainty(hidden)
    hidden += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        u.sum().backward()


def test_a_tensor_made_in_inference_mode_is_not_kept_for_a_backward_pass():
    with torch.inference_mode():
        k = torch.randn(1, 2, 3, 16)
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ops.cross_attention(q, k, q, k)


def test_a_torch_without_these_private_functions_is_served_by_the_dispatcher(monkeypatch):
    x = logits()
    assert not through(monkeypatch, lambda: ops.entropy_uncertainty(x))
    monkeypatch.setattr("bti_fast.ops.straight._KNOWN", False)
    assert through(monkeypatch, lambda: ops.entropy_uncertainty(x))
