"""The operator cross_attention: two decoders attend to each other through one similarity matrix."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bti_fast._export import exportable
from bti_fast.ops.backends import (
    compiled_backend,
    narrower_than_float64,
    no_limits,
    reference_backend,
)
from bti_fast.ops.checks import DTYPES, autocasts, check_device, check_rank, check_shape, check_tensor
from bti_fast.ops.dispatch import Backend, Operator, like
from bti_fast.ops.sdpa import sdpa_cross_attention, sdpa_cross_attention_backward
from bti_fast.reference import cross_attention as reference
from bti_fast.reference import cross_attention_backward as reference_backward
from bti_fast.reference.numerics import accumulate_dtype

HEAD_DIMS = (16, 32, 64, 128)  # of the compiled kernels
MOST_CLASS_TOKENS = 256
SHARED_MEMORY = 163 * 1024  # bytes a block of threads must be able to have: sm_80, sm_90, sm_100


@exportable
class CrossAttention(NamedTuple):
    """What cross_attention returns."""

    out_q: Tensor  # (B, h, N, e), dtype and layout of v_q
    out_k: Tensor  # (B, h, M, e), dtype and layout of v_k


def _fake(q, k, v_q, v_k, q_mask, k_mask, scale):
    shape = (*q.shape[:2], q.shape[2] + k.shape[2], 2)
    return torch.empty_like(v_q), torch.empty_like(v_k), q.new_empty(shape, dtype=accumulate_dtype(q))


def _fake_backward(grad_q, grad_k, q, k, v_q, v_k, *saved):
    return tuple(torch.empty_like(value) for value in (q, k, v_q, v_k))


def _in_layout(forward, backward):
    """Forward and backward whose results lie as the fakes promise."""

    def run(q, k, v_q, v_k, *rest):
        out_q, out_k, statistics = forward(q, k, v_q, v_k, *rest)
        return like(out_q, v_q), like(out_k, v_k), statistics.contiguous()

    def run_backward(*args):
        return tuple(like(grad, value) for grad, value in zip(backward(*args), args[2:6], strict=True))

    return run, run_backward


def _limits(q, k, v_q, v_k, *rest) -> str | None:
    """What the compiled kernels leave to sdpa: head dimensions that fill no register, M beyond one tile."""
    for name, value in (("q", q), ("v_k", v_k)):
        if value.shape[3] not in HEAD_DIMS:
            dims = ", ".join(map(str, HEAD_DIMS))
            return f"{name} has head dimension {value.shape[3]}, the fused kernel has {dims}"
    if k.shape[2] > MOST_CLASS_TOKENS:
        return f"k has {k.shape[2]} tokens, the fused kernel takes up to {MOST_CLASS_TOKENS}"
    return narrower_than_float64(q)


def _cuda_limits(q, *rest) -> str | None:
    """The compiled kernels' limits, and GPUs on which they would not fit."""
    return _limits(q, *rest) or _too_small(str(q.device))


@cache
def _too_small(device: str) -> str | None:
    """Why a CUDA device cannot run the CUDA kernels of cross_attention, or None."""
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin
    if shared >= SHARED_MEMORY:
        return None
    has = f"{properties.name} has {shared} bytes of shared memory for a block"
    return f"{has}, the fused kernel needs {SHARED_MEMORY}"


OPERATOR = Operator(
    name="cross_attention",
    schema="(Tensor q, Tensor k, Tensor v_q, Tensor v_k, Tensor? q_mask, Tensor? k_mask, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad_out_q, Tensor grad_out_k, Tensor q, Tensor k, Tensor v_q, Tensor v_k,"
    " Tensor out_q, Tensor out_k, Tensor statistics, Tensor? q_mask, Tensor? k_mask, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    saves=lambda inputs, outputs: (*inputs[:4], *outputs, *inputs[4:]),
    primals=lambda args: (*args[2:6], *args[9:]),
    gradients=lambda result: (*result, None, None, None),
    differentiable=2,
)
OPERATOR.add(reference_backend(*_in_layout(reference, reference_backward)))
OPERATOR.add(compiled_backend("cpu", "cross_attention", _limits))
OPERATOR.add(compiled_backend("cuda", "cross_attention", _cuda_limits))
OPERATOR.add(Backend("sdpa", no_limits, *_in_layout(sdpa_cross_attention, sdpa_cross_attention_backward)))


