"""Triton kernels of task_interaction: the four passes over x that its two directions need. SPEC 1.3.

Forward: `statistics` reads x once for its mean, its total variation and the pooled relu(W1 x + b1), which
stays on the chip; after the gate algebra on vectors, `modulate` reads x again and writes x (1 + scale).
Backward: `reduce_gradient` reads grad and x for the gradient of scale, and keeps one bit per hidden value,
its sign; after the algebra's gradient, `input_gradient` reads grad and x again, writes grad x, and adds up
the gradient of W1. Partial sums are added in a fixed order by `sum_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles as launching
from .autotune import tile_for
from .launch import Tile, dot_shape, gradient_shape, tile_shape
from .tiles import (
    INT32_OFFSETS,
    LAST,
    divisor,
    interpreted,
    map_offsets,
    maps_of,
    multiprocessors,
    narrow,
    positions_of,
    power_of_two,
)

SMALLEST_ROWS = 8  # below, the total variation is zero by definition


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """a @ b + accumulator in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def hidden_product(w, v, accumulator, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """W1 x, where w may be wider than v: then in two terms of v's dtype, which hold it to 16 bits or more."""
    if w.dtype == v.dtype or INTERPRET:
        return product(w, v, accumulator, PRECISION, INTERPRET)
    elif v.dtype == tl.float32:
        return product(w.to(tl.float32), v, accumulator, PRECISION, INTERPRET)
    else:
        high = w.to(v.dtype)
        low = (w.to(tl.float32) - high.to(tl.float32)).to(v.dtype)
        accumulator = product(low, v, accumulator, PRECISION, INTERPRET)
        return product(high, v, accumulator, PRECISION, INTERPRET)


@triton.jit
def difference(x, at, step, value, mask):
    """(value one step on) - value where mask allows it, else 0."""
    ahead = tl.load(x + (at + step), mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, ahead - value, 0.0)


@triton.jit
def sign(value):
    return tl.where(value > 0, 1.0, 0.0) - tl.where(value < 0, 1.0, 0.0)


@triton.jit
def statistics_kernel(
    x,  # (B, C, P)
    weight,  # (H, C), contiguous
    bias,  # (H,), contiguous
    partial,  # (B, tiles, C + H + 1) float32: sums of x, of relu(W1 x + b1), and of absolute differences
    positions,  # P / P_ALIGN
    tiles,
    size2,
    size3,
    xb,
    xc,
    x1,
    x2,
    x3,
    rows,  # spatial sizes, second to last
    columns,  # and last
    step1,  # elements to the next depth,
    step2,  # to the next row, divided by EDGE_ALIGN,
    step3,  # and to the next column
    edge,  # first position of the last row of a 2D map, divided by EDGE_ALIGN
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_H hidden channels; the tile of x is read again for each, out of a cache
    AXES: tl.constexpr,  # spatial axes; 0 leaves the differences out
    X_FORMAT: tl.constexpr,
    X_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    EDGE_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    b = program // tiles
    positions = positions * P_ALIGN
    p = (program % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < positions
    row = partial + program * (CHANNELS + HIDDEN + 1)
    right = inside & (p % columns < columns - 1)
    if AXES == 2:
        below = p < edge * EDGE_ALIGN
    else:
        below = inside & ((p // columns) % rows < rows - 1)
    behind = p < positions - rows * columns

    variation = tl.zeros([BLOCK_C], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        h = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
        known_h = h < HIDDEN
        hidden = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
        for start in range(0, CHANNELS, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            known = c < CHANNELS
            at = map_offsets(b, c[:, None], p[None, :], size2, size3, xb, xc, x1, x2, x3, X_FORMAT, X_ALIGN)
            v = tl.load(x + at, mask=known[:, None] & inside[None, :], other=0.0)
            w_mask = known_h[:, None] & known[None, :]
            w = tl.load(weight + h[:, None] * CHANNELS + c[None, :], mask=w_mask, other=0.0)
            hidden = hidden_product(w, v, hidden, PRECISION, INTERPRET)
            if chunk == 0:
                value = v.to(tl.float32)
                tl.store(row + c, tl.sum(value, 1), mask=known)
                if AXES > 0:
                    steps = tl.abs(difference(x, at, step3, value, known[:, None] & right[None, :]))
                    if AXES > 1:
                        mask = known[:, None] & below[None, :]
                        steps += tl.abs(difference(x, at, step2 * EDGE_ALIGN, value, mask))
                    if AXES > 2:
                        mask = known[:, None] & behind[None, :]
                        steps += tl.abs(difference(x, at, step1, value, mask))
                    variation += tl.sum(steps, 1)
        hidden += tl.load(bias + h, mask=known_h, other=0.0).to(tl.float32)[:, None]
        hidden = tl.where(hidden < 0, 0.0, hidden)  # NaN stays
        hidden = tl.where(inside[None, :], hidden, 0.0)
        tl.store(row + CHANNELS + h, tl.sum(hidden, 1), mask=known_h)
    tl.store(row + CHANNELS + HIDDEN, tl.sum(variation, 0))


@triton.jit
def sum_rows_kernel(
    partial,  # (B, rows, columns) float32
    out,  # (B, head): the first columns
    tail,  # (B, columns - head): the others
    rows,
    columns,
    head,
    scale,
    last_scale,  # of the last column
    blocks,  # programs for each b
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,  # power of two, at least rows
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < columns
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, ROWS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & known[None, :]
        total += tl.load(partial + (b * rows + r[:, None]) * columns + c[None, :], mask=mask, other=0.0)
    factor = tl.where(c == columns - 1, last_scale, scale)
    total = tl.sum(total, 0) * factor
    tl.store(out + b * head + c, narrow(total, out.dtype.element_ty, INTERPRET), mask=c < head)
    behind = known & (c >= head)
    at = tail + b * (columns - head) + (c - head)
    tl.store(at, narrow(total, tail.dtype.element_ty, INTERPRET), mask=behind)


@triton.jit
def modulate_kernel(
    x,  # (B, C, P)
    scale,  # (B, C) float32, contiguous
    x_out,  # (B, C, P)
    positions,  # P / P_ALIGN
    tiles,
    size2,
    size3,
    xb,
    xc,
    x1,
    x2,
    x3,
    ob,
    oc,
    o1,
    o2,
    o3,
    CHANNELS: tl.constexpr,
    X_FORMAT: tl.constexpr,
    X_ALIGN: tl.constexpr,
    O_FORMAT: tl.constexpr,
    O_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    parts: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    # Neighbours in memory run one after the other: the parts of a tile, the tiles of a sample.
    b = program // (parts * tiles)
    if X_FORMAT == 2:
        part = program % parts
        tile = (program // parts) % tiles
    else:
        tile = program % tiles
        part = (program // tiles) % parts
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < CHANNELS
    mask = known[:, None] & (p < positions * P_ALIGN)[None, :]
    at = map_offsets(b, c[:, None], p[None, :], size2, size3, xb, xc, x1, x2, x3, X_FORMAT, X_ALIGN)
    to = map_offsets(b, c[:, None], p[None, :], size2, size3, ob, oc, o1, o2, o3, O_FORMAT, O_ALIGN)
    factor = 1.0 + tl.load(scale + b * CHANNELS + c, mask=known, other=0.0)
    out = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(x_out + to, narrow(out, x_out.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def reduce_gradient_kernel(
    grad,  # (B, C, P)
    x,  # (B, C, P)
    weight,  # (H, C), contiguous
    bias,  # (H,), contiguous
    partial,  # (B, tiles, C) float32: sums of grad * x
    signs,  # (B, H, tiles * BLOCK_P / 32) int32: bit j of word w is set where W1 x + b1 > 0 at 32 w + j
    positions,  # P / P_ALIGN
    tiles,
    size2,
    size3,
    gb,
    gc,
    g1,
    g2,
    g3,
    xb,
    xc,
    x1,
    x2,
    x3,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_H hidden channels
    G_FORMAT: tl.constexpr,
    G_ALIGN: tl.constexpr,
    X_FORMAT: tl.constexpr,
    X_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_P // 32
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    b = program // tiles
    tile = program % tiles
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < positions * P_ALIGN
    word = tile * WORDS + tl.arange(0, WORDS)
    for chunk in tl.static_range(CHUNKS):
        h = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
        known_h = h < HIDDEN
        hidden = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
        for start in range(0, CHANNELS, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            known = c < CHANNELS
            mask = known[:, None] & inside[None, :]
            at = map_offsets(b, c[:, None], p[None, :], size2, size3, xb, xc, x1, x2, x3, X_FORMAT, X_ALIGN)
            v = tl.load(x + at, mask=mask, other=0.0)
            w_mask = known_h[:, None] & known[None, :]
            w = tl.load(weight + h[:, None] * CHANNELS + c[None, :], mask=w_mask, other=0.0)
            hidden = hidden_product(w, v, hidden, PRECISION, INTERPRET)
            if chunk == 0:
                grad_at = map_offsets(
                    b, c[:, None], p[None, :], size2, size3, gb, gc, g1, g2, g3, G_FORMAT, G_ALIGN
                )
                g = tl.load(grad + grad_at, mask=mask, other=0.0).to(tl.float32)
                tl.store(partial + program * CHANNELS + c, tl.sum(g * v.to(tl.float32), 1), mask=known)
        hidden += tl.load(bias + h, mask=known_h, other=0.0).to(tl.float32)[:, None]
        bits = tl.where((hidden > 0) & inside[None, :], 1, 0)
        bits = tl.reshape(bits, [BLOCK_H, WORDS, 32]) << tl.arange(0, 32)[None, None, :]
        words = tl.sum(bits, 2)
        to = (b * HIDDEN + h[:, None]) * (tiles * WORDS) + word[None, :]
        tl.store(signs + to, words, mask=known_h[:, None])


@triton.jit
def input_gradient_kernel(
    grad,  # (B, C, P)
    x,  # (B, C, P)
    weight,  # (H, C), contiguous
    signs,  # (B, H, words) int32, of reduce_gradient_kernel
    scale,  # (B, C) float32, contiguous
    summary_grad,  # (B, C + H + 1) float32, contiguous: gradients of the means and of the scene complexity
    grad_x,  # (B, C, P)
    partial,  # (splits, H C + H) float32: gradients of W1 and b1
    positions,  # P / P_ALIGN
    tiles,
    every,  # B * tiles
    words,
    splits,
    size2,
    size3,
    gb,
    gc,
    g1,
    g2,
    g3,
    xb,
    xc,
    x1,
    x2,
    x3,
    ob,
    oc,
    o1,
    o2,
    o3,
    rows,
    columns,
    step1,
    step2,  # divided by EDGE_ALIGN
    step3,
    edge,  # divided by EDGE_ALIGN
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    AXES: tl.constexpr,
    G_FORMAT: tl.constexpr,
    G_ALIGN: tl.constexpr,
    X_FORMAT: tl.constexpr,
    X_ALIGN: tl.constexpr,
    O_FORMAT: tl.constexpr,
    O_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    EDGE_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_P // 32
    parts: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks  # of the rows of grad W1 added up here; 0 writes grad x
    split = tl.program_id(0) // (parts * chunks)
    if WIDE:
        split = split.to(tl.int64)
    positions = positions * P_ALIGN
    share = 1.0 / positions
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < CHANNELS
    weight_grad = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    bias_grad = tl.zeros([BLOCK_H], tl.float32)
    # A while loop: the interpreter of this Triton cannot count to a bound that is not a constant.
    item = split
    while item < every:
        b = item // tiles
        tile = item % tiles
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < positions
        mask = known[:, None] & inside[None, :]
        mine = summary_grad + b * (CHANNELS + HIDDEN + 1)
        word = tile * WORDS + tl.arange(0, WORDS)
        at = map_offsets(b, c[:, None], p[None, :], size2, size3, xb, xc, x1, x2, x3, X_FORMAT, X_ALIGN)
        v = tl.load(x + at, mask=mask, other=0.0)
        out = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for k in range(0, chunks):
            if (chunk == 0) | (chunk == k):
                h = k * BLOCK_H + tl.arange(0, BLOCK_H)
                known_h = h < HIDDEN
                word_at = (b * HIDDEN + h[:, None]) * words + word[None, :]
                packed = tl.load(signs + word_at, mask=known_h[:, None] & (word < words)[None, :], other=0)
                bits = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
                active = tl.reshape(bits, [BLOCK_H, BLOCK_P]).to(tl.float32).to(v.dtype)
                by_hidden = tl.load(mine + CHANNELS + h, mask=known_h, other=0.0)
                if chunk == 0:
                    # Brought to magnitude 1, lest half precision lose it; put back after the product.
                    size = tl.max(tl.abs(by_hidden), 0)
                    size = tl.where(size > 0, size, 1.0)
                    w_at = h[:, None] * CHANNELS + c[None, :]
                    w = tl.load(weight + w_at, mask=known_h[:, None] & known[None, :], other=0.0)
                    w = narrow(w.to(tl.float32) * (by_hidden / size)[:, None], v.dtype, INTERPRET)
                    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
                    out += product(tl.trans(w), active, zero, PRECISION, INTERPRET) * (size * share)
                if chunk == k:
                    zero = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
                    seen = product(active, tl.trans(v), zero, PRECISION, INTERPRET)
                    weight_grad += seen * (by_hidden * share)[:, None]
                    bias_grad += tl.sum(active.to(tl.float32), 1) * (by_hidden * share)
        if chunk == 0:
            grad_at = map_offsets(
                b, c[:, None], p[None, :], size2, size3, gb, gc, g1, g2, g3, G_FORMAT, G_ALIGN
            )
            to = map_offsets(b, c[:, None], p[None, :], size2, size3, ob, oc, o1, o2, o3, O_FORMAT, O_ALIGN)
            g = tl.load(grad + grad_at, mask=mask, other=0.0).to(tl.float32)
            factor = 1.0 + tl.load(scale + b * CHANNELS + c, mask=known, other=0.0)
            out += g * factor[:, None]
            out += (tl.load(mine + c, mask=known, other=0.0) * share)[:, None]
            if AXES > 0:
                value = v.to(tl.float32)
                column = p % columns
                right = known[:, None] & (inside & (column < columns - 1))[None, :]
                left = known[:, None] & (inside & (column > 0))[None, :]
                slope = -sign(difference(x, at, step3, value, right))
                slope -= sign(difference(x, at, -step3, value, left))
                if AXES > 1:
                    if AXES == 2:
                        below = p < edge * EDGE_ALIGN
                        above = inside & (p >= columns)
                    else:
                        line = (p // columns) % rows
                        below = inside & (line < rows - 1)
                        above = inside & (line > 0)
                    down = step2 * EDGE_ALIGN
                    slope -= sign(difference(x, at, down, value, known[:, None] & below[None, :]))
                    slope -= sign(difference(x, at, -down, value, known[:, None] & above[None, :]))
                if AXES > 2:
                    plane = rows * columns
                    behind = known[:, None] & (p < positions - plane)[None, :]
                    before = known[:, None] & (inside & (p >= plane))[None, :]
                    slope -= sign(difference(x, at, step1, value, behind))
                    slope -= sign(difference(x, at, -step1, value, before))
                out += slope * (tl.load(mine + CHANNELS + HIDDEN) * share / CHANNELS)
            tl.store(grad_x + to, narrow(out, grad_x.dtype.element_ty, INTERPRET), mask=mask)
        item += splits
    h = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    known_h = h < HIDDEN
    line = partial + split * (HIDDEN * (CHANNELS + 1))
    at = h[:, None] * CHANNELS + c[None, :]
    tl.store(line + at, weight_grad, mask=known_h[:, None] & known[None, :])
    if part == 0:
        tl.store(line + HIDDEN * CHANNELS + h, bias_grad, mask=known_h)


def neighbours(x: Tensor) -> tuple[list[int], dict[str, int]]:
    """The six integers and two constants by which kernels find the neighbours of x (B, C, *spatial)."""
    spatial = x.shape[2:]
    sizes = (1,) * (3 - len(spatial)) + tuple(spatial)
    step = (0,) * (3 - len(spatial)) + tuple(x.stride()[2:])
    rows, columns = sizes[1:]
    edge = (rows - 1) * columns
    align = divisor(step[1], edge)
    differs = (rows if len(spatial) > 1 else columns) >= SMALLEST_ROWS
    integers = [rows, columns, step[0], step[1] // align, step[2], edge // align]
    return integers, {"AXES": len(spatial) if differs else 0, "EDGE_ALIGN": align}


def precision() -> str:
    """How float32 is multiplied on tensor cores: three products of tf32, where a chip has no float32 ones."""
    return "ieee" if launching.for_amd() else "tf32x3"


def sum_rows(
    partial: Tensor,  # (B, rows, columns) float32
    out: Tensor,  # (B, head), contiguous, written
    tail: Tensor | None = None,  # (B, columns - head), contiguous, written
    scale: float = 1.0,
    last_scale: float = 1.0,
) -> None:
    """Sums over axis 1 of partial, times scale, the last column times last_scale."""
    batch, rows, columns = partial.shape
    blocks = triton.cdiv(columns, 64)
    sum_rows_kernel[(batch * blocks,)](
        partial,
        out,
        out if tail is None else tail,
        rows,
        columns,
        columns if tail is None else out.numel() // batch,
        scale,
        last_scale,
        blocks,
        INTERPRET=interpreted(sum_rows_kernel),
        ROWS=power_of_two(rows),
        BLOCK_C=64,
        BLOCK_R=32,
        num_warps=4,
    )


def statistics(x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    """(B, C + C/2 + 1) float32: mean of x (B, C, *spatial), mean of relu(W1 x + b1), scene complexity."""
    batch, channels = x.shape[:2]
    hidden = conv_weight.shape[0]
    positions = positions_of(x)
    size2, size3, (mx,) = maps_of([(x, True)])
    block_h, block_c, block_p = dot_shape(x, conv_weight, mx.format)
    tiles = triton.cdiv(positions, block_p)
    partial = x.new_empty((batch, tiles, channels + hidden + 1), dtype=torch.float32)
    integers, constants = neighbours(x)
    p_align = divisor(positions)
    statistics_kernel[(batch * tiles,)](
        x,
        conv_weight.contiguous(),
        conv_bias.contiguous(),
        partial,
        positions // p_align,
        tiles,
        size2,
        size3,
        *mx.strides,
        *integers,
        CHANNELS=channels,
        HIDDEN=hidden,
        CHUNKS=triton.cdiv(hidden, block_h),
        **constants,
        X_FORMAT=mx.format,
        X_ALIGN=mx.align,
        P_ALIGN=p_align,
        PRECISION=precision(),
        WIDE=max(mx.span, partial.numel()) >= INT32_OFFSETS,
        INTERPRET=interpreted(statistics_kernel),
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=8 if block_h * block_p > 4096 else 4,
        num_stages=2,
    )
    summary = x.new_empty((batch, partial.shape[2]), dtype=torch.float32)
    sum_rows(partial, summary, scale=1.0 / positions, last_scale=1.0 / (positions * channels))
    return summary


def modulate(x: Tensor, scale: Tensor, tile: Tile | None = None) -> Tensor:
    """x (B, C, *spatial) times 1 + scale (B, C) float32, like x."""
    batch, channels = x.shape[:2]
    positions = positions_of(x)
    x_out = torch.empty_like(x)
    size2, size3, (mx, mo) = maps_of([(x, True), (x_out, True)])
    tile = tile or tile_for("modulate", x, mx.format, lambda tile: modulate(x, scale, tile))
    block_c, block_p = tile_shape(x, mx.format == LAST.value, tile.elements)
    tiles = triton.cdiv(positions, block_p)
    p_align = divisor(positions)
    modulate_kernel[(batch * tiles * triton.cdiv(channels, block_c),)](
        x,
        scale.contiguous(),
        x_out,
        positions // p_align,
        tiles,
        size2,
        size3,
        *mx.strides,
        *mo.strides,
        CHANNELS=channels,
        X_FORMAT=mx.format,
        X_ALIGN=mx.align,
        O_FORMAT=mo.format,
        O_ALIGN=mo.align,
        P_ALIGN=p_align,
        WIDE=max(mx.span, mo.span) >= INT32_OFFSETS,
        INTERPRET=interpreted(modulate_kernel),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=tile.warps,
    )
    return x_out


def reduce_gradient(
    grad_x_out: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of scale (B, C) float32, and the signs of W1 x + b1: (B, C/2, words) int32 of 32 positions."""
    batch, channels = x.shape[:2]
    hidden = conv_weight.shape[0]
    positions = positions_of(x)
    size2, size3, (mg, mx) = maps_of([(grad_x_out, True), (x, True)])
    block_h, block_c, block_p = dot_shape(x, conv_weight, mx.format)
    tiles = triton.cdiv(positions, block_p)
    partial = x.new_empty((batch, tiles, channels), dtype=torch.float32)
    signs = torch.empty((batch, hidden, tiles * block_p // 32), dtype=torch.int32, device=x.device)
    p_align = divisor(positions)
    reduce_gradient_kernel[(batch * tiles,)](
        grad_x_out,
        x,
        conv_weight.contiguous(),
        conv_bias.contiguous(),
        partial,
        signs,
        positions // p_align,
        tiles,
        size2,
        size3,
        *mg.strides,
        *mx.strides,
        CHANNELS=channels,
        HIDDEN=hidden,
        CHUNKS=triton.cdiv(hidden, block_h),
        G_FORMAT=mg.format,
        G_ALIGN=mg.align,
        X_FORMAT=mx.format,
        X_ALIGN=mx.align,
        P_ALIGN=p_align,
        PRECISION=precision(),
        WIDE=max(mg.span, mx.span, partial.numel(), signs.numel()) >= INT32_OFFSETS,
        INTERPRET=interpreted(reduce_gradient_kernel),
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=8 if block_h * block_p > 4096 else 4,
        num_stages=2,
    )
    grad_scale = x.new_empty((batch, channels), dtype=torch.float32)
    sum_rows(partial, grad_scale)
    return grad_scale, signs


def input_gradient(
    grad_x_out: Tensor,  # (B, C, *spatial)
    x: Tensor,
    conv_weight: Tensor,
    signs: Tensor,  # of reduce_gradient
    scale: Tensor,  # (B, C) float32
    summary_grad: Tensor,  # (B, C + C/2 + 1) float32
    bias_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (like x), of conv_weight (C/2, C) and of conv_bias (C/2), in the dtypes of these."""
    batch, channels = x.shape[:2]
    hidden = conv_weight.shape[0]
    positions = positions_of(x)
    grad_x = torch.empty_like(x)
    size2, size3, (mg, mx, mo) = maps_of([(grad_x_out, True), (x, True), (grad_x, True)])
    block_h, block_c, block_p, warps = gradient_shape(x, hidden)
    tiles = triton.cdiv(positions, block_p)
    parts = triton.cdiv(channels, block_c)
    chunks = triton.cdiv(hidden, block_h)
    splits = max(min(2 * multiprocessors(x.device) // (parts * chunks), batch * tiles), 1)
    partial = x.new_empty((1, splits, hidden * (channels + 1)), dtype=torch.float32)
    integers, constants = neighbours(x)
    p_align = divisor(positions)
    spans = mg.span, mx.span, mo.span, partial.numel(), signs.numel()
    input_gradient_kernel[(parts * chunks * splits,)](
        grad_x_out,
        x,
        conv_weight.contiguous(),
        signs,
        scale.contiguous(),
        summary_grad.contiguous(),
        grad_x,
        partial,
        positions // p_align,
        tiles,
        batch * tiles,
        signs.shape[2],
        splits,
        size2,
        size3,
        *mg.strides,
        *mx.strides,
        *mo.strides,
        *integers,
        CHANNELS=channels,
        HIDDEN=hidden,
        **constants,
        G_FORMAT=mg.format,
        G_ALIGN=mg.align,
        X_FORMAT=mx.format,
        X_ALIGN=mx.align,
        O_FORMAT=mo.format,
        O_ALIGN=mo.align,
        P_ALIGN=p_align,
        PRECISION=precision(),
        WIDE=max(spans) >= INT32_OFFSETS,
        INTERPRET=interpreted(input_gradient_kernel),
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=warps,
        num_stages=1,
    )
    grad_weight = torch.empty((hidden, channels), dtype=conv_weight.dtype, device=x.device)
    grad_bias = torch.empty((hidden,), dtype=bias_dtype, device=x.device)
    sum_rows(partial, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
