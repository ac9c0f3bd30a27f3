"""Times of cross_attention on a GPU beside pairs of pinned SDPA calls, materialised maths and compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import bti_fast
from benchmarks.gpu_timing import forward, forward_backward, median_ms
from bti_fast import ops

BATCH, HEADS, DIM, TOKENS = 16, 4, 64, 12544
CLASS_TOKENS = (1, 16, 64, 256)
PINNED = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
# Least traffic, in tensors of the size of q: q, v_q and out_q; the same and q, v_q, dO_q, dq, dv_q.
UNITS = {"forward": 3, "forward+backward": 8}


def inputs(
    m: int, layout: str = "tokens", batch: int = BATCH, n: int = TOKENS, device: str = "cuda"
) -> list[Tensor]:
    """q, k, v_q and v_k in bfloat16; layout "maps": the dense side are views of channel-major maps."""
    made = [torch.randn(batch, HEADS, tokens, DIM, device=device) for tokens in (n, m, n, m)]
    made = [value.to(torch.bfloat16) for value in made]
    if layout == "maps":
        made[::2] = [value.transpose(2, 3).contiguous().transpose(2, 3) for value in made[::2]]
    return made


def fused(*tokens: Tensor) -> tuple[Tensor, ...]:
    """The operator, by the compiled library and nothing else: what is timed shall not be its fallback."""
    with bti_fast.backend(tokens[0].device.type):
        return tuple(ops.cross_attention(*tokens))


def maths(q: Tensor, k: Tensor, v_q: Tensor, v_k: Tensor) -> tuple[Tensor, Tensor]:
    """One similarity matrix, materialised."""
    similarity = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return similarity.softmax(-1) @ v_k, similarity.transpose(-1, -2).softmax(-1) @ v_q


def pinned(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Two attention calls with the roles swapped, by one SDPA backend and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v_q: Tensor, v_k: Tensor) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(getattr(SDPBackend, PINNED[name])):
            return scaled_dot_product_attention(q, k, v_k), scaled_dot_product_attention(k, q, v_q)

    return call


def providers() -> dict[str, tuple[Callable, str]]:
    """Name: (call, layout of the dense side)."""
    return {
        "bti_fast": (fused, "tokens"),
        "bti_fast maps": (fused, "maps"),
        **{name: (pinned(name), "tokens") for name in PINNED},
        "maths": (maths, "tokens"),
        "compile": (torch.compile(maths, dynamic=False), "tokens"),
    }


def attention() -> dict:
    """Forward and forward + backward for every M, and the gain over the best pinned pair."""
    copied, target = torch.empty(2, BATCH, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
    copy = median_ms(lambda: target.copy_(copied))["p50"]
    rows = []
    for m in CLASS_TOKENS:
        torch.compiler.reset()  # every size is compiled for itself
        for mode in UNITS:
            for name, (call, layout) in providers().items():
                torch.manual_seed(0)
                tokens = inputs(m, layout)
                row = {"class_tokens": m, "mode": mode, "provider": name}
                try:
                    run = forward(call, tokens) if mode == "forward" else forward_backward(call, tokens, ())
                    row.update(median_ms(run))
                except RuntimeError as cause:  # a pinned backend that cannot run this call, or memory
                    row["reason"] = " ".join(str(cause).split())[:200]
                rows.append(row)
                print(line(row), flush=True)
    return {
        "size": [BATCH, HEADS, TOKENS, DIM],
        "copy_ms": copy,
        "rows": with_shares(rows, copy),
        "against": against_best(rows),
    }


def with_shares(rows: list[dict], copy_ms: float) -> list[dict]:
    """The rows, timed ones with the share of a copy's bandwidth that the least traffic went at."""
    return [
        {**row, "share_of_copy": UNITS[row["mode"]] / 2 * copy_ms / row["p50"]} if "p50" in row else row
        for row in rows
    ]


def against_best(rows: list[dict]) -> list[dict]:
    """For every size and mode: the fastest pinned pair, and how many times faster bti_fast was."""
    found = []
    for m in sorted({row["class_tokens"] for row in rows}):
        for mode in UNITS:
            timed = {
                row["provider"]: row["p50"]
                for row in rows
                if row["class_tokens"] == m and row["mode"] == mode and "p50" in row
            }
            pairs = {name: timed[name] for name in PINNED if name in timed}
            if not pairs or "bti_fast" not in timed:
                continue
            best = min(pairs, key=pairs.__getitem__)
            times = pairs[best] / timed["bti_fast"]
            found.append({"class_tokens": m, "mode": mode, "best": best, "times_faster": times})
    return found


def line(row: dict) -> str:
    """One row as printed."""
    value = f"{row['p50']:8.4f} ms" if "p50" in row else f"n/a: {row['reason']}"
    return f"cross_attention M={row['class_tokens']:<4} {row['mode']:17} {row['provider']:14} {value}"
