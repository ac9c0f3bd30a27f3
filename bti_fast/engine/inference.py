"""From images of any size to masks at their own size, class probabilities, gates and uncertainties."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bti_fast import metrics
from bti_fast.data import resize_image
from bti_fast.nn import CrossDecoderAttention
from bti_fast.ops import entropy_uncertainty

MASK_THRESHOLD = 0.5
FAILURE_SCORE = "failure_score"
MAX_SOFTMAX = "max_softmax"
FOLD_FROM = 32  # images: folding takes as long as it spares for some twenty
# Keys of the checkpoint's metadata: {"mask": T, "class": T}, and who is referred (see engine.failures).
TEMPERATURE, REFERRAL = "temperature", "referral"


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image."""

    id: str
    mask_prob: np.ndarray  # (H, W) float32 at the image's own size
    class_prob: list[float]  # (L,)
    gates: list[list[float]]  # per level [w_seg, w_cls]; empty without gates
    proxies: list[list[float]]  # per level SPEC §1.3's signals; empty unless the interaction has them
    level_uncertainty: list[
        float
    ]  # per level the mean of SPEC §1.2's map; empty unless the interaction has it
    mask_entropy: float  # mean over the pixels, 0..1
    class_entropy: float  # 0..1
    # per level where each class-side token looks, (M, h, w) float32; empty unless asked for
    attention: list[np.ndarray] = field(default_factory=list)

    @property
    def failure_score(self) -> float:
        """See failure_score()."""
        return failure_score(self.mask_prob, self.class_prob)

    def failure_signals(self) -> dict[str, float]:
        """Every failure signal of SPEC §7, 1 - greatest class probability, and the failure score.

        Higher means a failure is more likely.
        """
        found = metrics.failure_signals(
            gates=self.gates,
            proxies=self.proxies,
            mask_entropy=self.mask_entropy,
            class_entropy=self.class_entropy,
        )
        return {**found, MAX_SOFTMAX: 1 - max(self.class_prob), FAILURE_SCORE: self.failure_score}


def for_images(model: Any, count: int, device: torch.device | str) -> Any:
    """The network to predict `count` images with: folded where that pays, on a CPU for more than a few."""
    folds = count >= FOLD_FROM and torch.device(device).type == "cpu"
    return model.fold() if folds else model


def predict_images(
    model: Any,
    images: Iterable[tuple[str, np.ndarray]],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    attention: bool = False,
) -> Iterator[Prediction]:
    """Predicts (id, image float32 (C, H, W) in 0..1) pairs in order; the model is left in evaluation mode.

    The temperatures in the model's metadata are applied. attention keeps where each class-side token looks.
    """
    for batch, inputs in _batches(model, images, batch_size, device):
        with recorded_attention(model) if attention else nullcontext([]) as looked, torch.inference_mode():
            out = model(inputs)
        yield from _predictions(model, batch, out, [level.float().cpu().numpy() for level in looked])


