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

# Four warps give every thread 16-byte loads: of fp32 also with AMD's warps of 64, of half precision with 32.
BLOCK = 1024
NUM_WARPS = 4
# Offsets below this fit in int32 with a block to spare.
INT32_OFFSETS = 2**31 - 4096


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
def position_offsets(index, size1, size2, size3, s0, s1, s2, s3):
    """Offset of position `index` of a (size0, size1, size2, size3) grid with strides s0 to s3."""
    offset = (index % size3) * s3
    index = index // size3
    offset += (index % size2) * s2
    index = index // size2
    return offset + (index % size1) * s1 + (index // size1) * s0


@triton.jit
def forward_kernel(
    logits,  # (B, K, *spatial), positions as a grid of four axes, any strides
    u,  # (B * P) float32, contiguous
    count,  # B * P
    size1,
    size2,
    size3,
    s0,
    s1,
    s2,
    s3,
    class_stride,
    norm,  # 1 / log K
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    index = start * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    a = logits + position_offsets(index, size1, size2, size3, s0, s1, s2, s3)
    if CLASSES == 1:
        z = tl.abs(tl.load(a, mask=inside, other=0.0).to(tl.float32))
        e = tl.exp(-z)
        h = log1p(e) + z * e / (1.0 + e)
    else:
        top, rest, total = softmax_sums(a, class_stride, inside, CLASSES)
        h = log1p(rest) - total / (1.0 + rest)
    h *= norm
    tl.store(u + index, tl.where(h > 1.0, 1.0, h), mask=inside)  # not minimum, which loses NaN


@triton.jit
def backward_kernel(
    logits,  # (B, K, *spatial)
    grad_u,  # (B, *spatial) float32, any strides
    grad_logits,  # (B, K, *spatial), any strides
    count,
    size1,
    size2,
    size3,
    s0,
    s1,
    s2,
    s3,
    class_stride,
    u0,
    u1,
    u2,
    u3,
    g0,
    g1,
    g2,
    g3,
    grad_class_stride,
    norm,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    index = start * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    a = logits + position_offsets(index, size1, size2, size3, s0, s1, s2, s3)
    out = grad_logits + position_offsets(index, size1, size2, size3, g0, g1, g2, g3)
    grad_u += position_offsets(index, size1, size2, size3, u0, u1, u2, u3)
    g = tl.load(grad_u, mask=inside, other=0.0) * -norm
    if CLASSES == 1:
        x = tl.load(a, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(x))
        tl.store(out, g * (x * e / ((1.0 + e) * (1.0 + e))), mask=inside)
    else:
        top, rest, total = softmax_sums(a, class_stride, inside, CLASSES)
        scale = 1.0 / (1.0 + rest)
        t = total * scale
        for _ in range(CLASSES):
            d = tl.load(a, mask=inside, other=0.0).to(tl.float32) - top
            tl.store(out, g * (tl.exp(d) * scale * (d - t)), mask=inside)
            a += class_stride
            out += grad_class_stride


def grid_of(tensors: list[tuple[Tensor, bool]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and, per tensor, strides of the positions as four axes, merged wherever every tensor allows it.

    tensors: (tensor, whether it has the class axis 1), all of the same shape but for that axis.

    Raises NotImplementedError where more than four axes are left.
    """
    first, with_class = tensors[0]
    axes = [d for d in range(first.dim()) if not (with_class and d == 1)]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for position, d in enumerate(axes):
        size = first.shape[d]
        if size == 1:
            continue
        step = [t.stride(position + 1 if has and position else position) for t, has in tensors]
        if sizes and all(known[-1] == size * s for known, s in zip(strides, step, strict=True)):
            sizes[-1] *= size
            for known, s in zip(strides, step, strict=True):
                known[-1] = s
        else:
            sizes.append(size)
            for known, s in zip(strides, step, strict=True):
                known.append(s)
    if len(sizes) > 4:
        raise NotImplementedError(f"positions with {len(sizes)} axes that do not merge: at most 4")
    padding = 4 - len(sizes)
    return [1] * padding + sizes, [[0] * padding + known for known in strides]


def span(tensor: Tensor) -> int:
    """The largest element offset in the tensor."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def entropy_uncertainty(logits: Tensor) -> Tensor:
    """u (B, *spatial), float32, contiguous, of logits (B, K, *spatial) in float32, float16 or bfloat16."""
    u = logits.new_empty(logits.shape[:1] + logits.shape[2:], dtype=torch.float32)
    if u.numel() == 0:
        return u
    sizes, (strides,) = grid_of([(logits, True)])
    classes = logits.shape[1]
    forward_kernel[(triton.cdiv(u.numel(), BLOCK),)](
        logits,
        u,
        u.numel(),
        *sizes[1:],
        *strides,
        logits.stride(1),
        1.0 / math.log(max(classes, 2)),
        CLASSES=classes,
        WIDE=max(span(logits), u.numel()) >= INT32_OFFSETS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return u


def entropy_uncertainty_backward(grad_u: Tensor, logits: Tensor) -> Tensor:
    """Gradient of logits, in their dtype and memory format, from grad_u (B, *spatial) float32."""
    grad = torch.empty_like(logits)
    if grad.numel() == 0:
        return grad
    sizes, (strides, u_strides, g_strides) = grid_of([(logits, True), (grad_u, False), (grad, True)])
    classes = logits.shape[1]
    backward_kernel[(triton.cdiv(grad_u.numel(), BLOCK),)](
        logits,
        grad_u,
        grad,
        grad_u.numel(),
        *sizes[1:],
        *strides,
        logits.stride(1),
        *u_strides,
        *g_strides,
        grad.stride(1),
        1.0 / math.log(max(classes, 2)),
        CLASSES=classes,
        WIDE=max(span(logits), span(grad), span(grad_u), grad_u.numel()) >= INT32_OFFSETS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad
