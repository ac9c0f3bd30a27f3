"""Encoders: anything that turns an image into five feature maps, and EfficientNet from MONAI's parts."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bti_fast.errors import UserError
from bti_fast.nn.checkpointing import checkpointed
from bti_fast.nn.folding import folded_conv1x1
from bti_fast.nn.mobile_block import FoldedMobileBlock, padded
from bti_fast.nn.normalised_silu import depthwise_silu, normalised_silu
from bti_fast.nn.pointwise import conv1x1

EFFICIENTNETS = tuple(f"efficientnet-b{i}" for i in range(8))
LEVELS = 5
TAPPED_STAGES = (1, 2, 3, 5)  # stages 2, 3, 4 and 6 of the paper, counted from 0


class EfficientNetEncoder(nn.Module):
    """EfficientNet b0 to b7 as the published code taps it (SPEC section 4).

    image (B, Cin, H, W), any H and W -> five maps, finest first: the expanded activations of the first block
    of stages 2, 3, 4, 6 and the top activation, at 1/2, 1/4, 1/8, 1/16, 1/32 of the size (rounded up).
    The layers are MONAI's; the paddings follow the actual input, as in Keras. Stochastic depth in training is
    the published one: a rate of 0.2·b/(number of blocks) at block b.
    Nothing is downloaded: weights start random. Where `activation_checkpointing` is set, the blocks are
    computed again in the backward pass instead of keeping their activations.
    """

    activation_checkpointing = False

    def __init__(self, name: str = "efficientnet-b4", in_channels: int = 3) -> None:
        super().__init__()
        if name not in EFFICIENTNETS:
            raise UserError(f"encoder: found {name!r}, needed one of {', '.join(EFFICIENTNETS)}")
        self.name = name
        self.net = _monai_efficientnet(name, in_channels)
        self.channels = (
            *(self.net._blocks[stage][0]._expand_conv.out_channels for stage in TAPPED_STAGES),
            self.net._conv_head.out_channels,
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        net = self.net
        x = normalised_silu(net._bn0, net._conv_stem(image))
        taps = []
        for index, stage in enumerate(net._blocks):
            for number, block in enumerate(stage):
                if self.activation_checkpointing:
                    x, expanded = checkpointed(partial(_mobile_block, block), block, x)
                else:
                    x, expanded = _mobile_block(block, x)
                if number == 0 and index in TAPPED_STAGES:
                    taps.append(expanded)
        taps.append(normalised_silu(net._bn1, conv1x1(net._conv_head, x)))
        return tuple(taps)

    def folded_form(self) -> nn.Module:
        """The same for inference, see bti_fast.nn.folding."""
        return FoldedEfficientNetEncoder(self)


class FoldedEfficientNetEncoder(nn.Module):
    """EfficientNetEncoder for inference: batch normalisations are in their convolutions, and every 1x1
    convolution is one pass together with what surrounds it."""

    def __init__(self, encoder: EfficientNetEncoder) -> None:
        super().__init__()
        net = encoder.net
        self.name, self.channels = encoder.name, encoder.channels
        self.stem = fuse_conv_bn_eval(net._conv_stem, net._bn0)
        self.stages = nn.ModuleList(nn.ModuleList(map(FoldedMobileBlock, stage)) for stage in net._blocks)
        self.head = folded_conv1x1(net._conv_head, net._bn1, silu=True)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = normalised_silu(_IDENTITY, self.stem(image))
        taps = []
        for index, stage in enumerate(self.stages):
            for number, block in enumerate(stage):
                x, expanded = block(x)
                if number == 0 and index in TAPPED_STAGES:
                    taps.append(expanded)
        return *taps, self.head(x)


_IDENTITY = nn.Identity()


class SamePaddingConv(nn.Conv2d):
    """A convolution of stride 2 padded for the size it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(padded(x, self.kernel_size[0]))


