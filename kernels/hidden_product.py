"""The product W1 x on tensor cores, in the precision that each pair of dtypes asks for."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .tiles import INTERPRETED


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """a @ b + accumulator in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def hidden_product(w, v, accumulator, PRECISION: tl.constexpr):
    """w @ v, where w may be wider than v: then in two terms of v's dtype, which hold 16 bits of it."""
    if w.dtype == v.dtype or INTERPRETED:
        return product(w, v, accumulator, PRECISION)
    elif v.dtype == tl.float32:
        return product(w.to(tl.float32), v, accumulator, PRECISION)
    else:
        high = w.to(v.dtype)
        low = (w.to(tl.float32) - high.to(tl.float32)).to(v.dtype)
        accumulator = product(low, v, accumulator, PRECISION)
        return product(high, v, accumulator, PRECISION)


def precision() -> str:
    """How float32 is multiplied on tensor cores: three products of tf32, where a chip has no float32 ones."""
    return "ieee" if tiles.for_amd() else "tf32x3"
