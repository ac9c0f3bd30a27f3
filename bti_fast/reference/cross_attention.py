"""Reference of cross_attention: both directions from one materialised similarity matrix, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from bti_fast.reference.numerics import accumulate_dtype, vjp


def cross_attention(
    q: Tensor,  # (B, h, N, d)
    k: Tensor,  # (B, h, M, d)
    v_q: Tensor,  # (B, h, N, e)
    v_k: Tensor,  # (B, h, M, e)
    q_mask: Tensor | None,  # (B, N) bool, True = takes part
    k_mask: Tensor | None,  # (B, M) bool
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out_q (B, h, N, e), out_k (B, h, M, e), and the statistics of both softmaxes (B, h, N + M, 2).

    Statistics, of the N rows, then of the M columns: a peak, and the log of the sum of e^(score - peak).
    A masked token leaves both softmaxes, and what it holds (NaN included) reaches no other token; a row with
    nothing to attend to gives zeros, zero gradients, and statistics of 0 and -inf. SPEC 1.4.
    """
    dtype, out_dtype = accumulate_dtype(q), q.dtype
    q, v_q = _drop_masked(q.to(dtype), q_mask), _drop_masked(v_q.to(dtype), q_mask)
    k, v_k = _drop_masked(k.to(dtype), k_mask), _drop_masked(v_k.to(dtype), k_mask)
    similarity = scale * (q @ k.transpose(-1, -2))
    if q_mask is not None:
        similarity = similarity.masked_fill(~q_mask[:, None, :, None], -torch.inf)
    if k_mask is not None:
        similarity = similarity.masked_fill(~k_mask[:, None, None, :], -torch.inf)
    rows, of_rows = _softmax(similarity)
    columns, of_columns = _softmax(similarity.transpose(-1, -2))
    return (rows @ v_k).to(out_dtype), (columns @ v_q).to(out_dtype), torch.cat((of_rows, of_columns), 2)


def cross_attention_backward(
    grad_out_q: Tensor,
    grad_out_k: Tensor,
    q: Tensor,
    k: Tensor,
    v_q: Tensor,
    v_k: Tensor,
    out_q: Tensor,
    out_k: Tensor,
    statistics: Tensor,
    q_mask: Tensor | None,
    k_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v_q and v_k, by differentiating the reference."""
    function = lambda *inputs: cross_attention(*inputs, q_mask, k_mask, scale)[:2]  # noqa: E731
    return vjp(function, (q, k, v_q, v_k), (grad_out_q, grad_out_k))


def _drop_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[:, None, :, None], 0.0)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, and its peak and log of the sum; rows of -inf give zeros, 0 and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_tensor((0.0, -torch.inf)).expand(*scores.shape[:-1], 2)
    peak = scores.amax(-1, keepdim=True).detach()
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    e = torch.exp(scores - shift)
    total = e.sum(-1, keepdim=True)
    weights = e / total.masked_fill(total == 0, 1.0)
    return weights, torch.cat((shift, torch.log(total)), -1).detach()