def _mobile_block(block: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """MONAI's inverted bottleneck: its output, and the activation after the expansion."""
    x = inputs
    if block.expand_ratio != 1:
        x = normalised_silu(block._bn0, conv1x1(block._expand_conv, x))
    expanded = x
    x = depthwise_silu(block._depthwise_conv, block._bn1, x)
    if block.has_se:
        squeezed = F.silu(conv1x1(block._se_reduce, x.mean((2, 3), keepdim=True)))
        gate = conv1x1(block._se_expand, squeezed).sigmoid()
        x = gate * x if torch.is_grad_enabled() else x.mul_(gate)
    x = block._bn2(conv1x1(block._project_conv, x))
    if block.id_skip and block.stride == 1 and block.in_channels == block.out_channels:
        if block.drop_connect_rate and block.training:
            x = _drop_samples(x, block.drop_connect_rate)
        x = x + inputs if torch.is_grad_enabled() else x.add_(inputs)
    return x, expanded


def _drop_samples(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zeroes whole samples with this probability and scales the others up."""
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


def _monai_efficientnet(name: str, in_channels: int) -> nn.Module:
    try:
        from monai.networks.nets import EfficientNetBN
    except Exception as cause:
        raise UserError(
            f"encoder {name}: MONAI cannot be imported ({cause}); pip install 'monai>=1.3'"
        ) from cause
    net = EfficientNetBN(name, pretrained=False, in_channels=in_channels)
    # What an encoder has no use for, and what _mobile_block does by itself.
    del net._fc, net._dropout, net._avg_pooling
    for module in list(net.modules()):
        for child_name, child in list(module.named_children()):
            if child_name.endswith("_padding") or child_name == "_swish":
                delattr(module, child_name)
            elif isinstance(child, nn.Conv2d):
                setattr(module, child_name, _same_padding(child))
    return net


def _same_padding(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution, padded by itself: symmetrically at stride 1, after the input's size otherwise."""
    if conv.stride[0] == 1:
        conv.padding = tuple(k // 2 for k in conv.kernel_size)
        return conv
    strided = SamePaddingConv(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, groups=conv.groups, bias=False
    )
    strided.weight = conv.weight
    return strided


def feature_channels(
    encoder: nn.Module, in_channels: int, channels: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The channels of an encoder's five maps: given, else its attribute `channels`, else seen in a dry run.

    ValueError where it does not return five maps (B, C, h, w), or where another number was given.
    """
    if channels is None:
        channels = getattr(encoder, "channels", None)
    if channels is None:
        channels = _dry_run(encoder, in_channels)
    channels = tuple(int(c) for c in channels)
    if len(channels) != LEVELS:
        raise ValueError(f"encoder: found {len(channels)} feature maps, needed {LEVELS}, finest first")
    return channels


def _dry_run(encoder: nn.Module, in_channels: int) -> tuple[int, ...]:
    training = encoder.training
    anchor = next(encoder.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            maps = encoder.eval()(
                torch.zeros(1, in_channels, 64, 64, device=anchor.device, dtype=anchor.dtype)
            )
    finally:
        encoder.train(training)
    check_maps(maps)
    return tuple(m.shape[1] for m in maps)


def check_maps(maps: object, channels: Sequence[int] | None = None) -> None:
    """ValueError unless `maps` are five maps (B, C, h, w), with these channels where they are given."""
    if not isinstance(maps, (tuple, list)) or len(maps) != LEVELS:
        found = f"{len(maps)} maps" if isinstance(maps, (tuple, list)) else type(maps).__name__
        raise ValueError(f"encoder: found {found} as output, needed a tuple of {LEVELS} maps, finest first")
    for level, feature in enumerate(maps):
        if feature.ndim != 4:
            raise ValueError(f"encoder map {level}: found shape {tuple(feature.shape)}, needed (B, C, h, w)")
        if channels is not None and feature.shape[1] != channels[level]:
            raise ValueError(
                f"encoder map {level}: found {feature.shape[1]} channels, needed {channels[level]}"
            )


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Fills an encoder from a local state dict: safetensors, or a torch file without code in it.

    Takes the names of MONAI's EfficientNetBN, those of EfficientNet-PyTorch, and the encoder's own, below any
    common prefix ("module.", or a whole network that this encoder is part of). A file for three channels also
    serves one channel: the kernels of the first convolution are summed.
    UserError naming the file where it cannot be read, does not fit, or holds what is not a number.
    """
    found = _read_state(Path(path))
    needed = encoder.state_dict()
    prefix = _prefix(next(iter(needed), ""), found)
    state = {}
    for key, tensor in needed.items():
        source = next((prefix + k for k in _spellings(key) if prefix + k in found), None)
        if source is None:
            if key.endswith("num_batches_tracked"):
                state[key] = tensor
                continue
            has = f"found {len(found)} tensors" + (f" such as {next(iter(found))}" if found else "")
            raise UserError(
                f"encoder weights {path}: {key} is missing ({has}); needs those of "
                f"{getattr(encoder, 'name', type(encoder).__name__)}, as it or MONAI names them"
            )
        value = found[source]
        if (
            key.endswith("_conv_stem.weight")
            and value.ndim == 4
            and value.shape[1] == 3
            and tensor.shape[1] == 1
        ):
            value = value.sum(1, keepdim=True)
        if value.shape != tensor.shape:
            raise UserError(
                f"encoder weights {path}: {key} has shape {tuple(value.shape)}, needed {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not (value.is_floating_point() and value.isfinite().all()):
            has = "NaN or infinity" if value.is_floating_point() else str(value.dtype)
            raise UserError(
                f"encoder weights {path}: {key} holds {has}, needed finite floating point numbers"
            )
        state[key] = value
    encoder.load_state_dict(state)


def _prefix(key: str, found: Mapping[str, Tensor]) -> str:
    """What stands before every name in the file, judged by one tensor that must be there."""
    names = [(name, s) for s in _spellings(key) for name in found if name == s or name.endswith(f".{s}")]
    return min((name.removesuffix(s) for name, s in names), key=len, default="")


def _spellings(key: str) -> tuple[str, ...]:
    """The names under which a tensor of an encoder may stand in a file."""
    plain = key.removeprefix("net.")
    # EfficientNet-PyTorch numbers the blocks through, without the stage
    flat = re.sub(r"^_blocks\.\d+\.(\d+)\.", r"_blocks.\1.", plain)
    return (key, plain, flat)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"encoder weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise UserError(
            f"encoder weights {path}: not a readable file of tensors (damaged, or with code or a whole "
            "module in it, which is not run); needs what torch.save(encoder.state_dict(), path) writes"
        ) from cause
    except Exception as cause:
        reason = " ".join([type(cause).__name__, *str(cause).strip().splitlines()[:1]])
        raise UserError(f"encoder weights {path}: not a readable file of tensors ({reason})") from cause
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"encoder weights {path}: found no state dict (names to tensors)")
    return state
