"""Layers that recompute, against torch's own layers in float64: outputs, gradients, statistics, memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bti_fast.nn.recomputed import mixed_scales, normalised_silu

LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@LAYOUTS
@pytest.mark.parametrize("training", [True, False])
def test_normalised_silu(training, memory_format):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.1).train(training)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    truth = copy.deepcopy(norm).double()
    x = torch.randn(3, 5, 4, 7).contiguous(memory_format=memory_format).requires_grad_()
    cotangent = torch.randn_like(x)
    exact = x.detach().double().requires_grad_()
    for mine, theirs in zip(
        _gradients(normalised_silu(norm, x), (x, *norm.parameters()), cotangent),
        _gradients(F.silu(truth(exact)), (exact, *truth.parameters()), cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    for name, value in truth.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name).to(value), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_normalised_silu_of_16_bit_maps(training, dtype):
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(5).train(training)  # autocast leaves its weights in fp32
    norm.running_mean.normal_()
    truth = copy.deepcopy(norm).double()
    x = torch.randn(3, 5, 4, 7).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    cotangent = torch.randn(3, 5, 4, 7).to(dtype)
    found = _gradients(normalised_silu(norm, x), (x, *norm.parameters()), cotangent)
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32, torch.float32]
    for mine, theirs in zip(
        found,
        _gradients(F.silu(truth(exact)), (exact, *truth.parameters()), cotangent.double()),
        strict=True,
    ):
        rounding = 16 * torch.finfo(dtype).eps * float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=rounding)


@LAYOUTS
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (12, 16)], ids=str)
def test_mixed_scales(size, memory_format):
    torch.manual_seed(0)
    shapes = ((5, 1, 3, 3), (5, 1, 3, 3), (5, 1, 3, 3), (2, 3, 5, 5), (2, 5))
    operands = [torch.randn(2, 5, *size, dtype=torch.float64).contiguous(memory_format=memory_format)]
    operands += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    cotangent = torch.randn_like(operands[0])
    mine, theirs = ([value.clone().requires_grad_() for value in operands] for _ in range(2))
    wanted = _gradients(_written_out(*theirs), theirs, cotangent)
    got = _gradients(_called(*mine), mine, cotangent)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        out = _called(*operands)
    torch.testing.assert_close(out, wanted[0], rtol=1e-11, atol=1e-11)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("learned", range(6))
def test_mixed_scales_with_all_operands_frozen_but_one(learned):
    torch.manual_seed(0)
    shapes = ((2, 5, 6, 7), (5, 1, 3, 3), (5, 1, 3, 3), (5, 1, 3, 3), (2, 3, 5, 5), (2, 5))
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    operands[learned].requires_grad_()
    cotangent = torch.randn(shapes[0], dtype=torch.float64)
    wanted = _gradients(_written_out(*operands), operands[learned], cotangent)
    got = _gradients(_called(*operands), operands[learned], cotangent)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-11, atol=1e-11)


def test_less_is_kept_for_backward():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    norm = nn.BatchNorm2d(8)
    one_map = x.numel() * x.element_size()
    assert _kept(lambda: normalised_silu(norm, x)) < 1.1 * one_map < _kept(lambda: F.silu(norm(x)))
    others = [torch.randn(s, requires_grad=True) for s in ((8, 1, 3, 3),) * 3 + ((2, 3, 8, 8), (2, 8))]
    assert _kept(lambda: _called(x, *others)) < 1.5 * one_map < _kept(lambda: _written_out(x, *others))


def _called(x, kernel1, kernel2, kernel4, matrices, bias):
    return mixed_scales(x, (kernel1, kernel2, kernel4), matrices, bias)


def _written_out(x, kernel1, kernel2, kernel4, matrices, bias):
    out = bias[:, :, None, None]
    for number, (kernel, d) in enumerate(((kernel1, 1), (kernel2, 2), (kernel4, 4))):
        spread = F.conv2d(x, kernel, padding=d, dilation=d, groups=x.shape[1])
        out = out + torch.einsum("bij,bjhw->bihw", matrices[:, number], spread)
    return out


def _gradients(out, inputs, cotangent):
    return out.detach(), *torch.autograd.grad(out, inputs, cotangent)


def _kept(function) -> int:
    """Bytes of distinct tensors that autograd keeps."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t
    ):
        function()
    return sum(t.numel() * t.element_size() for t in kept.values())
