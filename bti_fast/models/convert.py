"""Turns a BTI-Net that the published code saved (.keras) into a BTINet; needs h5py, not TensorFlow."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bti_fast.errors import UserError
from bti_fast.models import keras_layout
from bti_fast.models.btinet import BTINet, DecoderLevel
from bti_fast.models.keras_file import KerasFile, Layer
from bti_fast.nn.blocks import BN_EPS, AttentionGate, ResidualBlock
from bti_fast.nn.task_interaction import TaskInteraction, UncertaintyProxyAttention

# (inverted bottlenecks, channels of the top convolution) tell the variants apart
VARIANTS = {
    (16, 1280): "efficientnet-b0",
    (23, 1280): "efficientnet-b1",
    (23, 1408): "efficientnet-b2",
    (26, 1536): "efficientnet-b3",
    (32, 1792): "efficientnet-b4",
    (39, 2048): "efficientnet-b5",
    (45, 2304): "efficientnet-b6",
    (55, 2560): "efficientnet-b7",
}
ENCODER_LAYER = re.compile(r"(stem|top|block\d[a-z])_\w+")
BLOCK_LAYERS = {  # our layer -> (Keras' name after "block1a_", class)
    "_expand_conv": ("expand_conv", "Conv2D"),
    "_bn0": ("expand_bn", "BatchNormalization"),
    "_depthwise_conv": ("dwconv", "DepthwiseConv2D"),
    "_bn1": ("bn", "BatchNormalization"),
    "_se_reduce": ("se_reduce", "Conv2D"),
    "_se_expand": ("se_expand", "Conv2D"),
    "_project_conv": ("project_conv", "Conv2D"),
    "_bn2": ("project_bn", "BatchNormalization"),
}
# our layer -> the path of Keras' layer inside the published custom layer
SEPARABLE = "multiscale/dilation_convs/separable_conv2d"
RESIDUAL = {
    "conv1": "conv1",
    "bn1": "bn1",
    "conv2": "conv2",
    "bn2": "bn2",
    "msf.sep_d1": SEPARABLE,
    "msf.sep_d2": f"{SEPARABLE}_1",
    "msf.sep_d4": f"{SEPARABLE}_2",
    "msf.scale_fc1": "multiscale/scale_attention/layers/dense",
    "msf.scale_fc2": "multiscale/scale_attention/layers/dense_1",
    "msf.fusion": "multiscale/cross_scale_fusion",
    "att.channel_fc1": "attention/channel_path/layers/dense",
    "att.channel_fc2": "attention/channel_path/layers/dense_1",
    "att.spatial": "attention/spatial_path",
    "proj": "residual_proj",
}
GATE = {
    "x_transform": "x_transform",
    "g_transform": "g_transform",
    "ctx_sep_d1": "context_attention/layers/separable_conv2d",
    "ctx_sep_d2": "context_attention/layers/separable_conv2d_1",
    "ctx_out": "context_attention/layers/conv2d",
}
TIM = {
    "s2c_conv": "seg_to_clf/layers/conv2d",
    "s2c_fc": "seg_to_clf/layers/dense",
    "s2c_bn": "seg_to_clf/layers/batch_normalization",
    "clf_gate": "clf_gate",
    "c2s_fc": "clf_to_seg/layers/dense",
    "seg_gate": "seg_gate",
}
UPA = {
    "seg_proj": "seg_proj",
    "clf_proj": "clf_proj",
    "wn_fc1": "weight_network/layers/dense",
    "wn_fc2": "weight_network/layers/dense_1",
}


def convert_file(source: str | Path, destination: str | Path, *, images_divided_twice: bool = False) -> None:
    """Converts a .keras file to a BTINet checkpoint (safetensors); errors as `convert`."""
    convert(source, images_divided_twice=images_divided_twice).save(destination)


def convert(path: str | Path, *, images_divided_twice: bool = False) -> BTINet:
    """The published network with the weights of a .keras file, in evaluation mode.

    Any number of classes, any EfficientNet b0 to b7, with or without the encoder's last rescaling (the graph
    of weights="imagenet" or weights=None). It takes images in 0..1, as BTINet does.

    images_divided_twice: the published loaders divide by 255 although the network does so too, so its encoder
    saw 1/255 of the contrast. True reproduces that, for weights trained that way.

    UserError naming the file, and the layer where one is not what the published code builds.
    """
    file = KerasFile(path)
    return _Converter(file, images_divided_twice).model()


class _Converter:
    """Walks the graph from its two outputs to the input, filling the network on the way."""

    def __init__(self, file: KerasFile, images_divided_twice: bool) -> None:
        self.file = file
        self.divided_twice = images_divided_twice
        self.visited: set[str] = set()

    def model(self) -> BTINet:
        if len(self.file.outputs) != 2:
            raise UserError(
                f"{self.file.path}: found {len(self.file.outputs)} outputs, needed a mask and a diagnosis"
            )
        seg_out = self.layer(self.file.outputs[0], "Conv2D", activation=("sigmoid", "softmax"))
        cls_out = self.layer(self.file.outputs[1], "Dense", activation="softmax")
        dropout = self.layer(cls_out.inputs[0], "Dropout")
        size, channels = self.input_layer()
        model = BTINet(
            self.variant(),
            interaction="proxy",
            seg_classes=seg_out.config["filters"],
            cls_classes=cls_out.config["units"],
            in_channels=channels,
            image_size=size,
            dropout=dropout.config["rate"],
        )
        self.fill(model.seg_out, seg_out)
        self.fill(model.cls_out, cls_out)
        bridge, refined = self.decoder(model, seg_out)
        self.cls_head(model, dropout, refined)
        self.encoder(model)
        self.refuse_the_unknown()
        model.metadata = {"source": self.file.path.name, "images_divided_twice": self.divided_twice}
        return model.eval()

    def decoder(self, model: BTINet, seg_out: Layer) -> tuple[str, dict[str, list[str]]]:
        """Fills head, levels and encoder-side blocks; returns what the class head must read."""
        conv = self.layer(seg_out.inputs[0], "Conv2D", activation="relu", strides=[1, 1], padding="same")
        self.fill(model.seg_conv, conv)
        upconv = self.upconv(conv.inputs[0])
        self.fill(model.seg_up, upconv)
        below = upconv.inputs[0]
        skips, tokens, pooled = [], [], []
        for level, exchange in zip(reversed(model.levels), reversed(model.interactions), strict=True):
            tokens.insert(0, below)
            below, skip, source = self.level(level, exchange.tim, exchange.upa, below)
            skips.append(skip)  # s1 first
            pooled.insert(0, source)
        maps = [*skips, below]
        taps = [f"block{n}a_expand_activation" for n in (2, 3, 4, 6)] + ["top_activation"]
        for block, name, tap in zip(model.residual, maps, taps, strict=True):
            found = self.layer(name, "ResidualBlock", use_attention=True)
            self.reads(found, tap)
            self.fill_parts(block, found, RESIDUAL)
        _, s2, s3, s4, bridge = maps
        if pooled != [bridge, s4, s3, s2]:
            raise UserError(
                f"{self.file.path}: layer {pooled[0]}: the class features read {pooled}, "
                f"needed {[bridge, s4, s3, s2]}"
            )
        return bridge, {"maps": [s2, s3, s4, bridge], "tokens": tokens}

    def level(
        self, level: DecoderLevel, tim: TaskInteraction, upa: UncertaintyProxyAttention, name: str
    ) -> tuple[str, str, str]:
        """Fills one level from its last layer; returns the layers below, beside, and pooled for features."""
        upa_layer = self.layer(name, "UncertaintyProxyAttention")
        dropout_name, tim_name, features_name = upa_layer.inputs[:3]
        tim_layer = self.layer(tim_name, "TaskInteractionModule")
        self.reads(upa_layer, dropout_name, tim_name, features_name, tim_name)
        self.reads(tim_layer, dropout_name, features_name)
        features = self.layer(features_name, "Dense", activation="relu")
        pooling = self.layer(features.inputs[0], "GlobalAveragePooling2D")
        dropout = self.layer(dropout_name, "Dropout")
        block = self.layer(dropout.inputs[0], "ResidualBlock", use_attention=False)
        joined = self.layer(block.inputs[0], "Concatenate")
        upconv = self.upconv(joined.inputs[0])
        gate = self.layer(joined.inputs[1], "AttentionGate")
        self.reads(gate, gate.inputs[0], upconv.name)
        self.fill_parts(upa, upa_layer, UPA)
        self.fill_parts(tim, tim_layer, TIM)
        self.fill(level.features, features)
        self.fill_parts(level.block, block, RESIDUAL)
        self.fill_parts(level.gate, gate, GATE)
        self.fill(level.up, upconv)
        return upconv.inputs[0], gate.inputs[0], pooling.inputs[0]

    def cls_head(self, model: BTINet, dropout: Layer, refined: dict[str, list[str]]) -> None:
        norm = self.layer(dropout.inputs[0], "BatchNormalization")
        dense = self.layer(norm.inputs[0], "Dense", activation="relu")
        joined = self.layer(dense.inputs[0], "Concatenate")
        poolings = [self.layer(name, "GlobalAveragePooling2D") for name in joined.inputs[:4]]
        for pooling, name in zip(poolings, refined["maps"], strict=True):
            self.reads(pooling, name)
        self.reads(joined, *(p.name for p in poolings), *refined["tokens"])
        self.fill(model.cls_bn, norm)
        self.fill(model.cls_fc, dense)

    def encoder(self, model: BTINet) -> None:
        net = model.encoder.net
        stem = self.layer("stem_conv", "Conv2D", strides=[2, 2])
        self.fill(net._conv_stem, stem)
        self.fill(net._bn0, self.layer("stem_bn", "BatchNormalization"))
        for stage, blocks in enumerate(net._blocks, start=1):
            for letter, block in zip("abcdefghijklmnopqrstuvwxyz", blocks, strict=False):
                for ours, (theirs, kind) in BLOCK_LAYERS.items():
                    layer = getattr(block, ours)
                    if not isinstance(layer, nn.Identity):
                        self.fill(layer, self.layer(f"block{stage}{letter}_{theirs}", kind))
        self.fill(net._conv_head, self.layer("top_conv", "Conv2D"))
        self.fill(net._bn1, self.layer("top_bn", "BatchNormalization"))
        self.normalisation(model, self.layer(stem.inputs[0], "ZeroPadding2D"))

    def normalisation(self, model: BTINet, stem_pad: Layer) -> None:
        """Folds the layers between input and stem into the network's mean and standard deviation."""
        chain = []
        name = stem_pad.inputs[0]
        while self.file.layers[name].kind != "InputLayer":
            chain.insert(0, self.file.layers[name])
            name = self.file.layers[name].inputs[0]
        scale = np.full(model.in_channels, 1.0 if self.divided_twice else 255.0)
        offset = np.zeros(model.in_channels)
        for layer in chain:
            self.visited.add(layer.name)
            if layer.kind == "Rescaling":
                factor = np.asarray(layer.config["scale"], dtype=np.float64)
                scale, offset = scale * factor, offset * factor + np.asarray(layer.config["offset"])
            elif layer.kind == "Normalization" and not layer.config.get("invert"):
                mean, variance = self.moments(layer)
                deviation = np.maximum(np.sqrt(variance), 1e-7)
                scale, offset = scale / deviation, (offset - mean) / deviation
            else:
                raise UserError(
                    f"{self.file.path}: layer {layer.name}: a {layer.kind} before the stem is not known"
                )
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise UserError(f"{self.file.path}: layer {chain[-1].name}: its scale {scale} is not positive")
        with torch.no_grad():
            model.image_mean.copy_(torch.from_numpy(-offset / scale))
            model.image_std.copy_(torch.from_numpy(1 / scale))

    def moments(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of a Normalization: constants of the configuration, else weights."""
        stored = self.file.arrays(layer.name)
        if layer.config.get("mean") is not None:
            found = (layer.config["mean"], layer.config["variance"])
        elif len(stored) >= 2:
            found = (stored[0], stored[1])
        else:
            raise UserError(
                f"{self.file.path}: layer {layer.name}: has neither configured nor stored mean and variance"
            )
        return np.ravel(found[0]).astype(np.float64), np.ravel(found[1]).astype(np.float64)

    def variant(self) -> str:
        blocks = {m[0] for m in map(re.compile(r"block\d[a-z](?=_)").match, self.file.layers) if m}
        top = self.layer("top_conv", "Conv2D").config["filters"]
        if (len(blocks), top) not in VARIANTS:
            raise UserError(
                f"{self.file.path}: layer top_conv: an encoder of {len(blocks)} blocks and {top} top "
                "channels is not an EfficientNet b0 to b7"
            )
        return VARIANTS[len(blocks), top]

    def input_layer(self) -> tuple[int | tuple[int, int], int]:
        inputs = [layer for layer in self.file.layers.values() if layer.kind == "InputLayer"]
        if len(inputs) != 1:
            raise UserError(f"{self.file.path}: found {len(inputs)} inputs, needed one image")
        self.visited.add(inputs[0].name)
        shape = inputs[0].config.get("batch_shape") or inputs[0].config.get("batch_input_shape")
        if not shape or len(shape) != 4 or not shape[3]:
            raise UserError(
                f"{self.file.path}: layer {inputs[0].name}: found shape {shape}, needed (B, H, W, channels)"
            )
        _, height, width, channels = shape
        if not height or not width:
            return 224, channels
        return (height if height == width else (height, width)), channels

    def upconv(self, name: str) -> Layer:
        return self.layer(name, "Conv2DTranspose", strides=[2, 2], padding="same", activation="linear")

    def layer(self, name: str, kind: str, **config: object) -> Layer:
        """The layer, with these settings where it states them; UserError naming it otherwise."""
        found = self.file.layer(name, kind)
        if kind == "BatchNormalization":
            config["epsilon"] = BN_EPS
        for key, needed in config.items():
            value = found.config.get(key, needed)
            value = list(value) if isinstance(value, tuple) else value
            if value != needed and not (isinstance(needed, tuple) and value in needed):
                raise UserError(f"{self.file.path}: layer {name}: {key} is {value!r}, needed {needed!r}")
        self.visited.add(name)
        return found

    def reads(self, layer: Layer, *names: str) -> None:
        if layer.inputs != names:
            raise UserError(
                f"{self.file.path}: layer {layer.name}: reads {', '.join(layer.inputs)}, "
                f"needed {', '.join(names)}"
            )

    def fill(self, module: nn.Module, layer: Layer, inside: str = "") -> None:
        where = f"{layer.name}/{inside}" if inside else layer.name
        try:
            keras_layout.assign(module, self.file.arrays(layer.name, inside), where)
        except ValueError as cause:
            raise UserError(f"{self.file.path}: {cause}") from cause

    def fill_parts(
        self, module: ResidualBlock | AttentionGate | nn.Module, layer: Layer, parts: dict[str, str]
    ) -> None:
        modules = dict(module.named_modules())
        for ours, theirs in parts.items():
            if not isinstance(modules.get(ours, nn.Identity()), nn.Identity):
                self.fill(modules[ours], layer, theirs)

    def refuse_the_unknown(self) -> None:
        for name in self.file.unread():
            raise UserError(
                f"{self.file.path}: layer {name}: holds weights that the published network does not have"
            )
        for name, layer in self.file.layers.items():
            if name not in self.visited and not ENCODER_LAYER.fullmatch(name):
                raise UserError(
                    f"{self.file.path}: layer {name}: a {layer.kind} that the published network does not have"
                )
