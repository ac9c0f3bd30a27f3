"""Weights of published attention blocks give the module the published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bti_fast.errors import UserError
from bti_fast.nn.attention_weights import load_bi_multi_head_attention, load_lightglue_block
from bti_fast.nn.cross_decoder_attention import CrossDecoderAttention


class CrossBlock(nn.Module):
    """LightGlue's block as published; ``messages`` is its attention, forward adds the feed-forward part."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_qk, self.to_v, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(
            nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def messages(self, x0, x1):
        qk0, qk1, v0, v1 = (self.split(f(x)) for f in (self.to_qk, self.to_v) for x in (x0, x1))
        sim = torch.einsum("bhid,bhjd->bhij", qk0 * self.scale**0.5, qk1 * self.scale**0.5)
        m0 = torch.einsum("bhij,bhjd->bhid", sim.softmax(-1), v1)
        m1 = torch.einsum("bhji,bhjd->bhid", sim.transpose(-2, -1).softmax(-1).transpose(-2, -1), v0)
        return tuple(self.to_out(m.transpose(1, 2).flatten(-2)) for m in (m0, m1))


class BiAttentionBlock(nn.Module):
    """GLIP's block as published, around BiMultiHeadAttention ``attn``; its inputs come normalised."""

    def __init__(self, v_dim: int, l_dim: int, embed: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.v_proj, self.attn.l_proj = nn.Linear(v_dim, embed), nn.Linear(l_dim, embed)
        self.attn.values_v_proj, self.attn.values_l_proj = nn.Linear(v_dim, embed), nn.Linear(l_dim, embed)
        self.attn.out_v_proj, self.attn.out_l_proj = nn.Linear(embed, v_dim), nn.Linear(embed, l_dim)
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(v_dim), nn.LayerNorm(l_dim)
        self.gamma_v, self.gamma_l = nn.Parameter(torch.randn(v_dim)), nn.Parameter(torch.randn(l_dim))
        self.heads, self.scale = heads, (embed // heads) ** -0.5
        nn.init.normal_(self.layer_norm_l.weight)
        nn.init.normal_(self.layer_norm_l.bias)

    def shape(self, x):
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, length, -1)

    def deltas(self, v, l):  # noqa: E741
        batch = v.shape[0]
        query = self.shape(self.attn.v_proj(v) * self.scale)
        key = self.shape(self.attn.l_proj(l))
        weights = torch.bmm(query, key.transpose(1, 2))
        weights = (weights - weights.max()).clamp(min=-50000)
        turned = weights.transpose(1, 2)
        weights_l = (turned - turned.max(dim=-1, keepdim=True)[0]).clamp(min=-50000).softmax(-1)
        out_v = torch.bmm(weights.softmax(-1), self.shape(self.attn.values_l_proj(l)))
        out_l = torch.bmm(weights_l, self.shape(self.attn.values_v_proj(v)))
        join = lambda x: x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)  # noqa: E731
        return self.gamma_v * self.attn.out_v_proj(join(out_v)), self.gamma_l * self.attn.out_l_proj(
            join(out_l)
        )


def dense(seg):
    return seg.flatten(2).transpose(1, 2)


def test_a_lightglue_block():
    torch.manual_seed(0)
    block, module = CrossBlock(64, 4), CrossDecoderAttention(64, 64, heads=4, head_dim=16)
    nn.init.normal_(module.cls_norm.weight)  # whatever was there before
    weights = {f"transformers.3.cross_attn.{name}": value for name, value in block.state_dict().items()}
    weights["transformers.3.self_attn.Wqkv.weight"] = torch.zeros(1)
    load_lightglue_block(module, weights, prefix="transformers.3.cross_attn.", leave_out=["ffn"])
    seg, cls = torch.randn(2, 64, 9, 7), torch.randn(2, 5, 64)
    got = module(seg, cls)
    m0, m1 = block.messages(dense(module.seg_norm(seg)), nn.functional.layer_norm(cls, (64,)))
    torch.testing.assert_close(dense(got.seg - seg), m0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.cls - cls, m1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("naming", ("glip", "hugging face"))
def test_a_bi_multi_head_attention_block(naming):
    torch.manual_seed(1)
    block, module = BiAttentionBlock(24, 40, 64, 2), CrossDecoderAttention(24, 40, heads=2, head_dim=32)
    weights = block.state_dict()
    if naming == "hugging face":
        swap = (("values_v_", "values_vision_"), ("values_l_", "values_text_"), ("out_v_", "out_vision_"))
        swap += (("out_l_", "out_text_"), (".v_proj", ".vision_proj"), (".l_proj", ".text_proj"))
        swap += (("gamma_v", "vision_param"), ("gamma_l", "text_param"), ("norm_v.", "norm_vision."))
        swap += (("norm_l.", "norm_text."),)
        for old, new in swap:
            weights = {name.replace(old, new): value for name, value in weights.items()}
    norm = "layer_norm_v" if naming == "glip" else "layer_norm_vision"
    with pytest.raises(UserError, match=rf"no place for {norm}\.bias, {norm}\.weight"):
        load_bi_multi_head_attention(module, weights)
    load_bi_multi_head_attention(module, weights, leave_out=[norm])
    seg, cls = torch.randn(2, 24, 6, 8), torch.randn(2, 5, 40)
    got = module(seg, cls)
    delta_v, delta_l = block.deltas(dense(module.seg_norm(seg)), block.layer_norm_l(cls))
    torch.testing.assert_close(dense(got.seg - seg), delta_v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.cls - cls, delta_l, rtol=1e-4, atol=1e-5)


def test_bi_multi_head_attention_alone_opens_the_gates():
    block, module = BiAttentionBlock(24, 40, 64, 2), CrossDecoderAttention(24, 40, heads=2, head_dim=32)
    load_bi_multi_head_attention(module, block.attn.state_dict())
    assert torch.equal(module.seg_gate, torch.ones(24)) and torch.equal(module.cls_gate, torch.ones(40))
    assert torch.equal(
        module.cls_in.weight, torch.cat((block.attn.l_proj.weight, block.attn.values_l_proj.weight))
    )


def test_refusals_name_the_weight_and_change_nothing():
    module = CrossDecoderAttention(64, 64, heads=4, head_dim=16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    block = CrossBlock(64, 4).state_dict()
    with pytest.raises(UserError, match="no place for ffn.0.bias"):
        load_lightglue_block(module, block)
    missing = {name: value for name, value in block.items() if name != "to_out.weight"}
    with pytest.raises(UserError, match="to_out.weight is missing"):
        load_lightglue_block(module, missing, leave_out=["ffn"])
    with pytest.raises(UserError, match=r"to_qk.weight has shape \(32, 32\), this module needs \(64, 64\)"):
        load_lightglue_block(module, CrossBlock(32, 4).state_dict(), leave_out=["ffn"])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
