import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bti_fast.errors import UserError
from bti_fast.models import BTINet
from bti_fast.models.btinet import INTERACTIONS, WITHOUT_EXCHANGE
from tests.nn.golden import relative_error

from .test_encoders import Bomb, Pyramid

pytest.importorskip("monai.networks.nets")


@pytest.fixture(scope="module")
def networks():
    """One small network of each interaction, for 1-channel images."""
    torch.manual_seed(0)
    return {kind: BTINet("efficientnet-b0", interaction=kind, in_channels=1).eval() for kind in INTERACTIONS}


def test_the_published_network_has_the_published_size():
    model = BTINet("efficientnet-b4")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 57_413_304
    statistics = sum(
        m.running_mean.numel() + m.running_var.numel()
        for m in model.modules()
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
    )
    normalisation = model.image_mean.numel() + model.image_std.numel() + 1  # Keras counts its sample counter
    assert trainable + statistics + normalisation == 57_557_647


def test_encoder_sharing_lacks_the_class_decoder_alone(networks):
    count = {kind: sum(p.numel() for p in networks[kind].parameters()) for kind in WITHOUT_EXCHANGE}
    *_, s2, s3, s4, bridge = networks["none"].encoder_channels
    class_decoder = (s2 + s3 + s4 + bridge + 4) * 256 + 4 * 256 * 256  # and what its features tell the head
    assert count["none"] - count["encoder-sharing"] == class_decoder


@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
@pytest.mark.parametrize("kind", INTERACTIONS)
def test_masks_come_back_at_the_input_size(networks, kind, size):
    model = networks[kind]
    with torch.no_grad():
        out = model(torch.rand(2, 1, *size))
    assert out.seg_logits.shape == (2, 1, *size) and out.cls_logits.shape == (2, 3)
    heights = [(size[0] + 2**k - 1) // 2**k for k in (4, 3, 2, 1)]
    widths = [(size[1] + 2**k - 1) // 2**k for k in (4, 3, 2, 1)]
    assert [g.shape for g in out.gates] == ([] if kind in WITHOUT_EXCHANGE else [(2, 2)] * 4)
    if kind == "fixed":
        assert all(torch.equal(g, torch.ones(2, 2)) for g in out.gates)
    maps = [(2, h, w) for h, w in zip(heights, widths, strict=True)]
    signals = {"entropy": maps, "proxy": [(2, 3)] * 4, "attention": [(2, 3)] * 4}
    assert [u.shape for u in out.uncertainty] == signals.get(kind, [])
    entropy = kind == "entropy"
    assert [a.shape for a in out.aux_seg_logits] == ([(2, 1, *m[1:]) for m in maps] if entropy else [])
    assert [a.shape for a in out.aux_cls_logits] == ([(2, 3)] * 4 if entropy else [])


@pytest.mark.parametrize("kind", INTERACTIONS)
def test_a_training_step_reaches_every_parameter(networks, kind):
    model = copy.deepcopy(networks[kind]).train()
    for exchange in model.interactions:  # attention starts closed
        if getattr(exchange, "attention", None) is not None:
            nn.init.constant_(exchange.attention.seg_gate, 0.5)
            nn.init.constant_(exchange.attention.cls_gate, 0.5)
    torch.manual_seed(0)
    out = model(torch.rand(3, 1, 64, 64))
    loss = out.seg_logits.square().mean() + out.cls_logits.square().mean()
    for logits in (*out.aux_seg_logits, *out.aux_cls_logits):
        loss = loss + logits.square().mean()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gates_alone_are_trained_in_the_second_stage(networks):
    counts = {kind: len(list(model.gate_parameters())) for kind, model in networks.items()}
    without = dict.fromkeys((*WITHOUT_EXCHANGE, "fixed"), 0)
    assert counts == {**without, "proxy": 24, "attention": 24, "entropy": 12}
    for kind in ("proxy", "entropy"):
        model = copy.deepcopy(networks[kind])
        model.requires_grad_(False)
        gates = list(model.gate_parameters())
        for parameter in gates:
            parameter.requires_grad_(True)
        out = model(torch.rand(2, 1, 128, 128))
        torch.stack(out.gates).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in gates), kind


def test_compiles_whole_without_a_graph_break(networks):
    """Captured with autograd on; the modules' own tests compare compiled gradients."""
    model, image = networks["proxy"], torch.rand(2, 1, 64, 64)
    truth = model(image)
    found = torch.compile(model, fullgraph=True, backend="eager")(image)
    torch.testing.assert_close(found.seg_logits, truth.seg_logits)
    torch.testing.assert_close(found.cls_logits, truth.cls_logits)
    assert len(found.gates) == len(truth.gates) == 4


def test_memory_format_changes_nothing(networks):
    """The network works in channels_last by itself; weights in the other format serve as well."""
    model, image = networks["proxy"], torch.rand(2, 1, 96, 64)
    seen = []
    with torch.no_grad():
        handle = model.levels[3].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
        truth = model(image)
        handle.remove()
        contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        found = contiguous(image.to(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found.seg_logits, truth.seg_logits) <= 1e-4
    assert relative_error(found.cls_logits, truth.cls_logits) <= 1e-4


@pytest.mark.parametrize("kind", INTERACTIONS)
def test_autocast_stays_near_full_precision(kind):
    torch.manual_seed(0)
    model = BTINet(Pyramid(), interaction=kind).eval()
    image = torch.rand(2, 3, 64, 64)
    truth = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(image)
        loss = out.seg_logits.float().square().mean() + out.cls_logits.float().square().mean()
    loss.backward()
    assert relative_error(out.seg_logits.float(), truth.seg_logits) <= 0.05
    assert relative_error(out.cls_logits.float(), truth.cls_logits) <= 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_any_module_with_five_maps_is_an_encoder(tmp_path):
    torch.manual_seed(0)
    model = BTINet(Pyramid(), interaction="entropy", cls_classes=4, seg_classes=2).eval()
    image = torch.rand(2, 3, 97, 130)
    truth = model(image)
    assert truth.seg_logits.shape == (2, 2, 97, 130) and truth.cls_logits.shape == (2, 4)
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="m.safetensors: was saved with an encoder of its own"):
        BTINet.load(tmp_path / "m.safetensors")
    found = BTINet.load(tmp_path / "m.safetensors", encoder=Pyramid())(image)
    assert torch.equal(found.seg_logits, truth.seg_logits)


def test_images_are_normalised_inside_and_the_numbers_travel(tmp_path):
    torch.manual_seed(0)
    model = BTINet(
        Pyramid(), interaction="none", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    ).eval()
    seen = []
    model.encoder.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(torch.full((1, 3, 64, 64), 0.4))
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([0.3 / 0.5, 0.2 / 0.6, 0.1 / 0.7]))
    model.save(tmp_path / "m.safetensors")
    other = BTINet.load(tmp_path / "m.safetensors", encoder=Pyramid())
    assert torch.equal(other.image_mean, model.image_mean) and torch.equal(other.image_std, model.image_std)


