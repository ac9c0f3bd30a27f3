"""1x1 convolutions with packed weights against the convolution in float64."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.nn import packed
from bti_fast.nn.packed import POSITIONS, PackedConv1x1, pack_

SIZES = [  # (C, K), (B, H, W)
    ((129, 130), (1, 7, 7)),
    ((272, 96), (1, 4, 8)),
    ((96, 272), (8, 8, 8)),
    ((1, 2**14), (3, 5, 7)),
    ((2**14, 1), (2, 4, 4)),
    ((160, 113), (2, 1, 31)),
]


def made(channels: tuple[int, int], *, bias: bool = True) -> PackedConv1x1:
    torch.manual_seed(0)
    inputs, outputs = channels
    return PackedConv1x1(torch.randn(outputs, inputs, 1, 1), torch.randn(outputs) if bias else None)


def maps(conv: PackedConv1x1, size: tuple[int, int, int]) -> Tensor:
    batch, *spatial = size
    return torch.randn(batch, conv.in_channels, *spatial).contiguous(memory_format=torch.channels_last)


def assert_right(conv: PackedConv1x1, x: Tensor, out: Tensor) -> None:
    truth = F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double())
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5 * conv.in_channels**0.5)


@pytest.fixture
def packings(monkeypatch) -> list:
    """The shapes that weights are packed for from now on."""
    shapes, pack = [], packed._pack

    def record(weight, shape):
        shapes.append(tuple(shape))
        return pack(weight, shape)

    monkeypatch.setattr(packed, "_pack", record)
    return shapes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("channels", "size"), SIZES, ids=str)
def test_outputs(channels, size, bias, mode, packings):
    conv = made(channels, bias=bias)
    with mode():
        for _ in range(4):
            x = maps(conv, size)
            out = conv(x)
            assert_right(conv, x, out)
            assert out.stride() == F.conv2d(x, conv.weight).stride() or conv.in_channels == 1
    assert packings == [tuple(x.shape)]


def test_without_gradients_to_give_no_mode_is_needed(packings):
    conv = made((128, 130))
    for _ in range(3):
        assert_right(conv, x := maps(conv, (1, 7, 7)), conv(x))
    assert len(packings) == 1


@torch.no_grad()
def test_a_size_is_packed_for_when_it_comes_again(packings):
    conv = made((128, 130))
    one, two = maps(conv, (1, 7, 7)), maps(conv, (1, 14, 14))
    for x in (one, two, one, two):
        assert_right(conv, x, conv(x))
    assert not packings
    for x in (one, one, one, two, one, two, two):
        assert_right(conv, x, conv(x))
    assert packings == [tuple(one.shape), tuple(two.shape)]


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.weight.mul_(2),
        lambda conv: setattr(conv.weight, "data", conv.weight.data * 2),
        lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight * 2, requires_grad=False)),
        lambda conv: conv.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias}),
        lambda conv: conv.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias}, assign=True),
        lambda conv: conv.bias.mul_(2),
        lambda conv: conv.double().float().weight.add_(1),
    ],
    ids=["in_place", "data", "parameter", "loaded", "assigned", "bias", "moved"],
)
def test_a_changed_weight_counts(change):
    conv = made((128, 130))
    x = maps(conv, (1, 7, 7))
    before = [conv(x) for _ in range(3)][-1]
    change(conv)
    for _ in range(3):
        out = conv(x)
        assert_right(conv, x, out)
        assert not torch.equal(out, before)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))])
def test_copies(copied):
    conv = made((128, 130))
    x = maps(conv, (1, 7, 7))
    conv(x), conv(x)
    other = copied(conv)
    other.weight.neg_(), other.bias.neg_()
    for _ in range(3):
        assert_right(conv, x, conv(x))
        assert_right(other, x, other(x))


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("float64", lambda x: x.double()),
        ("nchw", lambda x: x.contiguous()),
        ("strided", lambda x: torch.cat((x, x), 3)[..., ::2]),
        ("many", lambda x: x.repeat(8, 1, 2, 1).contiguous(memory_format=torch.channels_last)),
        ("few", lambda x: x[..., :4].contiguous(memory_format=torch.channels_last)),
        ("pooled", lambda x: x.mean((2, 3), keepdim=True).repeat(64, 1, 1, 1)),
        ("none", lambda x: x[:0]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_other_maps_are_convolved_as_ever(kind, convert, packings):
    conv = made((128, 130))
    x = convert(maps(conv, (1, 7, 7)))
    if kind == "float64":
        conv.double()
    assert (x.shape[0] * x.shape[2] * x.shape[3] in POSITIONS) == (kind not in ("many", "few", "none"))
    for _ in range(3):
        assert_right(conv, x, conv(x))
    assert not packings


@torch.no_grad()
def test_a_single_image_without_batch_and_wrong_channels():
    conv = made((128, 130))
    x = maps(conv, (1, 7, 7))
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="128 channels"):
            conv(torch.randn(1, 127, 9, 9).contiguous(memory_format=torch.channels_last))


def test_gradients_of_the_input(packings):
    conv = made((128, 130))
    x = maps(conv, (1, 7, 7))
    with torch.no_grad():
        conv(x), conv(x)
    x.requires_grad_()
    conv(x).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    F.conv2d(exact, conv.weight.double(), conv.bias.double()).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)
    assert len(packings) == 1


def test_modes_and_transforms(packings):
    conv = made((128, 130))
    x = maps(conv, (1, 7, 7))
    with torch.no_grad():
        expected = [conv(x) for _ in range(3)][-1]
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.vmap(conv)(x[None].expand(2, -1, -1, -1, -1))[1], expected, rtol=1e-4, atol=1e-4
        )
        exported = torch.export.export(conv, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(conv, (x,), (x,))
    torch.testing.assert_close(tangent, expected - conv.bias[:, None, None], rtol=1e-4, atol=1e-4)
    assert len(packings) == 1


def test_threads_share_a_convolution():
    conv = made((128, 130))
    inputs = [maps(conv, size) for size in [(1, 7, 7), (1, 8, 8), (2, 7, 7)] for _ in range(20)]

    def call(x):
        with torch.inference_mode():
            return conv(x)

    with ThreadPoolExecutor(4) as pool:
        for x, out in zip(inputs, pool.map(call, inputs), strict=True):
            assert_right(conv, x, out)


def test_pack():
    shared = nn.Conv2d(4, 4, 1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Sequential(shared, nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, groups=2)),
        nn.Conv2d(4, 4, 1, padding=1),
        shared,
        nn.Conv2d(4, 5, 1, padding="same", bias=False),
    ).eval()
    x = torch.randn(2, 3, 9, 8)
    expected = copy.deepcopy(net).double()(x.double())
    before = net.state_dict()
    pack_(net)
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-5, atol=1e-5)
    kinds = [type(part) is PackedConv1x1 for part in net.modules() if isinstance(part, nn.Conv2d)]
    assert kinds == [True, False, True, False, False, False, True]  # each once, as modules() does
    assert net[2][0] is net[4]
    assert net.state_dict().keys() == before.keys()
