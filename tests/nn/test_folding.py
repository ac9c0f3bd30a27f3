"""Folded blocks against the blocks they were folded from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bti_fast.nn.blocks import MultiScaleContextFusion, ResidualBlock
from bti_fast.nn.folding import FoldedContextFusion, fold


def unsettle(module: nn.Module) -> nn.Module:
    """Statistics and scales as training leaves them, negative and zero scales among them."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.1, 3)
            part.weight.data.normal_()
            part.bias.data.normal_()
            part.weight.data[0] = 0
    return module.eval()


@pytest.mark.parametrize(
    "size",
    [(1, 1), (3, 2), (9, 11)],
    ids=["one_position", "channels_exceed_positions", "positions_exceed_channels"],
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_context_fusion(batch, size, memory_format):
    torch.manual_seed(0)
    msf = MultiScaleContextFusion(24)
    x = torch.randn(batch, 24, *size).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = copy.deepcopy(msf).double()(x.double())
        torch.testing.assert_close(FoldedContextFusion(msf)(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("out_channels", [16, 24])
def test_residual_block(attention, out_channels):
    torch.manual_seed(0)
    block = unsettle(ResidualBlock(16, out_channels, attention=attention))
    before = copy.deepcopy(block.state_dict())
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        expected = copy.deepcopy(block).double()(x.double())
        folded = fold(block)
        got = folded(x.clone())
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    for name, value in block.state_dict().items():  # the block itself is untouched
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("made_in_it", [False, True])
def test_folding_in_inference_mode(made_in_it):
    with torch.inference_mode(made_in_it):
        block = unsettle(ResidualBlock(16, 24))
    x = torch.randn(2, 16, 9, 7)
    with torch.inference_mode():
        folded = fold(block)
        expected = block(x)
        assert (folded(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(value.is_inference() for value in folded.state_dict().values())