def test_activation_checkpointing_changes_nothing_but_what_is_kept(networks):
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    found = {}
    for wanted in (False, True):
        model = copy.deepcopy(networks["attention"]).train()
        model.activation_checkpointing = wanted
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(5)  # dropout and stochastic depth
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(images)
            loss = out.seg_logits.square().mean() + out.cls_logits.square().mean()
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        loss.backward()
        state = {**model.state_dict(), **{f"{n} gradient": p.grad for n, p in model.named_parameters()}}
        found[wanted] = state, sum(kept.values())
    plain, less = found[False], found[True]
    for name, value in plain[0].items():
        torch.testing.assert_close(less[0][name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert less[1] < 0.5 * plain[1]


@pytest.mark.parametrize("kind", INTERACTIONS)
def test_a_saved_network_is_the_same_network(networks, tmp_path, kind):
    model = copy.deepcopy(networks[kind])
    model.classes = ("normal", "benign", "malignant")
    path = tmp_path / "m.safetensors"
    model.save(path, metadata={"size": [96, 96], "threshold": 0.4})
    other = BTINet.load(path, cls_classes=3)
    assert other.config == model.config and other.classes == model.classes and not other.training
    assert other.metadata == {"size": [96, 96], "threshold": 0.4}
    image = torch.rand(1, 1, 64, 96)
    for found, truth in zip(other(image)[:2], model(image)[:2], strict=True):
        assert torch.equal(found, truth)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # nothing half written stays


def test_the_configuration_rebuilds_the_network(networks):
    rebuilt = BTINet(**networks["entropy"].config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in networks["entropy"].state_dict().items()
    }


def test_unusable_checkpoints_are_refused_by_name(tmp_path, capsys):
    model, path = BTINet(Pyramid(), interaction="none"), tmp_path / "m.safetensors"
    model.save(path)
    whole = path.read_bytes()
    cases = {
        "absent.safetensors": (None, "no such file"),
        "short.safetensors": (whole[: len(whole) // 2], "damaged, truncated"),
        "stub.safetensors": (whole[:7], "damaged, truncated"),
        "pickle.safetensors": (pickle.dumps(Bomb()), "damaged, truncated, or not a safetensors file"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: {message}"):
            BTINet.load(tmp_path / name, encoder=Pyramid())
    assert "code in a pickle ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="m.safetensors: cls_classes is 3, needed 5"):
        BTINet.load(path, encoder=Pyramid(), cls_classes=5)

    with safe_open(path, "pt") as file:
        header, state = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    config = json.loads(header["config"])
    edits = {
        "format.safetensors": ({"format": "other"}, state, "not a BTINet checkpoint"),
        "json.safetensors": ({"config": "{"}, state, "its configuration cannot be read"),
        "option.safetensors": (
            {"config": json.dumps(config | {"depth": 3})},
            state,
            "its configuration does not describe a BTINet",
        ),
        "shape.safetensors": (
            {"config": json.dumps(config | {"cls_classes": 4})},
            state,
            r"of another configuration: cls_out.weight has shape \(3, 256\), needed \(4, 256\)",
        ),
        "less.safetensors": (
            {},
            {k: v for k, v in state.items() if k != "seg_out.bias"},
            "of another configuration: seg_out.bias is missing",
        ),
        "more.safetensors": (
            {},
            state | {"extra": torch.zeros(1)},
            "of another configuration: extra is not part of this network",
        ),
    }
    for name, (changes, tensors, message) in edits.items():
        save_file(tensors, tmp_path / name, metadata=header | changes)
        with pytest.raises(UserError, match=f"{name}: {message}"):
            BTINet.load(tmp_path / name, encoder=Pyramid())


def test_an_unwritable_place_is_refused_and_the_old_file_stays(networks, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        networks["none"].save(tmp_path / "absent" / "m.safetensors")
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        networks["none"].save(path, metadata={"a": object()})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": "gated"}, "interaction: found 'gated', needed one of encoder-sharing, none"),
        ({"cls_classes": 0}, "cls_classes: found 0"),
        ({"seg_classes": True}, "seg_classes: found True"),
        ({"in_channels": 2.0}, "in_channels: found 2.0"),
        ({"dropout": 1.0}, "dropout: found 1.0"),
        ({"classes": ("a", "b")}, "classes: found 2 names, needed 3"),
        ({"image_mean": [0.5]}, "image_mean: found 1 values, needed 3"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std: found"),
        ({"encoder": "efficientnet-b9"}, "encoder: found 'efficientnet-b9'"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        BTINet(**{"encoder": "efficientnet-b0", **options})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            torch.zeros(1, 3, 64, 64),
            ValueError,
            r"image: found shape \(1, 3, 64, 64\), needed \(B, 1, H, W\)",
        ),
        (torch.zeros(1, 64, 64), ValueError, "image: found shape"),
        (torch.zeros(1, 1, 64, 64, 64), ValueError, "image: found shape"),
        (torch.zeros(1, 1, 64, 31), ValueError, "image: found 64x31 pixels, needed at least 32x32"),
        (torch.zeros(1, 1, 64, 64, dtype=torch.uint8), TypeError, "image: found torch.uint8"),
        ([[0.0]], TypeError, "image: found list"),
    ],
)
def test_wrong_images_are_refused_by_name(networks, image, error, message):
    with pytest.raises(error, match=message):
        networks["none"](image)


@pytest.mark.parametrize("size", [(2, 3, 72, 96), (1, 3, 32, 45)])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_folded_network_gives_the_same_outputs(interaction, size):
    torch.manual_seed(0)
    model = BTINet("efficientnet-b0", interaction=interaction).eval()
    for part in model.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            part.weight.data.normal_(1, 0.3)
    folded = model.fold()
    image = torch.rand(*size)
    with torch.no_grad():
        expected, got = copy.deepcopy(model).double()(image.double()), folded(image)
    for name in ("seg_logits", "cls_logits"):
        truth = getattr(expected, name)
        assert (getattr(got, name) - truth).abs().max() <= 1e-5 * truth.abs().max()
    for truth, gate in zip(expected.gates, got.gates, strict=True):
        torch.testing.assert_close(gate.double(), truth.double(), rtol=1e-5, atol=1e-5)


def test_a_folded_network_is_for_inference_only(tmp_path):
    folded = BTINet("efficientnet-b0").fold()
    with pytest.raises(RuntimeError, match="folded for inference; train"):
        folded.train()
    with pytest.raises(RuntimeError, match="folded for inference; save"):
        folded.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
