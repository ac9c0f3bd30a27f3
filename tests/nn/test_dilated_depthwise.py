"""The depthwise convolution against torch's own and its gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bti_fast import _library
from bti_fast.nn.dilated_depthwise import depthwise, dilated_depthwise

compiled = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (3, 4), (5, 1), (5, 2), (7, 1)])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 7), (13, 5), (16, 12)], ids=str)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_outputs_and_gradients(kernel, dilation, size, memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(5, 1, kernel, kernel, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    expected = _with_gradients(_library_convolution, x, weight, cotangent, dilation)
    for got, wanted in zip(
        _with_gradients(dilated_depthwise, x, weight, cotangent, dilation), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    single = [value.float() for value in (x, weight, cotangent)]
    for got, wanted in zip(_with_gradients(dilated_depthwise, *single, dilation), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-5)


@compiled
@pytest.mark.parametrize("rest", ["", "bias", "scale", "scale bias", "scale bias silu", "silu"])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (3, 4), (5, 1), (5, 3)])
@pytest.mark.parametrize("size", [(2, 1, 1, 1), (2, 7, 2, 9), (2, 40, 7, 7), (1, 75, 13, 21)], ids=str)
def test_kernel_of_every_instruction_set(isa, size, kernel, dilation, rest):
    torch.manual_seed(0)
    channels = size[1]
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    x[1:, 0] = torch.nan  # stays in its sample and channel
    weight = torch.randn(channels, 1, kernel, kernel)
    bias = torch.randn(channels) if "bias" in rest else None
    scale = torch.randn(channels) if "scale" in rest else None
    taps = weight.flatten(1).T.contiguous()
    got = torch.ops.bti_fast_cpu.dilated_depthwise(x, taps, bias, dilation, scale, "silu" in rest)
    assert got.is_contiguous(memory_format=torch.channels_last)
    expected = _library_convolution(x.double(), weight.double(), dilation)
    expected *= 1 if scale is None else scale.double()[:, None, None]
    expected += 0 if bias is None else bias.double()[:, None, None]
    expected = F.silu(expected) if "silu" in rest else expected
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@compiled
@pytest.mark.parametrize(
    "size",
    [
        *((2, 1, 1, 1), (2, 7, 3, 5), (2, 24, 2, 150), (2, 40, 7, 7), (1, 75, 13, 21)),
        *((3, 300, 14, 13), (8, 33, 17, 16)),  # several parts, the first with two blocks of channels
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_weight_gradient_of_every_instruction_set(isa, size, kernel, dilation):
    torch.manual_seed(0)
    x, grad = (torch.randn(size).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x[-1, -1, 0, -1] = torch.nan  # in the sums of its channel that it is part of, and in no other
    grad[0, 0, -1, 0] = torch.nan
    got = torch.ops.bti_fast_cpu.dilated_depthwise_weight(grad, x, kernel, dilation)
    expected = _sums_over_positions(grad.double(), x.double(), kernel, dilation)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=3e-5, equal_nan=True)


@compiled
@pytest.mark.parametrize("offset", [0, 1])
def test_weight_gradient_of_large_maps_loses_less_than_the_library(offset):
    torch.manual_seed(0)
    x, grad = (torch.randn(4, 16, 112, 112) + offset for _ in range(2))
    x, grad = (value.contiguous(memory_format=torch.channels_last) for value in (x, grad))
    expected = _sums_over_positions(grad.double(), x.double(), 3, 1)
    ours = torch.ops.bti_fast_cpu.dilated_depthwise_weight(grad, x, 3, 1)
    library = torch.nn.grad.conv2d_weight(x, (16, 1, 3, 3), grad, padding=1, groups=16).flatten(1).T
    assert (ours - expected).abs().max() < (library - expected).abs().max()


@compiled
@pytest.mark.parametrize("size", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0)], ids=str)
def test_weight_gradient_of_empty_maps(size):
    taps = torch.ops.bti_fast_cpu.dilated_depthwise_weight(torch.zeros(size), torch.zeros(size), 3, 1)
    assert torch.equal(taps, torch.zeros(9, size[1]))


@compiled
@pytest.mark.parametrize(
    ("dtype", "memory_format", "dilation"),
    [
        (torch.float32, torch.channels_last, 1),
        (torch.float32, torch.channels_last, 2),
        (torch.float32, torch.contiguous_format, 2),
        (torch.bfloat16, torch.channels_last, 2),
        (torch.float16, torch.contiguous_format, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [False, True])
def test_weight_gradient_takes_no_library(monkeypatch, dtype, memory_format, dilation, spread):
    torch.manual_seed(0)
    x = torch.randn(2, 24, 9, 8).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(24, 1, 3, 3, dtype=dtype, requires_grad=True)
    out = dilated_depthwise(x, weight, dilation)
    cotangent = torch.ones((), dtype=dtype).expand_as(out) if spread else torch.randn_like(out)
    monkeypatch.setattr(torch.nn.grad, "conv2d_weight", None)
    (got,) = torch.autograd.grad(out, weight, cotangent)
    assert got.dtype == dtype and got.is_contiguous()
    expected = _sums_over_positions(cotangent.double(), x.double(), 3, dilation)
    rtol = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(got.double().flatten(1).T, expected, rtol=rtol, atol=1e-4)


@compiled
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_number_of_threads_changes_no_bit(dilation):
    torch.manual_seed(0)
    x, grad = (torch.randn(3, 65, 31, 33).contiguous(memory_format=torch.channels_last) for _ in range(2))
    conv = nn.Conv2d(65, 65, 3, padding=dilation, dilation=dilation, groups=65)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(depthwise(conv, x))
            results.append(torch.ops.bti_fast_cpu.dilated_depthwise_weight(grad, x, 3, dilation))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[::2])
    assert all(torch.equal(result, results[1]) for result in results[1::2])


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "channels_last"),
        ({"x": torch.zeros(1, 8, 4, 4).double().contiguous(memory_format=torch.channels_last)}, "float32"),
        ({"taps": torch.zeros(8, 9).T}, "taps"),
        ({"taps": torch.zeros(49, 8)}, "3x3 or 5x5"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"dilation": 0}, "dilation"),
        ({"scale": torch.zeros(7)}, "scale"),
    ],
    ids=["layout", "dtype", "taps", "kernel", "bias", "dilation", "scale"],
)
def test_kernel_refuses_what_it_cannot_read(change, message):
    operands = {
        "x": torch.zeros(1, 8, 4, 4).contiguous(memory_format=torch.channels_last),
        "taps": torch.zeros(9, 8),
        "bias": None,
        "dilation": 1,
        "scale": None,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bti_fast_cpu.dilated_depthwise(*operands.values())


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "x must be .* channels_last"),
        ({"grad": torch.zeros(1, 8, 4, 4)}, "grad must be .* channels_last"),
        ({"grad": torch.zeros(1, 8, 4)}, "grad must be .* channels_last"),
        ({"grad": torch.zeros(1, 4, 5, 8).permute(0, 3, 1, 2)}, "shape of x, got 5 for 4 along axis 3"),
        ({"x": torch.zeros(1, 4, 4, 8).double().permute(0, 3, 1, 2)}, "x must be float32"),
        ({"grad": torch.zeros(1, 4, 4, 8).bfloat16().permute(0, 3, 1, 2)}, "grad must be float32"),
        ({"kernel": 7}, "kernel"),
        ({"dilation": 0}, "dilation"),
    ],
    ids=[
        "layout of x",
        "layout of grad",
        "axes",
        "shape",
        "dtype of x",
        "dtype of grad",
        "kernel",
        "dilation",
    ],
)
def test_weight_gradient_refuses_what_it_cannot_read(change, message):
    operands = {
        "grad": torch.zeros(1, 4, 4, 8).permute(0, 3, 1, 2),
        "x": torch.zeros(1, 4, 4, 8).permute(0, 3, 1, 2),
        "kernel": 3,
        "dilation": 1,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bti_fast_cpu.dilated_depthwise_weight(*operands.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "padding": 4, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"kernel_size": 4, "padding": 2},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "out_channels": 16},
    ],
    ids=str,
)
def test_any_convolution(options, training, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, **{"out_channels": 8, "groups": 8, "bias": bias, **options})
    x = torch.randn(2, 8, 9, 11).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(depthwise(conv, x), conv(x), rtol=1e-5, atol=1e-5)


def test_gradients_of_gradients_in_float32():
    torch.manual_seed(0)
    operands = torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last), torch.randn(8, 1, 3, 3)
    seconds = []
    for function in (dilated_depthwise, _library_convolution):
        x, weight = (value.clone().requires_grad_() for value in operands)
        grads = torch.autograd.grad(function(x, weight, 1).square().sum(), (x, weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight)))
    for got, wanted in zip(*seconds, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


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


def _library_convolution(x, weight, dilation):
    padding = weight.shape[2] // 2 * dilation
    return F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1])


def _sums_over_positions(grad, x, kernel, dilation):
    """The weight's gradient by its definition, [k·k, C]: zeros around the map take no part in it."""
    height, width = x.shape[2:]
    taps = x.new_zeros(kernel, kernel, x.shape[1])
    for i in range(kernel):
        for j in range(kernel):
            down, right = ((tap - kernel // 2) * dilation for tap in (i, j))
            rows = slice(max(0, -down), max(0, min(height, height - down)))
            columns = slice(max(0, -right), max(0, min(width, width - right)))
            seen = x[:, :, max(0, down) :, max(0, right) :]
            here = grad[:, :, rows, columns]
            taps[i, j] = (here * seen[:, :, : here.shape[2], : here.shape[3]]).sum((0, 2, 3))
    return taps.flatten(0, 1)


def _with_gradients(function, x, weight, cotangent, dilation):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight, dilation)
    return out.detach(), *torch.autograd.grad(out, (x, weight), cotangent)
