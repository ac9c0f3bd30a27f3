import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from bti_fast.errors import UserError
from bti_fast.models.encoders import (
    EFFICIENTNETS,
    EfficientNetEncoder,
    SamePaddingConv,
    feature_channels,
    load_encoder_weights,
)
from tests.nn.golden import Golden, relative_error

monai = pytest.importorskip("monai.networks.nets")


@pytest.fixture(scope="module")
def b0():
    torch.manual_seed(0)
    return EfficientNetEncoder("efficientnet-b0").eval()


def monai_copy(encoder: EfficientNetEncoder, name: str) -> nn.Module:
    """MONAI's own network with the encoder's weights."""
    net = monai.EfficientNetBN(name, pretrained=False).eval()
    missing, unexpected = net.load_state_dict(encoder.net.state_dict(), strict=False)
    assert set(missing) == {"_fc.weight", "_fc.bias"} and not unexpected
    return net


def monai_taps(net: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """The tapped activations of MONAI's own modules: its swish works in place on the BatchNorm's output."""
    taps = []
    for stage in (1, 2, 3, 5):
        net._blocks[stage][0]._bn0.register_forward_hook(lambda _m, _a, out: taps.append(out))
    net._bn1.register_forward_hook(lambda _m, _a, out: taps.append(out))
    net(image)
    return [*taps[:4], F.silu(taps[4])]


@pytest.mark.parametrize(("name", "size"), [("efficientnet-b0", 224), ("efficientnet-b1", 240)])
def test_maps_equal_monai_at_its_native_size(name, size):
    """At 240 the fifth halving starts from an odd 15: the paddings there differ from those of even sizes."""
    torch.manual_seed(0)
    encoder = EfficientNetEncoder(name).eval()
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        for found, truth in zip(encoder(image), monai_taps(monai_copy(encoder, name), image), strict=True):
            assert relative_error(found, truth) <= 1e-5


def test_strided_padding_matches_the_published_framework(shared_dir):
    golden = Golden(shared_dir / "golden" / "prim_conv2d_k3s2_same_8x6.npz")
    conv = SamePaddingConv(3, 5, 3, stride=2)
    golden.fill({"l": conv})
    x = golden.leaf("in0")
    out = conv(x)
    (out * golden.tensor("cot")).sum().backward()
    assert relative_error(out, golden.tensor("out")) <= 1e-5
    assert relative_error(x.grad, golden.tensor("grad_in0")) <= 1e-5


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (8, 9), (9, 11)])
def test_strided_padding_follows_the_input(kernel, height, width):
    """The middle of window (i, j) lies, by hand, at row 2i + start: 0 for an odd size, 1 for an even."""
    conv = SamePaddingConv(1, 1, kernel, stride=2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, kernel // 2, kernel // 2] = 1  # picks the middle of each window
    x = torch.arange(float(height * width)).reshape(1, 1, height, width)
    rows = torch.arange(1 - height % 2, height, 2)
    columns = torch.arange(1 - width % 2, width, 2)
    assert torch.equal(conv(x)[0, 0], x[0, 0][rows][:, columns])


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 64)])
def test_any_size_halves_rounding_up(b0, size):
    maps = b0(torch.randn(1, 3, *size))
    assert [m.shape[1] for m in maps] == list(b0.channels) == [96, 144, 240, 672, 1280]
    height, width = size
    for feature in maps:
        height, width = (height + 1) // 2, (width + 1) // 2
        assert feature.shape[2:] == (height, width)


@pytest.mark.parametrize("name", ["efficientnet-b2", "efficientnet-b4"])
def test_channels_of_other_variants(name):
    channels = {"efficientnet-b2": (96, 144, 288, 720, 1408), "efficientnet-b4": (144, 192, 336, 960, 1792)}
    assert EfficientNetEncoder(name, in_channels=1).channels == channels[name]


def test_stochastic_depth_drops_whole_samples_at_the_published_rate(b0):
    rates = [block.drop_connect_rate for stage in b0.net._blocks for block in stage]
    assert rates == pytest.approx([0.2 * b / 16 for b in range(16)])
    from bti_fast.models.encoders import _drop_samples

    torch.manual_seed(0)
    dropped = _drop_samples(torch.ones(4000, 2, 3, 3), 0.2)
    kept = dropped[:, 0, 0, 0] > 0
    assert torch.equal(dropped, torch.where(kept, 1.25, 0.0)[:, None, None, None].expand_as(dropped))
    assert abs(kept.float().mean().item() - 0.8) < 0.03


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="encoder: found 'resnet18', needed one of efficientnet-b0"):
        EfficientNetEncoder("resnet18")
    assert len(EFFICIENTNETS) == 8


