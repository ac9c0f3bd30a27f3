"""The dilated depthwise convolution against torch's own convolution and its gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bti_fast.nn.dilated_depthwise import dilated_depthwise


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 7), (13, 5), (16, 12)], ids=str)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_outputs_and_gradients(dilation, size, memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    expected = _with_gradients(_library, x, weight, cotangent, dilation)
    for got, wanted in zip(
        _with_gradients(dilated_depthwise, x, weight, cotangent, dilation), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    single = [value.float() for value in (x, weight, cotangent)]
    for got, wanted in zip(_with_gradients(dilated_depthwise, *single, dilation), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_second_order_gradients():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: dilated_depthwise(x, w, 2), (x, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_gets_no_gradient(frozen):
    torch.manual_seed(0)
    operands = [torch.randn(1, 2, 6, 6), torch.randn(2, 1, 3, 3)]
    operands[1 - frozen].requires_grad_()
    dilated_depthwise(*operands, 2).sum().backward()
    assert operands[frozen].grad is None
    assert operands[1 - frozen].grad is not None


def _library(x, weight, dilation):
    return F.conv2d(x, weight, padding=dilation, dilation=dilation, groups=x.shape[1])


def _with_gradients(function, x, weight, cotangent, dilation):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight, dilation)
    return out.detach(), *torch.autograd.grad(out, (x, weight), cotangent)
