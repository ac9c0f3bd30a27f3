"""Layers that recompute, against torch's own layers in float64: outputs, gradients, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bti_fast import _library
from bti_fast.nn import recomputed
from bti_fast.nn.recomputed import mixed_scales

from .autograd import bytes_kept, with_gradients

LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@LAYOUTS
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (12, 16)], ids=str)
def test_mixed_scales(size, memory_format):
    torch.manual_seed(0)
    shapes = ((5, 1, 3, 3), (5, 1, 3, 3), (5, 1, 3, 3), (2, 3, 5, 5), (2, 5))
    operands = [torch.randn(2, 5, *size, dtype=torch.float64).contiguous(memory_format=memory_format)]
    operands += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    cotangent = torch.randn_like(operands[0])
    mine, theirs = ([value.clone().requires_grad_() for value in operands] for _ in range(2))
    wanted = with_gradients(_written_out(*theirs), theirs, cotangent)
    got = with_gradients(_called(*mine), mine, cotangent)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        out = _called(*operands)
    torch.testing.assert_close(out, wanted[0], rtol=1e-11, atol=1e-11)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("learned", [None, 0, 2, 4])
def test_mixed_scales_in_shares(monkeypatch, batch, learned):
    """Large maps, some samples at a time: here two."""
    torch.manual_seed(0)
    shapes = ((37, 1, 3, 3),) * 3 + ((batch, 3, 37, 37), (batch, 37))
    operands = [torch.randn(batch, 37, 9, 11).contiguous(memory_format=torch.channels_last)]
    operands += [torch.randn(shape) for shape in shapes]
    cotangent = torch.randn_like(operands[0])
    exact = [value.double() for value in operands]
    for values in (operands, exact):
        for number, value in enumerate(values):
            value.requires_grad_(learned in (None, number))
    wanted = with_gradients(
        _written_out(*exact), [value for value in exact if value.requires_grad], cotangent.double()
    )
    monkeypatch.setattr(recomputed, "SHARE", 2 * operands[0][0].numel() * 4)
    got = with_gradients(_called(*operands), [value for value in operands if value.requires_grad], cotangent)
    for mine, theirs in zip(got, wanted, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6 * scale)
    with torch.no_grad():
        out = _called(*operands)
        if _library.load("cpu") is None:
            assert len(recomputed._shares(operands[0])) == (1 if batch == 2 else 3)
    torch.testing.assert_close(out.double(), wanted[0], rtol=0, atol=2e-6 * float(wanted[0].abs().max()))


def test_mixed_scales_of_no_images():
    shapes = ((5, 1, 3, 3),) * 3 + ((0, 3, 5, 5), (0, 5))
    x = torch.empty(0, 5, 4, 4, memory_format=torch.channels_last)
    operands = [value.requires_grad_() for value in (x, *(torch.randn(shape) for shape in shapes))]
    out = _called(*operands)
    assert out.shape == x.shape
    grads = torch.autograd.grad(out.sum(), operands)
    assert [g.shape for g in grads] == [value.shape for value in operands]


@pytest.mark.parametrize("learned", range(6))
def test_mixed_scales_with_all_operands_frozen_but_one(learned):
    torch.manual_seed(0)
    shapes = ((2, 5, 6, 7), (5, 1, 3, 3), (5, 1, 3, 3), (5, 1, 3, 3), (2, 3, 5, 5), (2, 5))
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    operands[learned].requires_grad_()
    cotangent = torch.randn(shapes[0], dtype=torch.float64)
    wanted = with_gradients(_written_out(*operands), operands[learned], cotangent)
    got = with_gradients(_called(*operands), operands[learned], cotangent)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-11, atol=1e-11)


def test_less_is_kept_for_backward():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    one_map = x.numel() * x.element_size()
    others = [torch.randn(s, requires_grad=True) for s in ((8, 1, 3, 3),) * 3 + ((2, 3, 8, 8), (2, 8))]
    assert (
        bytes_kept(lambda: _called(x, *others)) < 1.5 * one_map < bytes_kept(lambda: _written_out(x, *others))
    )


def _called(x, kernel1, kernel2, kernel4, matrices, bias):
    return mixed_scales(x, (kernel1, kernel2, kernel4), matrices, bias)


def _written_out(x, kernel1, kernel2, kernel4, matrices, bias):
    out = bias[:, :, None, None]
    for number, (kernel, d) in enumerate(((kernel1, 1), (kernel2, 2), (kernel4, 4))):
        spread = F.conv2d(x, kernel, padding=d, dilation=d, groups=x.shape[1])
        out = out + torch.einsum("bij,bjhw->bihw", matrices[:, number], spread)
    return out