class Pyramid(nn.Module):
    """A small encoder of somebody else's, with strides 4 to 64."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Conv2d(8 + 8 * i, 16 + 8 * i, 3, stride=2, padding=1) for i in range(count)
        )

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return maps


def test_channels_come_from_argument_attribute_or_a_dry_run():
    encoder = Pyramid().train()
    assert feature_channels(encoder, 3) == (16, 24, 32, 40, 48)
    assert encoder.training
    encoder.channels = (1, 2, 3, 4, 5)
    assert feature_channels(encoder, 3) == (1, 2, 3, 4, 5)
    assert feature_channels(encoder, 3, [5, 4, 3, 2, 1]) == (5, 4, 3, 2, 1)
    with pytest.raises(ValueError, match="encoder: found 4 maps as output, needed a tuple of 5"):
        feature_channels(Pyramid(4), 3)
    with pytest.raises(ValueError, match="found Tensor as output"):
        feature_channels(nn.Conv2d(3, 4, 1), 3)


@pytest.mark.parametrize(
    "spelling",
    ["own", "monai", "efficientnet-pytorch", "wrapped", "safetensors", "prefixed", "part of a network"],
)
def test_local_weights_fill_the_encoder(b0, tmp_path, spelling):
    state = b0.state_dict()
    path = tmp_path / "weights.pth"
    plain = {k.removeprefix("net."): v for k, v in state.items()}
    if spelling == "own":
        torch.save(state, path)
    elif spelling == "monai":
        torch.save(monai_copy(b0, "efficientnet-b0").state_dict(), path)
    elif spelling == "efficientnet-pytorch":
        flat = {}
        for key, value in plain.items():
            parts = key.split(".")
            flat[".".join([parts[0], *parts[2:]] if parts[0] == "_blocks" else parts)] = value
        assert "_blocks.15._bn2.weight" in flat
        torch.save(flat, path)
    elif spelling == "prefixed":
        torch.save({"model": {f"module.{k}": v for k, v in plain.items()}}, path)
    elif spelling == "part of a network":
        torch.save({f"encoder.{k}": v for k, v in state.items()} | {"head.weight": torch.zeros(2)}, path)
    elif spelling == "wrapped":
        torch.save({"state_dict": plain, "epoch": 3}, path)
    else:
        path = tmp_path / "weights.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    torch.manual_seed(1)
    other = EfficientNetEncoder("efficientnet-b0")
    load_encoder_weights(other, path)
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_colour_weights_serve_grey_images(b0, tmp_path):
    torch.save(b0.state_dict(), tmp_path / "w.pth")
    grey = EfficientNetEncoder("efficientnet-b0", in_channels=1).eval()
    load_encoder_weights(grey, tmp_path / "w.pth")
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        for found, truth in zip(grey(image), b0(image.expand(1, 3, 64, 64)), strict=True):
            assert relative_error(found, truth) <= 1e-5


class Bomb:
    def __reduce__(self):
        return (print, ("code in a pickle ran",))


def test_unusable_files_of_weights_are_refused_by_name(b0, tmp_path, capsys):
    with pytest.raises(UserError, match="absent.pth: no such file"):
        load_encoder_weights(b0, tmp_path / "absent.pth")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="bomb.pth: not a readable file of tensors"):
        load_encoder_weights(b0, tmp_path / "bomb.pth")
    assert "code in a pickle ran" not in capsys.readouterr().out
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="short.safetensors: not a readable"):
        load_encoder_weights(b0, tmp_path / "short.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth: found no state dict"):
        load_encoder_weights(b0, tmp_path / "list.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    missing = (
        r"other.pth: net._conv_stem.weight is missing \(found 1 tensors such as a\); needs .* efficientnet-b0"
    )
    with pytest.raises(UserError, match=missing):
        load_encoder_weights(b0, tmp_path / "other.pth")
    for value, found in ((float("nan"), "NaN or infinity"), (0, "torch.int64")):
        state = b0.state_dict() | {"net._bn1.running_var": torch.full((1280,), value)}
        torch.save(state, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=f"odd.pth: net._bn1.running_var holds {found}"):
            load_encoder_weights(b0, tmp_path / "odd.pth")
    state = b0.state_dict() | {"net._bn1.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "shape.pth")
    with pytest.raises(UserError, match=r"shape.pth: net._bn1.weight has shape \(3,\), needed \(1280,\)"):
        load_encoder_weights(b0, tmp_path / "shape.pth")