def cross_attention(
    q: Tensor,
    k: Tensor,
    v_q: Tensor,
    v_k: Tensor,
    *,
    q_mask: Tensor | None = None,
    k_mask: Tensor | None = None,
    scale: float | None = None,
) -> CrossAttention:
    """Attention between a dense decoder (N tokens) and a class decoder (M tokens), both directions at once.

    Args:
        q: (B, h, N, d) dense tokens, token-major or a view of channel-major maps (B, h*d, H, W).
        k: (B, h, M, d) class-side tokens.
        v_q: (B, h, N, e) values of the dense tokens, read by the class side.
        v_k: (B, h, M, e) values of the class-side tokens, read by the dense side.
        q_mask: (B, N) bool, True = takes part; None: all do.
        k_mask: (B, M) bool, likewise.
        scale: factor on the similarities; None means d ** -0.5, and 0.0 is legal.

    Returns:
        CrossAttention(out_q, out_k). A token that is masked, or has nothing to attend to, gets zeros.

    Raises:
        TypeError: an argument is not a floating-point tensor, the dtypes differ, a mask is not bool, or scale
            is not a number.
        ValueError: a shape or a device does not fit.

    Accuracy, against float64 and relative to the largest value: float32 1e-5 (gradients 1e-4), with logits up
    to 1e4 that float32 holds exactly; 16-bit dtypes at most twice (gradients three times) the error of
    ``(q @ k.mT * scale).softmax(-1) @ v`` and its autograd in that dtype. The CPU backend computes in float32
    and rounds the results alone; the CUDA backend, for its tensor cores, weights and gradients of scores too.

    Source: SPEC 1.4; the maths of shared-query/key bidirectional attention (LightGlue, GLIP, Grounding DINO).
    """
    if not _fits(q, k, v_q, v_k, q_mask, k_mask, scale):
        q, k, v_q, v_k = _checked(q, k, v_q, v_k, q_mask, k_mask, scale)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    out_q, out_k, _ = OPERATOR(q, k, v_q, v_k, q_mask, k_mask, factor)
    return CrossAttention(out_q, out_k)


def _fits(q, k, v_q, v_k, q_mask, k_mask, scale) -> bool:
    """Whether _checked has nothing to do. All its checks by name take longer than a call with few tokens."""
    if not (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v_q, Tensor)
        and isinstance(v_k, Tensor)
    ):
        return False
    if q_mask is not None or k_mask is not None or not (scale is None or type(scale) is float):
        return False
    if q.dim() != 4 or k.dim() != 4 or v_k.dim() != 4:
        return False
    batch, heads, n, d = q.shape
    m, e, dtype, device, strided = k.shape[2], v_k.shape[3], q.dtype, q.device, torch.strided
    return (
        d > 0
        and k.shape == (batch, heads, m, d)
        and v_q.shape == (batch, heads, n, e)
        and v_k.shape == (batch, heads, m, e)
        and dtype in DTYPES
        and k.dtype == dtype
        and v_q.dtype == dtype
        and v_k.dtype == dtype
        and k.device == device
        and v_q.device == device
        and v_k.device == device
        and q.layout is k.layout is v_q.layout is v_k.layout is strided
        and not autocasts(device)
    )


def _checked(q, k, v_q, v_k, q_mask, k_mask, scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v_q and v_k as the operator takes them, or the error that names what does not fit."""
    name = "cross_attention"
    tensors = {"q": q, "k": k, "v_q": v_q, "v_k": v_k}
    for argument, value in tensors.items():
        check_tensor(name, argument, value)
        check_rank(name, argument, value, 4, 4, "(B, heads, tokens, dim)")
    if autocasts(q.device):
        q, k, v_q, v_k = (_autocast(value) for value in (q, k, v_q, v_k))
    for argument, value in (("k", k), ("v_q", v_q), ("v_k", v_k)):
        check_device(name, argument, value, "q", q)
        if value.dtype != q.dtype:
            raise TypeError(f"{name}: {argument} must have q's dtype {q.dtype}, got {value.dtype}")
    batch, heads, n, d = q.shape
    m, e = k.shape[2], v_k.shape[3]
    check_shape(name, "k", k, (batch, heads, m, d), "(B, h, M, d)")
    check_shape(name, "v_q", v_q, (batch, heads, n, e), "(B, h, N, e)")
    check_shape(name, "v_k", v_k, (batch, heads, m, e), "(B, h, M, e)")
    if d < 1:
        raise ValueError(f"{name}: q needs a head dimension of at least 1, got {tuple(q.shape)}")
    for argument, mask, shape, meaning in (
        ("q_mask", q_mask, (batch, n), "(B, N)"),
        ("k_mask", k_mask, (batch, m), "(B, M)"),
    ):
        if mask is not None:
            _check_mask(argument, mask, shape, meaning, q)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"{name}: scale must be a number or None, got {type(scale).__name__}")
    return q, k, v_q, v_k


def _autocast(value: Tensor) -> Tensor:
    """Under autocast the four tensors come from linear layers and normalisations of different dtypes."""
    wide = value.dtype == torch.float64
    return value if wide else value.to(torch.get_autocast_dtype(value.device.type))


def _check_mask(argument: str, mask: object, shape: tuple, meaning: str, q: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"cross_attention: {argument} must be a bool tensor (True = takes part), got {found}")
    check_device("cross_attention", argument, mask, "q", q)
    check_shape("cross_attention", argument, mask, shape, meaning)