def sample_images(
    model: Any,
    images: Iterable[tuple[str, np.ndarray]],
    passes: int,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Iterator[list[Prediction]]:
    """MC-dropout: for each image what predict_images gives in `passes` passes with the dropout layers active,
    drawn from torch's global generator."""
    for batch, inputs in _batches(model, images, batch_size, device):
        drawn = [_predictions(model, batch, out) for out in dropout_passes(model, inputs, passes)]
        yield from map(list, zip(*drawn, strict=True))


def _batches(
    model: Any, images: Iterable[tuple[str, np.ndarray]], batch_size: int, device: torch.device | str
) -> Iterator[tuple[list[tuple[str, np.ndarray]], torch.Tensor]]:
    """The images in batches, each with what the network takes; the model is put on the device to evaluate."""
    model.to(device).eval()
    pending = iter(images)
    while batch := list(islice(pending, batch_size)):
        yield batch, network_input(model, [image for _, image in batch], device)


def network_input(
    model: Any, images: Sequence[np.ndarray], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Images float32 (C, H, W) of any size as one batch of the size that the model was trained at."""
    size = model.config["image_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.from_numpy(np.stack([resize_image(image, size) for image in images])).to(device)


@contextmanager
def recorded_attention(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within: every forward pass appends each CrossDecoderAttention's token_attention to the list, in
    order."""
    found: list[torch.Tensor] = []

    def record(module: CrossDecoderAttention, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        found.append(module.token_attention(*inputs))

    hooks = [m.register_forward_pre_hook(record) for m in attention_modules(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def attention_modules(model: torch.nn.Module) -> list[CrossDecoderAttention]:
    """The network's CrossDecoderAttention modules, coarsest level first."""
    return [module for module in model.modules() if isinstance(module, CrossDecoderAttention)]


@contextmanager
def active_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Within: dropout layers drop as in training, and everything else stays in evaluation mode."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@torch.inference_mode()
def dropout_passes(model: Any, inputs: torch.Tensor, passes: int) -> list[Any]:
    """The network's outputs in `passes` passes with its dropout layers active.

    The encoder runs once where no dropout layer is in it.
    """
    with active_dropout(model):
        if any(isinstance(module, torch.nn.Dropout) for module in model.encoder.modules()):
            return [model(inputs) for _ in range(passes)]
        maps = model.encode(inputs)
        return [model.decode(maps, inputs.shape[2:]) for _ in range(passes)]


def scaled_logits(model: Any, out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and class logits of the network's output, in fp32, divided by their temperatures."""
    scale = model.metadata.get(TEMPERATURE, {})
    return out.seg_logits.float() / scale.get("mask", 1.0), out.cls_logits.float() / scale.get("class", 1.0)


@torch.inference_mode()
def _predictions(
    model: Any, batch: list[tuple[str, np.ndarray]], out: Any, looked: Sequence[np.ndarray] = ()
) -> list[Prediction]:
    seg_logits, cls_logits = scaled_logits(model, out)
    prob = seg_logits.sigmoid() if seg_logits.shape[1] == 1 else 1 - seg_logits.softmax(1)[:, :1]
    mask_entropy = entropy_uncertainty(seg_logits).flatten(1).mean(1).tolist()
    class_entropy = entropy_uncertainty(cls_logits).tolist()
    class_prob = cls_logits.double().softmax(1).tolist()
    gates = [level.float().tolist() for level in out.gates]
    proxies = [level.float().tolist() for level in out.uncertainty if level.ndim == 2 and level.shape[1] == 3]
    maps = [level.float().flatten(1).mean(1).tolist() for level in out.uncertainty if level.ndim == 3]
    return [
        Prediction(
            id=name,
            mask_prob=_to_size(prob[i : i + 1], image.shape[1:]),
            class_prob=class_prob[i],
            gates=[level[i] for level in gates],
            proxies=[level[i] for level in proxies],
            level_uncertainty=[level[i] for level in maps],
            mask_entropy=mask_entropy[i],
            class_entropy=class_entropy[i],
            attention=[level[i] for level in looked],
        )
        for i, (name, image) in enumerate(batch)
    ]


def _to_size(prob: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """(1, 1, h, w) probabilities -> (H, W) numpy, bilinear; averaged where the image is the smaller one."""
    smaller = size[0] < prob.shape[2] or size[1] < prob.shape[3]
    resized = F.interpolate(prob, size=tuple(size), mode="bilinear", align_corners=False, antialias=smaller)
    return resized[0, 0].clamp(0, 1).cpu().numpy()


def failure_score(mask_prob: np.ndarray, class_prob: list[float], threshold: float = MASK_THRESHOLD) -> float:
    """One number in 0..1, higher where the mask or the class is more likely wrong.

    1 - s · c with c the greatest class probability and s the soft Dice confidence of the mask, 2 Σ p m / (Σ
    p + Σ m) for probabilities p and their own thresholded mask m (Borges et al. 2024, arXiv 2402.10665); for
    an empty m, s is 1 - max p, the confidence that no pixel is lesion.
    """
    prob = mask_prob.astype(np.float64)
    mask = prob > threshold
    if mask.any():
        certain = 2 * prob[mask].sum() / (prob.sum() + mask.sum())
    else:
        certain = 1 - prob.max(initial=0.0)
    return float(1 - certain * max(class_prob))


def class_names(model: Any) -> tuple[str, ...]:
    """The names of a model's classes; numbered where the checkpoint has none."""
    return model.classes or tuple(f"class {i}" for i in range(model.config["cls_classes"]))
