"""Weights of published bidirectional attention blocks, brought into CrossDecoderAttention.

What goes where (dense side first; "k | v" are the two halves of one projection of the module):

    module            LightGlue CrossBlock     BiMultiHeadAttention   the same in Hugging Face
    seg_in   q | v    to_qk | to_v             v_proj | values_v_proj vision_proj | values_vision_proj
    cls_in   k | v    to_qk | to_v             l_proj | values_l_proj text_proj | values_text_proj
    seg_out           to_out                   out_v_proj             out_vision_proj
    cls_out           to_out                   out_l_proj             out_text_proj
    seg_gate          1                        gamma_v, else 1        vision_param, else 1
    cls_gate          1                        gamma_l, else 1        text_param, else 1
    cls_norm          weight 1, bias 0         layer_norm_l, else 1,0 layer_norm_text, else 1, 0
    seg_norm          weight 1, bias 0         weight 1, bias 0       weight 1, bias 0

The module normalises both sides before it projects, the map over all of its positions; LightGlue does not
normalise, and GLIP normalises every position by itself. Its attention is theirs; what it reads is its own
normalised input. What it has no place for is refused by name: LightGlue's `ffn`, and `layer_norm_v`
(`layer_norm_vision`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bti_fast.errors import UserError
from bti_fast.nn.cross_decoder_attention import CrossDecoderAttention

_LIGHTGLUE = {"q": "to_qk", "v_q": "to_v", "k": "to_qk", "v_k": "to_v", "out_q": "to_out", "out_k": "to_out"}
_GLIP = {
    "q": "v_proj",
    "v_q": "values_v_proj",
    "k": "l_proj",
    "v_k": "values_l_proj",
    "out_q": "out_v_proj",
    "out_k": "out_l_proj",
    "gate_q": "gamma_v",
    "gate_k": "gamma_l",
    "norm_k": "layer_norm_l",
}
_HUGGING_FACE = {
    "q": "vision_proj",
    "v_q": "values_vision_proj",
    "k": "text_proj",
    "v_k": "values_text_proj",
    "out_q": "out_vision_proj",
    "out_k": "out_text_proj",
    "gate_q": "vision_param",
    "gate_k": "text_param",
    "norm_k": "layer_norm_text",
}


def load_lightglue_block(
    module: CrossDecoderAttention,
    weights: Mapping[str, Tensor],
    *,
    prefix: str = "",
    leave_out: Iterable[str] = (),
) -> None:
    """Loads LightGlue's CrossBlock (to_qk, to_v, to_out, shared by both sides) into ``module``, in place.

    Args:
        module: seg_channels and cls_features must both be the block's embedding size.
        weights: a state dict; only names that start with ``prefix`` are read.
        prefix: for example "transformers.0.cross_attn.".
        leave_out: names (or their first parts, as "ffn") that may stay behind.

    Raises:
        UserError: a weight is missing, has the wrong shape, or has no place in the module.

    Source: LightGlue (arXiv 2306.13643), its published CrossBlock.
    """
    _load(module, _under(weights, prefix, leave_out), _LIGHTGLUE, "a LightGlue CrossBlock")


def load_bi_multi_head_attention(
    module: CrossDecoderAttention,
    weights: Mapping[str, Tensor],
    *,
    prefix: str = "",
    leave_out: Iterable[str] = (),
) -> None:
    """Loads BiMultiHeadAttention, alone or within its fusion block, into ``module``, in place.

    Names of GLIP and Grounding DINO, or of the latter in Hugging Face transformers; vision is the dense side.
    The gates of the block around it and its norm of the text side are taken along where they are there.

    Args:
        module: heads * head_dim must be the block's embedding size.
        weights: a state dict; only names that start with ``prefix`` are read; "attn." after it is dropped.
        prefix: for example "transformer.encoder.fusion_layers.0.".
        leave_out: names (or their first parts, as "layer_norm_v") that may stay behind.

    Raises:
        UserError: a weight is missing, has the wrong shape, or has no place in the module.

    Source: GLIP (arXiv 2112.03857) and Grounding DINO (arXiv 2303.05499), their published code.
    """
    found = {name.removeprefix("attn."): value for name, value in _under(weights, prefix, leave_out).items()}
    names = _HUGGING_FACE if "vision_proj.weight" in found else _GLIP
    _load(module, found, names, "BiMultiHeadAttention")


def _under(weights: Mapping[str, Tensor], prefix: str, leave_out: Iterable[str]) -> dict[str, Tensor]:
    left = tuple(leave_out)
    found = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    return {
        name: value
        for name, value in found.items()
        if not any(name == skip or name.startswith(f"{skip}.") for skip in left)
    }


@torch.no_grad()
def _load(
    module: CrossDecoderAttention, weights: dict[str, Tensor], names: dict[str, str], block: str
) -> None:
    known = {f"{names[part]}.{kind}" for part in names if part[:4] != "gate" for kind in ("weight", "bias")}
    known |= {name for part, name in names.items() if part[:4] == "gate"}
    strangers = sorted(set(weights) - known)
    if strangers:
        raise UserError(
            f"{block}: CrossDecoderAttention has no place for {', '.join(strangers)}; "
            f"name them in leave_out to go without"
        )
    # Everything is looked up and checked before anything is changed.
    new = [
        *_halves(module.seg_in, weights, (names["q"], names["v_q"]), block),
        *_halves(module.cls_in, weights, (names["k"], names["v_k"]), block),
        *_halves(module.seg_out, weights, (names["out_q"],), block),
        *_halves(module.cls_out, weights, (names["out_k"],), block),
    ]
    for gate, part in ((module.seg_gate, "gate_q"), (module.cls_gate, "gate_k")):
        value = weights.get(names.get(part, ""))
        new.append(
            (gate, torch.ones_like(gate) if value is None else _fitting(value, gate, names[part], block))
        )
    norm = names.get("norm_k", "")
    for parameter, kind, neutral in (
        (module.cls_norm.weight, "weight", 1.0),
        (module.cls_norm.bias, "bias", 0.0),
    ):
        value = weights.get(f"{norm}.{kind}")
        fresh = torch.full_like(parameter, neutral)
        new.append(
            (parameter, fresh if value is None else _fitting(value, parameter, f"{norm}.{kind}", block))
        )
    new += [
        (module.seg_norm.weight, torch.ones_like(module.seg_norm.weight)),
        (module.seg_norm.bias, torch.zeros_like(module.seg_norm.bias)),
    ]
    for parameter, value in new:
        parameter.copy_(value)


def _halves(
    linear: torch.nn.Linear, weights: dict[str, Tensor], names: tuple[str, ...], block: str
) -> list[tuple[Tensor, Tensor]]:
    """(parameter, new value) of one projection of the module from the equal parts that ``names`` project."""
    pairs = []
    for parameter, kind in ((linear.weight, "weight"), (linear.bias, "bias")):
        parts = []
        for name, place in zip(names, parameter.chunk(len(names)), strict=True):
            value = weights.get(f"{name}.{kind}")
            if value is None and kind == "weight":
                raise UserError(f"{block}: {name}.weight is missing")
            # a published block without biases is one with zero biases
            parts.append(
                torch.zeros_like(place) if value is None else _fitting(value, place, f"{name}.{kind}", block)
            )
        pairs.append((parameter, torch.cat(parts)))
    return pairs


def _fitting(value: Tensor, place: Tensor, name: str, block: str) -> Tensor:
    if value.shape != place.shape:
        raise UserError(
            f"{block}: {name} has shape {tuple(value.shape)}, this module needs {tuple(place.shape)}"
        )
    return value.to(place)
