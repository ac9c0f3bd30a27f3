"""Triton kernels of entropy_uncertainty: normalised entropy of softmax (K >= 2) or sigmoid (K = 1).

One program takes BLOCK positions and walks the classes once, the maximum kept online. With d = a - max,
rest = the sum over all but one maximum of exp(d), and total = the sum of exp(d) d:

    H = log1p(rest) - total / (1 + rest)          dH/da = -p (d - total / (1 + rest))

two sums of terms of one sign, so nothing cancels and saturated logits give exact 0. SPEC 1.1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import merged_axes, needs_64_bits, program_index, span, store_narrow

# Four warps give every thread 16-byte loads: of fp32 also with AMD's warps of 64, of half precision with 32.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact to rounding also near 0 (tl has none); NaN stays."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def softmax_sums(a, class_stride, inside, CLASSES: tl.constexpr):
    """(max, rest, total) over the classes; a: [BLOCK] pointers to the logits of class 0."""
    top = tl.load(a, mask=inside, other=0.0).to(tl.float32)
    rest = tl.zeros_like(top)
    total = tl.zeros_like(top)
    for _ in range(1, CLASSES):
        a += class_stride
        x = tl.load(a, mask=inside, other=0.0).to(tl.float32)
        d = x - top
        rises = d > 0
        e = tl.exp(tl.where(rises, -d, d))
        total = tl.where(rises, e * (total - d * (1.0 + rest)), total + e * d)
        rest = tl.where(rises, e * (1.0 + rest), rest + e)
        top = tl.where(rises, x, top)
    return top, rest, total


@triton.jit
def entropy(a, class_stride, inside, norm, CLASSES: tl.constexpr):
    """(u, top, rest, total): normalised entropy, and what its gradient needs; a: as in softmax_sums.

    Of one logit, top is the logit itself and rest is e^-|logit|.
    """
    if CLASSES == 1:
        top = tl.load(a, mask=inside, other=0.0).to(tl.float32)
        z = tl.abs(top)
        rest = tl.exp(-z)
        total = rest
        h = log1p(rest) + z * rest / (1.0 + rest)
    else:
        top, rest, total = softmax_sums(a, class_stride, inside, CLASSES)
        h = log1p(rest) - total / (1.0 + rest)
    h *= norm
    return tl.where(h > 1.0, 1.0, h), top, rest, total  # not minimum, which loses NaN


@triton.jit
def store_logit_gradient(
    grad, out, out_stride, a, class_stride, top, rest, total, inside, norm, CLASSES: tl.constexpr
):
    """Gradient of the logits at a, to pointers `out`, for the gradient of u; top, rest, total: of entropy."""
    grad *= -norm
    if CLASSES == 1:
        store_narrow(out, grad * (top * rest / ((1.0 + rest) * (1.0 + rest))), inside)
    else:
        share = 1.0 / (1.0 + rest)
        centre = total * share
        for _ in range(CLASSES):
            d = tl.load(a, mask=inside, other=0.0).to(tl.float32) - top
            store_narrow(out, grad * (tl.exp(d) * share * (d - centre)), inside)
            a += class_stride
            out += out_stride


@triton.jit
def position_offsets(index, sizes, strides):
    """Offset of position `index` of a grid of four axes; sizes: of the last three."""
    offset = (index % sizes[2]) * strides[3]
    index = index // sizes[2]
    offset += (index % sizes[1]) * strides[2]
    index = index // sizes[1]
    return offset + (index % sizes[0]) * strides[1] + (index // sizes[0]) * strides[0]


@triton.jit
def forward_kernel(
    logits,  # (B, K, *spatial), positions as a grid of four axes, any strides
    logits_strides,  # of those axes
    class_stride,
    u,  # (B * P) float32, contiguous
    count,  # B * P
    sizes,  # of the last three axes
    norm,  # 1 / log K
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK: tl.constexpr,
):
    index = program_index(WIDE) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    a = logits + position_offsets(index, sizes, logits_strides)
    value, _top, _rest, _total = entropy(a, class_stride, inside, norm, CLASSES)
    tl.store(u + index, value, mask=inside)


@triton.jit
def backward_kernel(
    logits,  # (B, K, *spatial)
    logits_strides,
    class_stride,
    grad_u,  # (B, *spatial) float32, any strides
    u_strides,
    grad_logits,  # (B, K, *spatial), any strides
    grad_strides,
    grad_class_stride,
    count,
    sizes,
    norm,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = program_index(WIDE) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    a = logits + position_offsets(index, sizes, logits_strides)
    out = grad_logits + position_offsets(index, sizes, grad_strides)
    g = tl.load(grad_u + position_offsets(index, sizes, u_strides), mask=inside, other=0.0)
    _u, top, rest, total = entropy(a, class_stride, inside, norm, CLASSES)
    store_logit_gradient(g, out, grad_class_stride, a, class_stride, top, rest, total, inside, norm, CLASSES)


def grid_of(tensors: list[tuple[Tensor, bool]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Of the positions as four axes, merged where every tensor allows it: the last three sizes, and strides.

    tensors: (tensor, whether it has the class axis 1), all of the same shape but for that axis.

    Raises NotImplementedError where more than four axes are left.
    """
    first, with_class = tensors[0]
    axes = [axis for axis in range(first.dim()) if not (with_class and axis == 1)]
    steps = [
        [t.stride(place + 1 if has and place else place) for place in range(len(axes))] for t, has in tensors
    ]
    sizes, strides = merged_axes([first.shape[axis] for axis in axes], steps)
    if len(sizes) > 4:
        raise NotImplementedError(f"positions with {len(sizes)} axes that do not merge: at most 4")
    padding = 4 - len(sizes)
    return tuple(([1] * padding + sizes)[1:]), [(*[0] * padding, *known) for known in strides]


def norm_of(classes: int) -> float:
    """1 / log K, what makes an entropy over K classes one of [0, 1]; of one logit, over two."""
    return 1.0 / math.log(max(classes, 2))


def entropy_uncertainty(logits: Tensor) -> Tensor:
    """u (B, *spatial), float32, contiguous, of logits (B, K, *spatial) in float32, float16 or bfloat16."""
    u = logits.new_empty(logits.shape[:1] + logits.shape[2:], dtype=torch.float32)
    if u.numel() == 0:
        return u
    sizes, (strides,) = grid_of([(logits, True)])
    forward_kernel[(triton.cdiv(u.numel(), BLOCK),)](
        logits,
        strides,
        logits.stride(1),
        u,
        u.numel(),
        sizes,
        norm_of(logits.shape[1]),
        CLASSES=logits.shape[1],
        WIDE=needs_64_bits(span(logits), u.numel()),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return u


def entropy_uncertainty_backward(grad_u: Tensor, logits: Tensor) -> Tensor:
    """Gradient of logits, in their dtype and memory format, from grad_u (B, *spatial) float32."""
    grad = torch.empty_like(logits)
    if grad.numel() == 0:
        return grad
    sizes, (strides, u_strides, grad_strides) = grid_of([(logits, True), (grad_u, False), (grad, True)])
    backward_kernel[(triton.cdiv(grad_u.numel(), BLOCK),)](
        logits,
        strides,
        logits.stride(1),
        grad_u,
        u_strides,
        grad,
        grad_strides,
        grad.stride(1),
        grad_u.numel(),
        sizes,
        norm_of(logits.shape[1]),
        CLASSES=logits.shape[1],
        WIDE=needs_64_bits(span(logits), span(grad), span(grad_u), grad_u.numel()),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad
