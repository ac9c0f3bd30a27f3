"""Bidirectional attention between a dense decoder map and class-side tokens, from one similarity matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bti_fast import ops
from bti_fast._export import exportable
from bti_fast.nn.checks import check_count, check_features, check_like_weight, check_map
from bti_fast.nn.pointwise import pointwise


@exportable
class CrossDecoderAttentionOutput(NamedTuple):
    """The two updated inputs, in their own shapes."""

    seg: Tensor
    cls: Tensor


class CrossDecoderAttention(nn.Module):
    """Lets every position of a map and every class-side token read each other (SPEC 1.4), as a residual.

    seg (B, C, *spatial), 1 to 3 spatial axes; cls (B, F), or tokens (B, M, F). A vector is read as `tokens`
    learned offsets of itself, and receives the mean of what they read. Both residuals are scaled by a gate
    that starts at zero: put into a trained network, the module changes nothing at first.
    Masks are boolean, True takes part: seg_mask (B, *spatial), cls_mask (B, M). The normalisation of the map
    runs over all of it, masked positions included.
    Source: SPEC section 1.4 and 3; LightGlue's shared query and key, GLIP's bidirectional attention.
    """

    def __init__(
        self,
        seg_channels: int,
        cls_features: int = 256,
        heads: int = 4,
        head_dim: int = 32,
        *,
        tokens: int = 8,
    ) -> None:
        super().__init__()
        for name, value in (
            ("seg_channels", seg_channels),
            ("cls_features", cls_features),
            ("heads", heads),
            ("head_dim", head_dim),
            ("tokens", tokens),
        ):
            check_count(name, value, 1)
        inner = heads * head_dim
        self.seg_channels = seg_channels
        self.cls_features = cls_features
        self.heads = heads
        self.seg_norm = nn.GroupNorm(1, seg_channels)  # keeps the map channel-major
        self.cls_norm = nn.LayerNorm(cls_features)
        self.tokens = nn.Parameter(torch.empty(tokens, cls_features))
        nn.init.normal_(self.tokens, std=0.02)
        self.seg_in = nn.Linear(seg_channels, 2 * inner)  # the shared query and the value, at every position
        self.cls_in = nn.Linear(cls_features, 2 * inner)  # the shared key and the value
        self.seg_out = nn.Linear(inner, seg_channels)
        self.cls_out = nn.Linear(inner, cls_features)
        self.seg_gate = nn.Parameter(torch.zeros(seg_channels))
        self.cls_gate = nn.Parameter(torch.zeros(cls_features))

    def forward(
        self, seg: Tensor, cls: Tensor, *, seg_mask: Tensor | None = None, cls_mask: Tensor | None = None
    ) -> CrossDecoderAttentionOutput:
        check_map("seg", seg, self.seg_channels)
        check_features("cls", cls, seg, self.cls_features, tokens=True)
        if cls_mask is not None and cls.ndim == 2:
            raise ValueError("cls_mask: found a mask beside a single vector, needed cls as tokens (B, M, F)")
        positions = (seg.shape[0], *seg.shape[2:])
        if seg_mask is not None and seg_mask.shape != positions:  # flattened, it might seem right
            raise ValueError(f"seg_mask: found shape {tuple(seg_mask.shape)}, needed {positions} like seg")
        q, k, v_q, v_k, tokens = self._projected(seg, cls)
        read = ops.cross_attention(
            q,
            k,
            v_q,
            v_k,
            q_mask=None if seg_mask is None else seg_mask.flatten(1),
            k_mask=cls_mask,
        )
        to_seg = read.out_q.transpose(2, 3).flatten(1, 2).unflatten(2, seg.shape[2:])  # [B, h·d, *spatial]
        seg_change = pointwise(self.seg_out, to_seg.to(q.dtype))
        cls_change = self.cls_out(read.out_k.transpose(1, 2).flatten(2).to(tokens.dtype))  # [B, M, F]
        if cls.ndim == 2:
            cls_change = cls_change.mean(1)
        gate = self.seg_gate.reshape(-1, *([1] * (seg.ndim - 2)))
        return CrossDecoderAttentionOutput(
            seg + (gate * seg_change).to(seg.dtype), cls + (self.cls_gate * cls_change).to(cls.dtype)
        )

    @torch.no_grad()
    def token_attention(self, seg: Tensor, cls: Tensor) -> Tensor:
        """Where each class-side token looks: its weights over the map, mean over the heads, (B, M, *spatial).

        float32, each token's map sums to 1. Inputs as for forward without masks. For pictures: unlike
        forward it holds B·heads·M·N numbers at once.
        """
        check_map("seg", seg, self.seg_channels)
        check_features("cls", cls, seg, self.cls_features, tokens=True)
        q, k, _, _, _ = self._projected(seg, cls)
        similarity = k.float() @ q.float().transpose(2, 3) / q.shape[3] ** 0.5  # [B, h, M, N]
        return similarity.softmax(3).mean(1).reshape(seg.shape[0], -1, *seg.shape[2:])

    def _projected(self, seg: Tensor, cls: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q and v_q [B, h, N, d], k and v_k [B, h, M, d], and the class-side tokens themselves [B, M, F]."""
        tokens = cls if cls.ndim == 3 else cls[:, None] + self.tokens
        check_like_weight("seg", seg, self.seg_in.weight)
        check_like_weight("cls", tokens, self.cls_in.weight)
        dense = pointwise(self.seg_in, self.seg_norm(seg)).flatten(2)  # [B, 2·h·d, N]
        # [B, h, N, d] as a view: the map stays channel-major in memory
        q, v_q = (t.unflatten(1, (self.heads, -1)).transpose(2, 3) for t in dense.chunk(2, 1))
        k, v_k = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for t in self.cls_in(self.cls_norm(tokens)).chunk(2, 2)
        )
        return q, k, v_q, v_k, tokens
