"""The transposed convolution of the decoders against torch's own, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast.nn import up_conv
from bti_fast.nn.up_conv import FoldedUpConv, UpConv

from .golden import Golden, relative_error

LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@LAYOUTS
def test_upsampling_matches_the_published_framework(shared_dir, memory_format):
    golden = Golden(shared_dir / "golden" / "prim_conv2dtranspose_k3s2_same_5x6.npz")
    up = UpConv(7, 4)
    golden.fill({"l": up})
    x = golden.leaf("in0")
    out = up(x.contiguous(memory_format=memory_format), (10, 12))
    (out * golden.tensor("cot")).sum().backward()
    assert relative_error(out, golden.tensor("out")) <= 1e-5
    assert relative_error(x.grad, golden.tensor("grad_in0")) <= 1e-5


@pytest.fixture(params=[2 * 35, 2 * 7, 1], ids=["two samples", "two rows", "one row"])
def parts_of_a_5x7_map(request, monkeypatch):
    monkeypatch.setattr(up_conv, "PART", request.param * 9 * 4)


@LAYOUTS
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("more", [(-1, -1), (0, 0), (1, 1), (-1, 1)], ids=str)
def test_outputs_and_gradients(parts_of_a_5x7_map, batch, size, more, memory_format):
    torch.manual_seed(0)
    up = UpConv(6, 4).to(memory_format=memory_format)
    wanted = tuple(2 * n + m for n, m in zip(size, more, strict=True))
    x = torch.randn(batch, 6, *size).contiguous(memory_format=memory_format)
    cotangent = torch.randn(batch, 4, *wanted)
    exact = [value.detach().double().requires_grad_() for value in (x, up.weight, up.bias)]
    truth = _cropped(*exact, wanted)
    x.requires_grad_()
    out = up(x, wanted)
    assert out.shape == truth.shape
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(up(x, wanted), out)
    got = torch.autograd.grad(out, (x, up.weight, up.bias), cotangent)
    for one, two in zip(got, torch.autograd.grad(truth, exact, cotangent.double()), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)
    if batch and memory_format == torch.channels_last:
        assert out.is_contiguous(memory_format=memory_format)
        assert got[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("wanted", [(65, 69), (66, 71)], ids=str)
def test_many_positions(isa, wanted):
    """Enough for the kernel to be worth it in training."""
    torch.manual_seed(0)
    up = UpConv(6, 4)
    x = torch.randn(1, 6, 33, 35).contiguous(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn(1, 4, *wanted)
    exact = [value.detach().double().requires_grad_() for value in (x, up.weight, up.bias)]
    truth = _cropped(*exact, wanted)
    out = up(x, wanted)
    with torch.no_grad():
        assert torch.equal(out, FoldedUpConv(up)(x.detach(), wanted))
    got = out, *torch.autograd.grad(out, (x, up.weight, up.bias), cotangent)
    expected = truth, *torch.autograd.grad(truth, exact, cotangent.double())
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=2e-6 * float(two.abs().max()))


@LAYOUTS
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("channels", [(6, 4), (1, 3), (60, 40)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("wanted", [(-1, -1), (0, 0), (1, 1), (9, 4)], ids=str)
def test_folded(isa, batch, channels, size, wanted, memory_format):
    torch.manual_seed(0)
    up = UpConv(*channels).to(memory_format=memory_format)
    folded = FoldedUpConv(up)
    wanted = tuple(2 * n + m for n, m in zip(size, wanted, strict=True))
    x = torch.randn(batch, channels[0], *size).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = copy.deepcopy(up).double()(x.double(), wanted)
        out = folded(x, wanted)
    assert out.shape == expected.shape
    assert out.stride() == up(x, wanted).stride() or channels[0] == 1 or batch == 0
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_folded_takes_other_maps():
    torch.manual_seed(0)
    up = UpConv(6, 4).requires_grad_(False)
    folded = FoldedUpConv(up)
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    got = torch.vmap(lambda one: folded(one[None], (8, 9))[0])(x)
    torch.testing.assert_close(got, up(x, (8, 9)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(folded(x, (8, 9)), up(x, (8, 9)))
    assert torch.autograd.gradcheck(lambda x: folded.double()(x, (8, 9)), (x.double().requires_grad_(),))
    half = copy.deepcopy(up).bfloat16()
    torch.testing.assert_close(FoldedUpConv(half)(x.bfloat16(), (8, 9)), half(x.bfloat16(), (8, 9)))


def test_channels_last_maps_do_not_take_the_librarys_way(monkeypatch):
    def library(*args):
        raise AssertionError

    monkeypatch.setattr(F, "conv_transpose2d", library)
    up, x = UpConv(3, 2), torch.randn(1, 3, 4, 5)
    up(x.contiguous(memory_format=torch.channels_last), (8, 10)).sum().backward()
    with pytest.raises(AssertionError):
        up(x, (8, 10))


@LAYOUTS
def test_another_size_is_interpolated(memory_format):
    torch.manual_seed(0)
    up, x = UpConv(3, 2), torch.randn(2, 3, 5, 6).contiguous(memory_format=memory_format)
    whole = _cropped(x, up.weight, up.bias, (10, 12))
    expected = F.interpolate(whole, size=(20, 23), mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x, (20, 23)), expected)


@pytest.mark.parametrize("learned", range(3))
def test_a_frozen_operand_gets_no_gradient(learned):
    up = UpConv(3, 2).requires_grad_(False)
    operands = [torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), up.weight, up.bias]
    operands[learned].requires_grad_()
    up(operands[0], (8, 8)).square().sum().backward()
    truth = [value.detach().double().requires_grad_() for value in operands]
    _cropped(*truth, (8, 8)).square().sum().backward()
    assert [value.grad is not None for value in operands] == [n == learned for n in range(3)]
    torch.testing.assert_close(operands[learned].grad.double(), truth[learned].grad, rtol=1e-5, atol=1e-4)


def test_second_order_gradients():
    torch.manual_seed(0)
    up = UpConv(3, 2).double()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def call(x, weight, bias):
        return torch.func.functional_call(up, {"weight": weight, "bias": bias}, (x, (6, 7)))

    operands = [value.detach().requires_grad_() for value in (x, up.weight, up.bias)]
    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)


def test_16_bit_maps_and_transforms_take_the_librarys_way():
    torch.manual_seed(0)
    up, x = UpConv(3, 2), torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert up(x, (8, 8)).dtype == torch.bfloat16
    assert UpConv(3, 2).bfloat16()(x.bfloat16(), (8, 8)).dtype == torch.bfloat16
    per_sample = torch.func.vmap(torch.func.grad(lambda one: up(one[None], (8, 8)).square().sum()))(x)
    x.requires_grad_()
    up(x, (8, 8)).square().sum().backward()
    torch.testing.assert_close(per_sample, x.grad)


def _cropped(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride=2)[:, :, : size[0], : size[1]]
