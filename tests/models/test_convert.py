import copy
import json
import zipfile
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from bti_fast.errors import UserError
from bti_fast.models import BTINet
from bti_fast.models.convert import _Converter, convert, convert_file
from bti_fast.models.keras_file import KerasFile

LIMIT = 1e-4


def tampered(file: KerasFile, change: Callable[[KerasFile], None]) -> KerasFile:
    """The file as read, with its graph and its table of arrays changed by hand."""
    other = copy.copy(file)
    other.layers = copy.deepcopy(file.layers)
    other._arrays = dict(file._arrays)
    other._groups = dict(file._groups)
    change(other)
    other._unread = set(other._arrays)
    return other


def with_config(file: KerasFile, layer: str, **config) -> None:
    file.layers[layer] = file.layers[layer]._replace(config={**file.layers[layer].config, **config})


def with_inputs(file: KerasFile, layer: str, *inputs: str) -> None:
    file.layers[layer] = file.layers[layer]._replace(inputs=inputs)


@pytest.fixture(scope="module")
def converted(official_file):
    return _Converter(tampered(official_file, lambda f: None), False).model()


@pytest.fixture(scope="module")
def expected(shared_dir):
    return np.load(shared_dir / "golden" / "full" / "expected.npz")


def error(found: torch.Tensor, truth: np.ndarray) -> float:
    truth = torch.from_numpy(truth)
    assert found.shape == truth.shape
    value = ((found - truth).abs().max() / truth.abs().max()).item()
    return value if value == value else float("inf")


def moments(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x.mean((2, 3)), x.std((2, 3), correction=0)), 1)


def watch(model: BTINet) -> tuple[dict[str, torch.Tensor], list]:
    """Records, during a forward pass, what the recorded numbers call by these names."""
    seen: dict[str, torch.Tensor] = {}
    names = ("s1", "s2", "s3", "s4", "bridge")

    def keep(name: str, value: torch.Tensor) -> None:
        seen[f"stat.{name}"] = moments(value)

    handles = [
        model.encoder.register_forward_hook(
            lambda _m, _a, maps: [keep(f"enc.{n}", v) for n, v in zip(names, maps, strict=True)] and None
        )
    ]
    for name, block in zip(names, model.residual, strict=True):
        handles.append(block.register_forward_hook(lambda _m, _a, out, n=name: keep(f"enc_res.{n}", out)))
    for i, (level, exchange) in enumerate(zip(model.levels, model.interactions, strict=True), start=1):
        handles.append(level.gate.register_forward_hook(lambda _m, _a, out, i=i: keep(f"att.d{i}", out)))

        def record(_m, args, out, i=i):
            keep(f"dec.d{i}", args[0])
            keep(f"d{i}_final", out.seg)
            seen.update({f"clf_tok.d{i}": args[1], f"clf_d{i}": out.cls, f"d{i}_final": out.seg})

        handles.append(exchange.register_forward_hook(record))
    return seen, handles


@pytest.mark.parametrize("images", ["x255", "x01"])
def test_whole_network_matches_the_published_code(converted, expected, images):
    model = copy.deepcopy(converted)
    if images == "x01":  # the published loaders divide by 255 a second time
        model.image_mean.mul_(255)
        model.image_std.mul_(255)
    seen, _ = watch(model)
    with torch.no_grad():
        out = model(torch.from_numpy(expected["x255"]).float() / 255)
    seen["seg"], seen["clf"] = out.seg_logits.sigmoid(), out.cls_logits.softmax(1)
    seen |= {f"gate.d{i}": gates for i, gates in enumerate(out.gates, start=1)}
    recorded = {
        k.removeprefix(f"{images}."): expected[k] for k in expected.files if k.startswith(f"{images}.")
    }
    recorded.pop("stat.enc.stem", None)  # not one of the five maps
    errors = {name: error(seen[name], truth) for name, truth in recorded.items()}
    assert len(errors) >= 14
    assert {n: e for n, e in errors.items() if e > LIMIT} == {}


