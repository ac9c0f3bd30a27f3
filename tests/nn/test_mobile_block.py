"""EfficientNet's blocks folded into one operator, against the layers they are made of in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bti_fast import _library
from bti_fast.models.encoders import EfficientNetEncoder, _mobile_block
from bti_fast.nn.mobile_block import FoldedMobileBlock

compiled = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))
CHANNELS_LAST = torch.channels_last
BLOCKS = {  # stage and number in efficientnet-b0
    "no expansion": (0, 0),
    "3x3 stride 2": (1, 0),
    "3x3 skip": (1, 1),
    "5x5 stride 2": (2, 0),
    "5x5 skip": (2, 1),
    "5x5 no skip": (4, 0),
}
SIZES = [(2, 1, 1), (1, 2, 3), (2, 9, 8), (1, 8, 31), (3, 13, 11)]


@pytest.fixture(scope="module")
def encoder() -> EfficientNetEncoder:
    torch.manual_seed(0)
    made = EfficientNetEncoder("efficientnet-b0").eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.weight, -1.5, 1.5)
    return made


def block_of(encoder, name: str) -> nn.Module:
    stage, number = BLOCKS[name]
    return copy.deepcopy(encoder.net._blocks[stage][number])


def image_for(block, size, memory_format=CHANNELS_LAST):
    torch.manual_seed(1)
    batch, *spatial = size
    return torch.randn(batch, block.in_channels, *spatial).contiguous(memory_format=memory_format)


@torch.no_grad()
def truth(block, x):
    exact = copy.deepcopy(block).double()
    return [value.detach() for value in _mobile_block(exact, x.detach().double())]


def assert_close(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5 * float(two.abs().max()))


@compiled
@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("has_se", [True, False], ids=["se", "no se"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_of_every_instruction_set(isa, encoder, name, has_se, size):
    block = block_of(encoder, name)
    block.has_se = has_se
    x = image_for(block, size)
    torch.full((2**20,), torch.nan)  # what the next tensors are made of
    before = x.clone()
    found = FoldedMobileBlock(block)(x)
    assert_close(found, truth(block, x))
    assert torch.equal(x, before)
    assert all(m.is_contiguous(memory_format=CHANNELS_LAST) for m in found)


@compiled
@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_threads_change_no_bit(encoder, name):
    block = FoldedMobileBlock(block_of(encoder, name))
    x = image_for(block_of(encoder, name), (3, 30, 29))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(block(x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@compiled
@torch.no_grad()
def test_a_nan_spoils_its_image_alone(encoder):
    block = FoldedMobileBlock(block_of(encoder, "3x3 skip"))
    x = image_for(block_of(encoder, "3x3 skip"), (2, 9, 9))
    x[1, 0, 4, 4] = torch.nan
    y, expanded = block(x)
    assert y[1].isnan().all() and not y[0].isnan().any()  # by way of the mean
    assert expanded[1, :, 4, 4].isnan().all() and expanded.isnan().sum() == expanded.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["5x5 stride 2", "3x3 skip", "no expansion"])
@pytest.mark.parametrize("kind", ["nchw", "float64", "vmap", "export", "autocast"])
def test_others_take_torchs_layers(encoder, name, kind):
    block = block_of(encoder, name)
    folded = FoldedMobileBlock(block)
    x = image_for(block, (2, 9, 8), torch.contiguous_format if kind == "nchw" else CHANNELS_LAST)
    expected = truth(block, x)
    if kind == "float64":
        found = folded.double()(x.double())
    elif kind == "vmap":
        found = [m.flatten(0, 1) for m in torch.vmap(folded)(x[:, None])]
    elif kind == "export":
        found = torch.export.export(folded, (x,)).module()(x)
    elif kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = folded(x)
        for one, two in zip(found, expected, strict=True):
            assert (one.double() - two).abs().max() <= 0.05 * two.abs().max()
        return
    else:
        found = folded(x)
    assert_close(found, expected)


def test_gradients_reach_the_input(encoder):
    block = block_of(encoder, "5x5 skip")
    x = image_for(block, (1, 6, 5)).double().requires_grad_()
    mine = FoldedMobileBlock(block).double()(x)[0].sum()
    theirs = _mobile_block(block.double(), x)[0].sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (mine, theirs)))


@compiled
@torch.no_grad()
@pytest.mark.parametrize("size", [(0, 8, 8), (2, 0, 8), (2, 8, 0)], ids=str)
@pytest.mark.parametrize("name", ["3x3 skip", "5x5 stride 2"])
def test_empty_maps(encoder, name, size):
    block = FoldedMobileBlock(block_of(encoder, name))
    batch, height, width = size
    channels = block.expand.channels[0]
    y, _ = block(torch.empty(batch, channels, height, width, memory_format=CHANNELS_LAST))
    assert y.shape[0] == batch and y.shape[2:] == (-(-height // block.stride), -(-width // block.stride))


@compiled
def test_the_operator_checks_what_it_gets():
    def call(**changed):
        given = {
            "x": torch.randn(1, 4, 5, 5).contiguous(memory_format=CHANNELS_LAST),
            "expand": [torch.randn(1, 4, 16), torch.randn(8)],
            "taps": torch.randn(9, 8),
            "taps_bias": torch.randn(8),
            "stride": 1,
            "squeeze": [torch.randn(2, 8), torch.randn(2), torch.randn(2, 8), torch.randn(8)],
            "project_matrix": torch.randn(1, 8, 16),
            "project_bias": torch.randn(4),
            "skip": True,
            **changed,
        }
        return torch.ops.bti_fast_cpu.mobile_block(*given.values())

    assert [tuple(m.shape) for m in call()] == [(1, 4, 5, 5), (1, 8, 5, 5)]
    small = torch.randn(2)
    for message, changed in [
        ("x must be", {"x": torch.randn(1, 4, 5, 6)}),
        ("x must be float32", {"x": torch.randn(1, 4, 1, 1).double()}),
        ("expand must be 2", {"expand": [small]}),
        (r"expand\[0\] must be", {"expand": [torch.randn(1, 5, 16), torch.randn(8)]}),
        (r"expand\[1\] must be", {"expand": [torch.randn(1, 4, 16), small]}),
        ("must have 8 channels", {"expand": []}),
        ("taps must be", {"taps": torch.randn(8, 8)}),
        ("taps_bias must be", {"taps_bias": small}),
        ("stride must be 1 or 2", {"stride": 3}),
        ("with a skip stride must be 1", {"stride": 2}),
        ("with a skip", {"project_bias": torch.randn(5)}),
        ("squeeze must be 4", {"squeeze": [small]}),
        (r"squeeze\[0\] must be", {"squeeze": [torch.randn(2, 7), small, torch.randn(2, 8), torch.randn(8)]}),
        (
            r"squeeze\[1\] must be",
            {"squeeze": [torch.randn(2, 8), small[:1], torch.randn(2, 8), torch.randn(8)]},
        ),
        (r"squeeze\[2\] must be", {"squeeze": [torch.randn(2, 8), small, torch.randn(3, 8), torch.randn(8)]}),
        (r"squeeze\[3\] must be", {"squeeze": [torch.randn(2, 8), small, torch.randn(2, 8), small]}),
        ("project_matrix must be", {"project_matrix": torch.randn(1, 7, 16)}),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
