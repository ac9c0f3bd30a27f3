"""Linear maps at every position, against the same layers with the channels last and as convolutions."""

import copy

import pytest
import torch
from torch import nn

from bti_fast.nn.pointwise import FEW_POSITIONS, MANY_POSITIONS, conv1x1, pointwise

from .autograd import with_gradients


@pytest.mark.parametrize("spatial", [(7,), (3, 5), (2, 3, 1)])
@pytest.mark.parametrize("outputs", [1, 6])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other"])
def test_values_and_gradients(spatial, outputs, layout):
    torch.manual_seed(0)
    linear = nn.Linear(4, outputs)
    if layout == "channels last":
        x = torch.randn(3, *spatial, 4).movedim(-1, 1)
    else:
        x = torch.randn(3, 8, *spatial)[:, ::2] if layout == "every other" else torch.randn(3, 4, *spatial)
    wide, wide_x = nn.Linear(4, outputs).double(), x.double().requires_grad_()
    wide.load_state_dict(linear.state_dict())
    expected = wide(wide_x.movedim(1, -1)).movedim(-1, 1)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    x.requires_grad_()
    found = pointwise(linear, x)
    found.backward(grad.float())
    assert found.is_contiguous()
    for one, two in (
        (found, expected),
        (x.grad, wide_x.grad),
        (linear.weight.grad, wide.weight.grad),
        (linear.bias.grad, wide.bias.grad),
    ):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5)


def test_no_images():
    assert pointwise(nn.Linear(4, 2), torch.randn(0, 4, 5, 6)).shape == (0, 2, 5, 6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 7), (3, 4, 5), (2, 9, 9), (0, 2, 2)], ids=str)
def test_conv1x1(size, memory_format, bias):
    torch.manual_seed(0)
    batch, *spatial = size
    conv = nn.Conv2d(6, 10, 1, bias=bias)
    exact = copy.deepcopy(conv).double()
    x = torch.randn(batch, 6, *spatial).contiguous(memory_format=memory_format).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    cotangent = torch.randn(batch, 10, *spatial)
    for mine, theirs in zip(
        with_gradients(conv1x1(conv, x), (x, *conv.parameters()), cotangent),
        with_gradients(exact(exact_x), (exact_x, *exact.parameters()), cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    assert conv1x1(conv, x).stride() == conv(x).stride() or min(size) <= 1


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_many_positions(bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 1, bias=bias)
    exact = copy.deepcopy(conv).double()
    x = torch.randn(2, 6, 23, 25).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert 2 * 23 * 25 > MANY_POSITIONS
    exact_x = x.detach().double().requires_grad_()
    cotangent = torch.randn(2, 10, 23, 25)
    for mine, theirs in zip(
        with_gradients(conv1x1(conv, x), (x, *conv.parameters()), cotangent),
        with_gradients(exact(exact_x), (exact_x, *exact.parameters()), cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("size", [(2, 9, 9), (2, 23, 25)], ids=str)
@pytest.mark.parametrize("learned", range(3))
def test_gradient_of_one_operand(size, learned):
    """The others frozen; the gradient that comes in lies elsewhere, and its own is asked for, too."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 1)
    batch, *spatial = size
    x = torch.randn(batch, 6, *spatial).contiguous(memory_format=torch.channels_last)
    operands = (x, conv.weight, conv.bias)
    for number, operand in enumerate(operands):
        operand.requires_grad_(number == learned)
    cotangent = torch.randn(batch, 20, *spatial)[:, ::2].requires_grad_()
    found = torch.autograd.grad(conv1x1(conv, x), operands[learned], cotangent, create_graph=True)[0]
    plain = torch.autograd.grad(conv1x1(conv, x), operands[learned], cotangent)[0]
    exact = [operand.detach().double().requires_grad_() for operand in (*operands, cotangent)]
    out = nn.functional.conv2d(*exact[:3])
    expected = torch.autograd.grad(out, exact[learned], exact[3], create_graph=True)[0]
    for value in (found, plain):
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    second = torch.autograd.grad(found.square().sum(), cotangent)[0]
    truth = torch.autograd.grad(expected.square().sum(), exact[3])[0]
    torch.testing.assert_close(second.double(), truth, rtol=0, atol=2e-6 * float(truth.abs().max()))


def test_few_positions_are_a_product(monkeypatch):
    class Refusing(nn.Conv2d):
        pass

    def refuse(*_):
        raise AssertionError("the convolution was called")

    conv = nn.Conv2d(6, 10, 1)
    x = torch.randn(1, 6, 1, FEW_POSITIONS + 1).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(nn.Conv2d, "forward", refuse)
    assert conv1x1(conv, x[..., :-1].contiguous(memory_format=torch.channels_last)).shape[3] == FEW_POSITIONS
    with pytest.raises(AssertionError, match="was called"), torch.no_grad():
        conv1x1(conv, x)
    with pytest.raises(AssertionError, match="was called"):  # what a subclass adds is kept
        conv1x1(Refusing(6, 10, 1), x[..., :1].contiguous(memory_format=torch.channels_last))


def test_conv1x1_under_vmap():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 10, 1), torch.randn(3, 2, 6, 4, 4)
    got = torch.vmap(lambda one: conv1x1(conv, one))(x)
    torch.testing.assert_close(got[2], conv(x[2]))
