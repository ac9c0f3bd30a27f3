"""silu after batch normalisation against torch's own layers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bti_fast import _library
from bti_fast.nn.normalised_silu import depthwise_silu, normalised_silu

from .autograd import bytes_kept, with_gradients

compiled = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))
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
        with_gradients(normalised_silu(norm, x), (x, *norm.parameters()), cotangent),
        with_gradients(F.silu(truth(exact)), (exact, *truth.parameters()), cotangent.double()),
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
    found = with_gradients(normalised_silu(norm, x), (x, *norm.parameters()), cotangent)
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32, torch.float32]
    for mine, theirs in zip(
        found,
        with_gradients(F.silu(truth(exact)), (exact, *truth.parameters()), cotangent.double()),
        strict=True,
    ):
        rounding = 16 * torch.finfo(dtype).eps * float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=rounding)


def test_less_is_kept_for_backward():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    norm = nn.BatchNorm2d(8)
    one_map = x.numel() * x.element_size()
    assert bytes_kept(lambda: normalised_silu(norm, x)) < 1.1 * one_map < bytes_kept(lambda: F.silu(norm(x)))


@compiled
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 37, 1, 1), (3, 5, 16, 13), (1, 70, 3, 5), (2, 24, 31, 17)], ids=str)
def test_training_of_every_instruction_set(isa, shape, training):
    torch.manual_seed(0)
    norm = _norm(shape[1]).train(training)
    truth = copy.deepcopy(norm).double()
    x = (3 * torch.randn(shape) + 20).contiguous(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn(shape)
    exact = x.detach().double().requires_grad_()
    for mine, theirs in zip(
        with_gradients(normalised_silu(norm, x), (x, *norm.parameters()), cotangent),
        with_gradients(F.silu(truth(exact)), (exact, *truth.parameters()), cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))
    for name, value in truth.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name).to(value), value, rtol=1e-6, atol=1e-6)


@compiled
def test_statistics_of_every_instruction_set(isa):
    torch.manual_seed(0)
    x = torch.randn(5000, 37) * torch.logspace(0, 3, 37) + torch.linspace(-1e3, 1e3, 37)
    mean, variance = torch.ops.bti_fast_cpu.batch_statistics(x)
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


@compiled
@pytest.mark.parametrize("rows", [1, 129])
def test_slope_over_the_range_of_every_instruction_set(isa, rows):
    x = torch.linspace(-200, 200, rows * 75).reshape(rows, 75)
    exact = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.silu(exact).sum(), exact)
    ones, zeros = torch.ones(75), torch.zeros(75)
    got = torch.ops.bti_fast_cpu.scaled_silu_gradient(torch.ones_like(x), x, ones, zeros, None, None, None)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=1e-6)
    sums = torch.ops.bti_fast_cpu.scaled_silu_sums(torch.ones_like(x), x, ones, zeros, zeros)
    wanted = torch.stack((wanted.sum(0), (wanted * x.double()).sum(0)))
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-4)


@compiled
def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    x = torch.randn(2, 48, 40, 41).contiguous(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn_like(x)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norm = nn.BatchNorm2d(48)
            found.append(with_gradients(normalised_silu(norm, x), (x, *norm.parameters()), cotangent))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("weight_grad", [True, False])
def test_layers_that_are_not_all_there(weight_grad):
    """Without weights or statistics, and with frozen weights."""
    torch.manual_seed(0)
    frozen = _norm(5)
    frozen.requires_grad_(weight_grad)
    for norm in (nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, track_running_stats=False), frozen):
        for training in (True, False):
            truth = copy.deepcopy(norm.train(training)).double()
            x = torch.randn(3, 5, 4, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
            exact = x.detach().double().requires_grad_()
            mine = with_gradients(normalised_silu(norm, x), (x,), torch.ones_like(x))
            theirs = with_gradients(F.silu(truth(exact)), (exact,), torch.ones_like(exact))
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1])
def test_one_value_per_channel_changes_nothing(batch):
    norm = _norm(5)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match=rf"x: found shape \({batch}, 5, 1, 1\), needed more than one value"):
        normalised_silu(norm, torch.randn(batch, 5, 1, 1, requires_grad=True))
    for name, value in before.items():
        assert torch.equal(norm.state_dict()[name], value)


@pytest.mark.parametrize("training", [True, False])
def test_second_order_gradients(training):
    torch.manual_seed(0)
    norm = _norm(3).double().train(training)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        own = copy.deepcopy(norm)  # each call moves the running statistics
        del own.weight, own.bias
        own.weight, own.bias = weight, bias
        return normalised_silu(own, x)

    assert torch.autograd.gradgradcheck(function, (x, norm.weight, norm.bias))


@LAYOUTS
@pytest.mark.parametrize("layer", ["evaluation", "training", "no affine", "no statistics", "identity"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 13)], ids=str)
def test_inference(size, layer, memory_format):
    torch.manual_seed(0)
    channels = 37
    norm = {
        "no affine": nn.BatchNorm2d(channels, affine=False).eval(),
        "no statistics": nn.BatchNorm2d(channels, track_running_stats=False).eval(),
        "identity": nn.Identity(),
    }.get(layer, _norm(channels).train(layer == "training"))
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=layer != "evaluation")
    exact_norm, exact_conv = copy.deepcopy(norm).double(), copy.deepcopy(conv).double()
    x = (3 * torch.randn(2, channels, *size)).contiguous(memory_format=memory_format)
    with torch.no_grad():
        wanted = F.silu(exact_norm(x.double())), F.silu(exact_norm(exact_conv(x.double())))
        got = normalised_silu(norm, x.clone()), depthwise_silu(conv, norm, x)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-6)
        assert mine.is_contiguous(memory_format=memory_format)


@compiled
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 16), (257, 75)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_of_every_instruction_set(isa, shape, scaled):
    torch.manual_seed(0)
    x = torch.linspace(-30, 30, shape[0] * shape[1]).reshape(shape)
    line = (torch.randn(shape[1]), torch.randn(shape[1])) if scaled else (None, None)
    whole = torch.full((shape[0] + 2, shape[1]), torch.nan)  # what lies around is not touched
    whole[1:-1] = x
    torch.ops.bti_fast_cpu.scaled_silu_(whole[1:-1], *line)
    z = x.double() * line[0].double() + line[1].double() if scaled else x.double()
    torch.testing.assert_close(whole[1:-1].double(), F.silu(z), rtol=2e-6, atol=5e-7 if scaled else 1e-9)
    assert whole[[0, -1]].isnan().all()


@compiled
def test_ends_of_the_range_of_every_instruction_set(isa):
    values = torch.tensor([-torch.inf, -3e38, -200.0, -88.0, -0.0, 1e-40, 88.0, 3e38, torch.inf, torch.nan])
    for count in (3, values.numel(), 40):  # in whole vectors and in the rest
        x = values.repeat(4)[:count]
        wanted = torch.where(x < -80, 0, F.silu(x.double()))  # the limit, where e^-x is beyond the range
        torch.ops.bti_fast_cpu.scaled_silu_(x, None, None)
        torch.testing.assert_close(x.double(), wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@compiled
@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((torch.zeros(8, 4).T, None, None), "x must be"),
        ((torch.zeros(4, 8).half(), None, None), "x must be"),
        ((torch.zeros(4, 8), torch.ones(8), None), "scale and shift"),
        ((torch.zeros(4, 8), torch.ones(7), torch.ones(8)), "scale must be"),
        ((torch.zeros(4, 8), torch.ones(8), torch.ones(8).double()), "shift must be"),
    ],
    ids=["layout", "dtype", "one alone", "length", "dtype of shift"],
)
def test_kernel_refuses_what_it_cannot_read(operands, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bti_fast_cpu.scaled_silu_(*operands)


@compiled
def test_no_elements():
    x = torch.zeros(0, 4)
    torch.ops.bti_fast_cpu.scaled_silu_(x, None, None)
    torch.ops.bti_fast_cpu.scaled_silu_(torch.zeros(3, 0), torch.zeros(0), torch.zeros(0))
    assert x.shape == (0, 4)


def test_empty_batch():
    norm = _norm(5).eval()
    x = torch.zeros(0, 5, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    grads = torch.autograd.grad(normalised_silu(norm, x).sum(), (x, *norm.parameters()))
    assert [g.shape for g in grads] == [(0, 5, 3, 3), (5,), (5,)]
    assert not any(g.any() for g in grads)


def _norm(channels):
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm
