"""Attention by channel and by position: its compiled passes against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bti_fast import _library
from bti_fast.nn import DualPathAttention
from bti_fast.nn.dual_path import gated, summarised

from .autograd import bytes_kept, with_gradients

compiled = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 16, 3, 5), (3, 37, 12, 11), (1, 144, 9, 15), (2, 7, 1, 70)], ids=str
)
LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


def _operands(shape, memory_format=torch.channels_last):
    """x, channel, spatial, skip and a cotangent of float32 values; x with ties of its maximum."""
    torch.manual_seed(0)
    x, skip, cotangent = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(3))
    x.round_(decimals=1)
    batch, channels, *size = shape
    return x, torch.rand(batch, channels), torch.rand(batch, 1, *size), skip, cotangent


def _attended(x, skip, channel_of, spatial_of):
    """What the module makes of the passes, with fixed functions for its layers."""
    x, pooled, summary = summarised(x)
    return gated(x, channel_of(pooled), spatial_of(summary), skip)


def _reference(x, skip, channel_of, spatial_of):
    largest = x.max(1, keepdim=True).values
    ties = (x == largest).to(x.dtype)
    largest = (x * (ties / ties.sum(1, keepdim=True)).detach()).sum(1, keepdim=True)
    summary = torch.cat((largest, x.mean(1, keepdim=True)), 1)
    y = torch.einsum("bchw,bc,bhw->bchw", x, channel_of(x.mean((2, 3))), spatial_of(summary)[:, 0])
    return y if skip is None else F.relu(y + skip)


def _channel_of(pooled):
    return (2 * pooled).sigmoid()


def _spatial_of(summary):
    return (summary[:, :1] - 3 * summary[:, 1:]).sigmoid()


@SHAPES
@LAYOUTS
@pytest.mark.parametrize("skipped", [False, True], ids=["alone", "skip"])
def test_passes_of_every_instruction_set(isa, shape, memory_format, skipped):
    x, _, _, skip, cotangent = _operands(shape, memory_format)
    inputs = [value.requires_grad_() for value in ((x, skip) if skipped else (x,))]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    functions = _channel_of, _spatial_of
    for mine, theirs in zip(
        with_gradients(_attended(x, skip if skipped else None, *functions), inputs, cotangent),
        with_gradients(
            _reference(exact[0], exact[1] if skipped else None, *functions), exact, cotangent.double()
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=3e-6)
        assert mine.is_contiguous(memory_format=memory_format)


@SHAPES
def test_inference_of_every_instruction_set(isa, shape):
    x, _, _, skip, _ = _operands(shape)
    before = x.clone()
    with torch.no_grad():
        got = _attended(x, skip, _channel_of, _spatial_of)
        wanted = _reference(x.double(), skip.double(), _channel_of, _spatial_of)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)
    assert torch.equal(x, before)


@compiled
@SHAPES
def test_gradients_of_the_gates_of_every_instruction_set(isa, shape):
    x, channel, spatial, skip, cotangent = _operands(shape)
    inputs = [value.requires_grad_() for value in (x, channel, spatial, skip)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    y = exact[0] * exact[1][:, :, None, None] * exact[2]
    for mine, theirs in zip(
        with_gradients(gated(*inputs), inputs, cotangent),
        with_gradients(F.relu(y + exact[3]), exact, cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


@compiled
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_no_numbers_of_every_instruction_set(isa, value):
    x = torch.randn(2, 37, 5, 4).contiguous(memory_format=torch.channels_last)
    x[0, 36, 2, 1] = value
    x[1, :, 0, 3] = value
    with torch.no_grad():
        _, pooled, summary = summarised(x)
        out = gated(x, torch.ones(2, 37), torch.ones(2, 1, 5, 4), torch.zeros_like(x))
    exact = x.double()
    torch.testing.assert_close(pooled.double(), exact.mean((2, 3)), equal_nan=True)
    torch.testing.assert_close(
        summary.double(), torch.stack((exact.amax(1), exact.mean(1)), 1), equal_nan=True
    )
    torch.testing.assert_close(out.double(), F.relu(exact), equal_nan=True)


def test_second_order_gradients():
    torch.manual_seed(0)
    x, skip = (torch.randn(2, 3, 2, 3).contiguous(memory_format=torch.channels_last) for _ in range(2))
    found = []
    for dtype, attended in ((torch.float32, _attended), (torch.float64, _reference)):
        inputs = [value.to(dtype).requires_grad_() for value in (x, skip)]
        out = attended(*inputs, _channel_of, _spatial_of)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@compiled
def test_the_number_of_threads_changes_no_bit():
    module = DualPathAttention(48).to(memory_format=torch.channels_last)
    x, _, _, skip, cotangent = _operands((2, 48, 40, 41))
    x.requires_grad_()
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(module(x, skip), (x, *module.parameters()), cotangent)[:2])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@compiled
def test_less_is_kept_for_backward():
    module = DualPathAttention(64).to(memory_format=torch.channels_last)
    x, _, _, skip, _ = _operands((2, 64, 24, 24))
    x.requires_grad_()
    one_map = x.numel() * x.element_size()
    kept = bytes_kept(lambda: module(x, skip))  # x and the result
    assert kept < 2.3 * one_map
    assert kept + one_map < bytes_kept(lambda: _reference(x, skip, _channel_of, _spatial_of))


def test_empty_batch():
    module = DualPathAttention(8).to(memory_format=torch.channels_last)
    x = torch.zeros(0, 8, 5, 5, requires_grad=True)
    out = module(x, torch.zeros(0, 8, 5, 5))
    assert torch.autograd.grad(out.sum(), x)[0].shape == out.shape == x.shape


@compiled
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ((0, torch.zeros(2, 8, 3, 5)), "x must be"),
        ((0, torch.zeros(2, 3, 5, 8).permute(0, 3, 1, 2).double()), "x must be float32"),
        ((1, torch.zeros(2, 7)), "channel must be"),
        ((2, torch.zeros(2, 1, 3, 4)), "spatial must be"),
        ((3, torch.zeros(2, 8, 3, 5)), "skip must have"),
    ],
    ids=["layout", "dtype", "channels", "positions", "skip"],
)
def test_kernel_refuses_what_it_cannot_read(replaced, message):
    operands = list(_operands((2, 8, 3, 5))[:4])
    operands[replaced[0]] = replaced[1]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bti_fast_cpu.dual_path_gate(*operands)
