"""The sdpa backend of cross_attention: two scaled_dot_product_attention calls with the roles swapped."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bti_fast.reference.numerics import accumulate_dtype, vjp


def sdpa_cross_attention(
    q: Tensor,  # (B, h, N, d)
    k: Tensor,  # (B, h, M, d)
    v_q: Tensor,  # (B, h, N, e)
    v_k: Tensor,  # (B, h, M, e)
    q_mask: Tensor | None,  # (B, N)
    k_mask: Tensor | None,  # (B, M)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; the statistics stay empty, since this backend's backward does not need them."""
    q, v_q = _drop_masked(q, q_mask), _drop_masked(v_q, q_mask)
    k, v_k = _drop_masked(k, k_mask), _drop_masked(v_k, k_mask)
    out_q = _attend(q, k, v_k, q_mask, k_mask, scale)
    out_k = _attend(k, q, v_q, k_mask, q_mask, scale)
    shape = (*q.shape[:2], q.shape[2] + k.shape[2], 2)
    return out_q, out_k, q.new_zeros(shape, dtype=accumulate_dtype(q))


def sdpa_cross_attention_backward(
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
    """Gradients of q, k, v_q and v_k; the two forward calls are run again."""
    function = lambda *inputs: sdpa_cross_attention(*inputs, q_mask, k_mask, scale)[:2]  # noqa: E731
    return vjp(function, (q, k, v_q, v_k), (grad_out_q, grad_out_k))


def _drop_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[:, None, :, None], 0.0)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """One direction. A query that is masked or has no key gets zeros."""
    if key.shape[2] == 0 or query.shape[2] == 0 or query.shape[0] == 0 or query.shape[1] == 0:
        return value.new_zeros((*query.shape[:3], value.shape[3]))
    attn_mask = None
    if key_mask is not None:
        # Where no key is left, all are let in and the result is dropped below: no row of -inf, hence no NaN.
        nothing = ~key_mask.any(1, keepdim=True)
        attn_mask = (key_mask | nothing)[:, None, None, :]
    out = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    if key_mask is not None:
        out = out.masked_fill(nothing[:, :, None, None], 0.0)
    if query_mask is not None:
        out = out.masked_fill(~query_mask[:, None, :, None], 0.0)
    return out