def test_images_divided_twice_is_an_option_folded_into_the_normalisation(official_file, converted):
    twice = _Converter(tampered(official_file, lambda f: None), True).model()
    torch.testing.assert_close(converted.image_mean, torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(converted.image_std, torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close(twice.image_mean, 255 * converted.image_mean)
    torch.testing.assert_close(twice.image_std, 255 * converted.image_std)


def test_the_graph_without_pretrained_weights_has_no_last_rescaling(official_file):
    def change(file):
        del file.layers["rescaling_1"]
        with_inputs(file, "stem_conv_pad", "normalization")
        with_config(file, "normalization", mean=[0.0, 0.0, 0.0], variance=[1.0, 1.0, 1.0])

    model = _Converter(tampered(official_file, change), False).model()
    torch.testing.assert_close(model.image_mean, torch.zeros(3))
    torch.testing.assert_close(model.image_std, torch.ones(3))  # 0..1 images go in as they are


def test_any_number_of_classes_comes_out_of_the_file(official_file):
    def change(file):
        with_config(file, "classification_output", units=7)
        with_config(file, "segmentation_output", filters=2, activation="softmax")
        cls, seg = file._groups["classification_output"], file._groups["segmentation_output"]
        file._arrays[f"{cls}/vars/0"] = np.arange(256 * 7, dtype=np.float32).reshape(256, 7)
        file._arrays[f"{cls}/vars/1"] = np.arange(7, dtype=np.float32)
        file._arrays[f"{seg}/vars/0"] = np.arange(32, dtype=np.float32).reshape(1, 1, 16, 2)
        file._arrays[f"{seg}/vars/1"] = np.arange(2, dtype=np.float32)

    model = _Converter(tampered(official_file, change), False).model()
    assert model.config["cls_classes"] == 7 and model.config["seg_classes"] == 2
    torch.testing.assert_close(model.cls_out.weight, torch.arange(256.0 * 7).reshape(256, 7).T)
    torch.testing.assert_close(model.seg_out.weight[:, :, 0, 0], torch.arange(32.0).reshape(16, 2).T)


def test_groups_are_found_by_keras_rule_where_the_file_states_no_names(official_file):
    assert official_file._group_names() == official_file._groups


REFUSED = {
    "a class of its own": (
        lambda f: f.layers.update(upa_d4=f.layers["upa_d4"]._replace(kind="GatedSomething")),
        "layer upa_d4: found a GatedSomething, needed a UncertaintyProxyAttention",
    ),
    "a layer more": (
        lambda f: f.layers.update(extra=f.layers["dropout"]._replace(name="extra", kind="GaussianNoise")),
        "layer extra: a GaussianNoise that the published network does not have",
    ),
    "another order": (
        lambda f: with_inputs(f, "att_gate_d2", "bti_res_s3", "upa_d1"),
        "layer att_gate_d2: reads bti_res_s3, upa_d1, needed bti_res_s3, conv2d_transpose_1",
    ),
    "another tap": (
        lambda f: with_inputs(f, "bti_res_s2", "block3b_expand_activation"),
        "layer bti_res_s2: reads block3b_expand_activation, needed block3a_expand_activation",
    ),
    "another epsilon": (
        lambda f: with_config(f, "block4a_bn", epsilon=1e-5),
        "layer block4a_bn: epsilon is 1e-05, needed 0.001",
    ),
    "another activation": (
        lambda f: with_config(f, "clf_d2_features", activation="gelu"),
        "layer clf_d2_features: activation is 'gelu', needed 'relu'",
    ),
    "an encoder layer missing": (
        lambda f: f.layers.pop("block5c_bn"),
        "layer block5c_bn: missing, needed a BatchNormalization",
    ),
    "another encoder": (
        lambda f: with_config(f, "top_conv", filters=1280),
        "layer top_conv: an encoder of 32 blocks and 1280 top channels",
    ),
    "something new before the stem": (
        lambda f: f.layers.update(rescaling_1=f.layers["rescaling_1"]._replace(kind="RandomContrast")),
        "layer rescaling_1: a RandomContrast before the stem is not known",
    ),
    "weights missing": (
        lambda f: f._arrays.pop("residual_block/conv1/vars/1"),
        "layer bti_res_bridge/conv1: found 2 arrays, needed 3",
    ),
    "weights of another shape": (
        lambda f: f._arrays.update({"residual_block/bn1/vars/0": np.zeros(5, np.float32)}),
        r"layer bti_res_bridge/bn1, gamma: found shape \(5,\)",
    ),
    "weights more": (
        lambda f: f._arrays.update({"residual_block/adapter/vars/0": np.zeros(5, np.float32)}),
        "layer bti_res_bridge: holds weights that the published network does not have",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_know_is_refused_by_layer(official_file, monkeypatch, case):
    # Building 57 million random weights for every case would only cost time.
    monkeypatch.setattr("bti_fast.models.convert.BTINet", _prebuilt)
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        _Converter(tampered(official_file, change), False).model()


@cache
def _network() -> BTINet:
    return BTINet()


def _prebuilt(*args, **kwargs) -> BTINet:
    """Stands in for the constructor: one network for all refusals, none of which returns it."""
    return _network()


def test_a_converted_file_loads_and_says_where_it_comes_from(
    official_path, official_file, converted, monkeypatch, tmp_path
):
    monkeypatch.setattr(  # already read
        "bti_fast.models.convert.KerasFile", lambda path: tampered(official_file, lambda f: None)
    )
    convert_file(official_path, tmp_path / "model.safetensors")
    model = BTINet.load(tmp_path / "model.safetensors")
    assert model.metadata["source"] == "official.keras"
    for (name, found), truth in zip(model.state_dict().items(), converted.state_dict().values(), strict=True):
        assert torch.equal(found, truth), name


def test_files_that_are_no_keras_model_are_refused_by_name(tmp_path, official_path):
    with pytest.raises(UserError, match="absent.keras: no such file"):
        convert(tmp_path / "absent.keras")
    text = tmp_path / "text.keras"
    text.write_text("hello")
    with pytest.raises(UserError, match="text.keras: damaged, truncated, or not a .keras file"):
        convert(text)
    short = tmp_path / "short.keras"
    short.write_bytes(official_path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="short.keras: damaged, truncated"):
        convert(short)
    empty = tmp_path / "empty.keras"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("metadata.json", "{}")
    with pytest.raises(UserError, match="empty.keras: not a .keras file"):
        convert(empty)
    other = tmp_path / "other.keras"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {}}))
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(UserError, match="other.keras: found a 'Sequential' model"):
        convert(other)
    hollow = tmp_path / "hollow.keras"
    graph = {"layers": [], "output_layers": [["a", 0, 0]], "name": "x"}
    with zipfile.ZipFile(hollow, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": graph}))
        archive.writestr("model.weights.h5", b"not hdf5")
    with pytest.raises(UserError, match="hollow.keras: its model.weights.h5 is damaged"):
        convert(hollow)
