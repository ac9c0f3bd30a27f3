"""What the kernels of the gate algebra share: its weights, their sizes, and products with vectors."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

BLOCK_O = tl.constexpr(32)  # rows of a weight taken at once,
BLOCK_K = tl.constexpr(128)  # and columns


class GateWeights(NamedTuple):
    """task_interaction's weights without W1 and b1, contiguous; or their gradients."""

    fc_weight: Tensor  # (F, H)
    fc_bias: Tensor
    bn_weight: Tensor
    bn_bias: Tensor
    bn_mean: Tensor
    bn_var: Tensor
    cls_gate_weight: Tensor  # (F, F)
    cls_gate_bias: Tensor
    prior_weight: Tensor  # (C, F)
    prior_bias: Tensor
    seg_gate_weight: Tensor  # (C, C)
    seg_gate_bias: Tensor
    seg_proj: Tensor  # (A, C)
    cls_proj: Tensor  # (A, F)
    gate1_weight: Tensor  # (G, 3)
    gate1_bias: Tensor
    gate2_weight: Tensor  # (2, G)
    gate2_bias: Tensor


class Sizes(NamedTuple):
    """The sizes C, H, F, A and G of these shapes."""

    channels: tl.constexpr
    hidden: tl.constexpr
    features: tl.constexpr
    aligned: tl.constexpr
    gate: tl.constexpr


def sizes_of(weights: GateWeights) -> Sizes:
    """The Sizes of these weights."""
    (aligned, channels), (features, hidden) = weights.seg_proj.shape, weights.fc_weight.shape
    return Sizes(*map(tl.constexpr, (channels, hidden, features, aligned, weights.gate1_weight.shape[0])))


@triton.jit
def vector_at(pointer, o, known):
    """Elements o of a vector, in float32; zeros for those that are not known."""
    return tl.load(pointer + o, mask=known, other=0.0).to(tl.float32)


@triton.jit
def matvec(weight, vector, o, known, COLUMNS: tl.constexpr):
    """Rows o of weight (rows, COLUMNS) times vector (COLUMNS), in float32."""
    total = tl.zeros([o.shape[0]], tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < COLUMNS
        v = vector_at(vector, k, inside)
        mask = known[:, None] & inside[None, :]
        w = tl.load(weight + o[:, None] * COLUMNS + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(w * v[None, :], 1)
    return total


@triton.jit
def transposed_matvec(weight, vector, k, known, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns k of weight (ROWS, COLUMNS), transposed, times vector (ROWS), in float32."""
    total = tl.zeros([BLOCK_O, k.shape[0]], tl.float32)
    for start in range(0, ROWS, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        inside = o < ROWS
        v = tl.load(vector + o, mask=inside, other=0.0)
        mask = inside[:, None] & known[None, :]
        w = tl.load(weight + o[:, None] * COLUMNS + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += w * v[:, None]
    return tl.sum(total, 0)
