"""Dropout by 16 random bits: its rate, scale, gradients and memory, and where it is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bti_fast.nn.dropout import MANY, Dropout

from .autograd import bytes_kept

SIZE = (3, 40, 25, 21)  # 63 000 values


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.9])
def test_rate_scale_and_gradient(p, memory_format):
    torch.manual_seed(0)
    x = torch.randn(SIZE).contiguous(memory_format=memory_format).requires_grad_()
    y = Dropout(p)(x)
    kept = y != 0
    count = x.numel()
    assert abs((~kept).sum().item() - p * count) <= 4 * (p * (1 - p) * count) ** 0.5
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=2e-4 if p == 0.9 else 2e-5, atol=0)
    assert y.is_contiguous(memory_format=memory_format)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, kept / (1 - p), rtol=2e-4 if p == 0.9 else 2e-5, atol=0)


def test_every_position_and_channel_is_dropped_alike():
    torch.manual_seed(0)
    layer, rate = Dropout(0.3), 0.0
    x = torch.ones(2, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    runs = 200
    for _ in range(runs):
        rate = rate + (layer(x) == 0).float() / runs
    spread = (0.3 * 0.7 / runs) ** 0.5
    assert (rate - 0.3).abs().max() < 5.5 * spread  # of 32768 means the largest
    assert rate.std() == pytest.approx(spread, rel=0.05)
    a, b = (layer(x) == 0 for _ in range(2))
    assert (a & b).float().mean() == pytest.approx(0.09, abs=0.01)


def test_a_seed_repeats_it():
    x = torch.randn(SIZE)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(Dropout(0.3)(x))
    assert torch.equal(*results)
    assert not torch.equal(results[0], Dropout(0.3)(x))


def test_a_byte_of_each_value_is_kept():
    x = torch.randn(SIZE, requires_grad=True)
    assert bytes_kept(lambda: Dropout(0.3)(x)) <= 2 * x.numel()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, MANY)[:, : MANY // 4],
        torch.randn(2, 3, 100, 100)[..., ::2],
        torch.randn(1, 2, 3),
        torch.empty(0, 4, 5, 5),
    ],
    ids=["few", "strided", "small", "none"],
)
def test_other_inputs_are_torchs(x):
    torch.manual_seed(1)
    ours = Dropout(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(ours, nn.Dropout(0.3)(x))


def test_in_evaluation_nothing_happens():
    x = torch.randn(SIZE)
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.count_nonzero(Dropout(1.0)(x)) == 0


def test_transforms_take_torchs():
    x = torch.randn(2, *SIZE)
    y = torch.func.vmap(Dropout(0.3), randomness="different")(x)
    assert y.shape == x.shape
    compiled = torch.compile(Dropout(0.3), backend="eager")
    assert compiled(x).shape == x.shape
