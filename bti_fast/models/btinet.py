"""BTI-Net: one encoder, a segmentation decoder and a classification decoder that correct each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast._export import exportable
from bti_fast.errors import UserError
from bti_fast.models import checkpoint
from bti_fast.models.encoders import EfficientNetEncoder, check_maps, feature_channels, load_encoder_weights
from bti_fast.nn.blocks import BN_EPS, BN_MOMENTUM, AttentionGate, ResidualBlock
from bti_fast.nn.checkpointing import checkpointed
from bti_fast.nn.dropout import Dropout
from bti_fast.nn.folding import fold
from bti_fast.nn.interaction import FixedInteraction, GatedInteraction
from bti_fast.nn.up_conv import UpConv

INTERACTIONS = ("encoder-sharing", "none", "fixed", "proxy", "entropy", "attention")
WITHOUT_EXCHANGE = ("encoder-sharing", "none")
DECODER_CHANNELS = (384, 192, 96, 48)
HEAD_CHANNELS = (24, 16)
CLS_FEATURES = 256
ATTENTION_HEADS = 4
SMALLEST = 32  # pixels a side
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@exportable
class BTINetOutput(NamedTuple):
    """What BTINet returns.

    seg_logits (B, K, H, W) at the input's size and cls_logits (B, L); then one entry per decoder level,
    coarsest first, or none where the interaction has nothing to tell: gates (B, 2) = [w_seg, w_cls];
    uncertainty, the signals (B, 3) or the entropy map (B, h, w); auxiliary logits (B, K, h, w) and (B, L).
    """

    seg_logits: Tensor
    cls_logits: Tensor
    gates: tuple[Tensor, ...]
    uncertainty: tuple[Tensor, ...]
    aux_seg_logits: tuple[Tensor, ...]
    aux_cls_logits: tuple[Tensor, ...]


class DecoderLevel(nn.Module):
    """Upsampling, gated skip and residual block of one level, and the class features it exchanges with.

    below (B, Cb, h, w), skip (B, Cs, H, W), pooled (B, Cp) -> seg (B, C, H, W), cls (B, 256). With pooled
    None the level has no class features, and cls is None.
    """

    def __init__(self, below: int, skip: int, pooled: int | None, channels: int, dropout: float) -> None:
        super().__init__()
        self.up = UpConv(below, channels)
        self.gate = AttentionGate(skip, channels, channels // 2)
        self.block = ResidualBlock((channels, skip), channels)
        self.dropout = Dropout(dropout)
        self.features = None if pooled is None else nn.Linear(pooled, CLS_FEATURES)

    def forward(self, below: Tensor, skip: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        up = self.up(below, skip.shape[2:])
        seg = self.dropout(self.block(up, self.gate(skip, up)))
        return seg, None if self.features is None else F.relu(self.features(pooled))


class BTINet(nn.Module):
    """Segments a lesion and diagnoses the image at once (BTI-Net, arXiv 2606.29102; SPEC section 4).

    forward(image (B, in_channels, H, W), floating point in 0..1) -> BTINetOutput. Any H and W of at least 32.

    encoder: "efficientnet-b0" to "efficientnet-b7", or any module that returns five maps (B, C, h, w), finest
    first, at about 1/2 to 1/32 of the size (its channels from `encoder_channels`, else its attribute
    `channels`, else a dry run on 64x64).
    interaction: "encoder-sharing" (one decoder, for the mask; the class is told from the encoder's maps),
    "none" (two decoders that do not exchange), "fixed" (exchange without gates), "proxy" (the paper),
    "entropy", or "attention" (the paper's with cross-decoder attention before it).
    encoder_weights: a local file of encoder weights; nothing is ever downloaded.
    image_mean, image_std: per channel, in units of 0..1; None takes ImageNet's for three channels, their
    average otherwise. They are stored with the weights.
    image_size is a note of the size trained at, and restricts nothing.
    Set `activation_checkpointing` to train in about two thirds of the memory: blocks over large maps are then
    computed again in the backward pass instead of keeping their activations; results are the same.
    Raises ValueError or TypeError naming the argument; UserError for an unusable file of weights.
    """

    def __init__(
        self,
        encoder: str | nn.Module = "efficientnet-b4",
        *,
        interaction: str = "proxy",
        seg_classes: int = 1,
        cls_classes: int = 3,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 224,
        dropout: float = 0.3,
        encoder_weights: str | Path | None = None,
        encoder_channels: Sequence[int] | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction: found {interaction!r}, needed one of {', '.join(INTERACTIONS)}")
        for name, value in (
            ("seg_classes", seg_classes),
            ("cls_classes", cls_classes),
            ("in_channels", in_channels),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, needed a whole number of at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: found {dropout}, needed 0 <= dropout < 1")
        sides = (image_size,) * 2 if isinstance(image_size, int) else image_size
        if not isinstance(sides, Sequence) or len(sides) != 2 or not all(map(_is_side, sides)):
            raise ValueError(
                f"image_size: found {image_size!r}, needed a whole number of at least {SMALLEST}, or two"
            )
        if classes is not None and len(classes) != cls_classes:
            raise ValueError(f"classes: found {len(classes)} names, needed {cls_classes} like cls_classes")
        self.config: dict[str, Any] = {
            "encoder": encoder if isinstance(encoder, str) else None,
            "interaction": interaction,
            "seg_classes": seg_classes,
            "cls_classes": cls_classes,
            "in_channels": in_channels,
            "image_size": image_size if isinstance(image_size, int) else list(image_size),
            "dropout": dropout,
        }
        self.interaction = interaction
        self.folded = False
        self.in_channels = in_channels
        self.classes: tuple[str, ...] | None = None if classes is None else tuple(classes)
        self.metadata: dict[str, Any] = {}
        mean, std = _normalisation(in_channels, image_mean, image_std)
        self.register_buffer("image_mean", mean)
        self.register_buffer("image_std", std)

        self.encoder = EfficientNetEncoder(encoder, in_channels) if isinstance(encoder, str) else encoder
        if encoder_weights is not None:
            load_encoder_weights(self.encoder, encoder_weights)
        self.activation_checkpointing = False
        self.encoder_channels = feature_channels(self.encoder, in_channels, encoder_channels)
        s1, s2, s3, s4, bridge = self.encoder_channels
        self.residual = nn.ModuleList(ResidualBlock(c, c, attention=True) for c in self.encoder_channels)
        below = (bridge, *DECODER_CHANNELS[:-1])
        two = interaction != "encoder-sharing"
        pooled = (bridge, s4, s3, s2) if two else (None,) * len(DECODER_CHANNELS)
        self.levels = nn.ModuleList(
            DecoderLevel(b, skip, p, c, dropout)
            for b, skip, p, c in zip(below, (s4, s3, s2, s1), pooled, DECODER_CHANNELS, strict=True)
        )
        self.interactions = nn.ModuleList(
            _interaction(interaction, c, seg_classes, cls_classes) for c in DECODER_CHANNELS
        )
        self.seg_up = UpConv(DECODER_CHANNELS[-1], HEAD_CHANNELS[0])
        self.seg_conv = nn.Conv2d(HEAD_CHANNELS[0], HEAD_CHANNELS[1], 3, padding=1)
        self.seg_out = nn.Conv2d(HEAD_CHANNELS[1], seg_classes, 1)
        told = s2 + s3 + s4 + bridge + two * len(DECODER_CHANNELS) * CLS_FEATURES
        self.cls_fc = nn.Linear(told, CLS_FEATURES)
        self.cls_bn = nn.BatchNorm1d(CLS_FEATURES, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.cls_dropout = nn.Dropout(dropout)
        self.cls_out = nn.Linear(CLS_FEATURES, cls_classes)
        for name, child in self.named_children():
            if name not in ("encoder", "interactions"):
                child.apply(_initialise)
        # A fifth faster on CPUs; forward brings the image to the layout that the weights have.
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> BTINetOutput:
        return self.decode(self.encode(image), image.shape[2:])

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """The five maps (B, C, h, w) that the decoders start from, finest first; channels as
        `encoder_channels`."""
        self._check(image)
        if self.seg_conv.weight.is_contiguous(memory_format=torch.channels_last):
            image = image.contiguous(memory_format=torch.channels_last)
        shape = (1, -1, 1, 1)
        maps = self.encoder((image - self.image_mean.reshape(shape)) / self.image_std.reshape(shape))
        check_maps(maps, self.encoder_channels)
        return tuple(self._run(block, m) for block, m in zip(self.residual, maps, strict=True))

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> BTINetOutput:
        """What both decoders make of encode()'s maps, with masks of `size` (H, W).

        All dropout of ours is in here: passes of MC-dropout share one encode().
        """
        s1, s2, s3, s4, bridge = maps
        pooled = [m.mean((2, 3)) for m in (bridge, s4, s3, s2)]
        seg, tokens, interactions = bridge, [], []
        for level, exchange, skip, p in zip(
            self.levels, self.interactions, (s4, s3, s2, s1), pooled, strict=True
        ):
            seg, cls = self._run(level, seg, skip, p)
            if self.interaction not in WITHOUT_EXCHANGE:
                out = exchange(seg, cls)
                seg, cls = out.seg, out.cls
                interactions.append(out)
            if cls is not None:
                tokens.append(cls)
        seg = F.relu_(self.seg_conv(self.seg_up(seg, size)))
        cls = self.cls_bn(F.relu(self.cls_fc(torch.cat((*reversed(pooled), *tokens), 1))))
        return BTINetOutput(
            self.seg_out(seg),
            self.cls_out(self.cls_dropout(cls)),
            *(
                tuple(v for v in (getattr(out, field) for out in interactions) if v is not None)
                for field in ("gates", "uncertainty", "seg_logits", "cls_logits")
            ),
        )

    @property
    def activation_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass, also those of an encoder of ours."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        self._activation_checkpointing = wanted
        if isinstance(self.encoder, EfficientNetEncoder):
            self.encoder.activation_checkpointing = wanted

    def _run(self, block: nn.Module, *inputs: Tensor) -> Any:
        return checkpointed(block, block, *inputs) if self.activation_checkpointing else block(*inputs)

    def _check(self, image: Tensor) -> None:
        if not isinstance(image, Tensor):
            raise TypeError(f"image: found {type(image).__name__}, needed a torch.Tensor")
        if not image.is_floating_point():
            raise TypeError(f"image: found {image.dtype}, needed a floating point dtype, with values in 0..1")
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(f"image: found shape {tuple(image.shape)}, needed (B, {self.in_channels}, H, W)")
        if min(image.shape[2:]) < SMALLEST:
            found = f"{image.shape[2]}x{image.shape[3]}"
            raise ValueError(f"image: found {found} pixels, needed at least {SMALLEST}x{SMALLEST}")

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that stage 2 of the recipe trains; none without gates."""
        for exchange in self.interactions:
            if isinstance(exchange, GatedInteraction):
                yield from exchange.gate_parameters()

    def fold(self) -> BTINet:
        """A copy for inference, in evaluation mode, that gives the same outputs (to 1e-5) in less time.

        Batch normalisation is merged into convolutions, and so are chains of linear maps; on a CPU, what lies
        between two nonlinearities is one pass over its maps. The copy cannot be trained or saved: keep this
        network for that.
        """
        folded = fold(self)
        folded.folded = True
        return folded

    def train(self, mode: bool = True) -> BTINet:
        if mode and self.folded:
            raise RuntimeError("this BTINet is folded for inference; train the one that fold() was called on")
        return super().train(mode)

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes weights (safetensors), configuration, class names and `metadata` (JSON), atomically.

        Raises UserError for an unwritable path, TypeError for metadata that JSON cannot hold.
        """
        if self.folded:
            raise RuntimeError("this BTINet is folded for inference; save the one that fold() was called on")
        if metadata is not None:
            self.metadata = dict(metadata)
        checkpoint.write(path, self.state_dict(), self.config, self.classes, self.metadata)

    @classmethod
    def load(cls, path: str | Path, *, encoder: nn.Module | None = None, **expected: Any) -> BTINet:
        """The network saved at `path`, in evaluation mode, with its `metadata` and `classes`.

        `encoder` is needed where the saved network had one of its own. `expected` names settings that the
        file must have (cls_classes=3, say). UserError naming the file where it is missing, truncated, not
        ours, or of another configuration.
        """
        stored = checkpoint.read(path)
        for name, value in expected.items():
            if stored.config.get(name) != value:
                raise UserError(f"{path}: {name} is {stored.config.get(name)!r}, needed {value!r}")
        config = dict(stored.config)
        named = config.pop("encoder", None)
        if named is None and encoder is None:
            raise UserError(f"{path}: was saved with an encoder of its own; pass it as encoder=")
        try:
            model = cls(named if encoder is None else encoder, **config, classes=stored.classes)
        except (TypeError, ValueError, MemoryError) as cause:
            raise UserError(f"{path}: its configuration does not describe a BTINet ({cause})") from cause
        checkpoint.fill(model, stored.tensors, path)
        model.metadata = stored.metadata
        return model.eval()


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= SMALLEST


def _interaction(kind: str, channels: int, seg_classes: int, cls_classes: int) -> nn.Module:
    if kind in WITHOUT_EXCHANGE:
        return nn.Identity()
    if kind == "fixed":
        return FixedInteraction(channels, CLS_FEATURES)
    return GatedInteraction(
        channels,
        CLS_FEATURES,
        uncertainty="entropy" if kind == "entropy" else "proxy",
        attention_heads=ATTENTION_HEADS if kind == "attention" else 0,
        seg_classes=seg_classes,
        cls_classes=cls_classes if kind == "entropy" else None,
    )


def _normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    defaults = []
    for values in (IMAGENET_MEAN, IMAGENET_STD):
        defaults.append(values if channels == 3 else [sum(values) / 3] * channels)
    chosen = []
    for name, given, default in (("image_mean", mean, defaults[0]), ("image_std", std, defaults[1])):
        values = torch.tensor([float(v) for v in (default if given is None else given)])
        if len(values) != channels:
            raise ValueError(f"{name}: found {len(values)} values, needed {channels} like in_channels")
        chosen.append(values)
    if not bool((chosen[1] > 0).all()):
        raise ValueError(f"image_std: found {chosen[1].tolist()}, needed values above 0")
    return chosen[0], chosen[1]


def _initialise(module: nn.Module) -> None:
    """Glorot uniform weights and zero biases, Keras' default, which the published decoder starts from."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
