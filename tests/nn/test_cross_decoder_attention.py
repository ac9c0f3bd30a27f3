import math

import pytest
import torch

from bti_fast import ops
from bti_fast.nn import CrossDecoderAttention

SHAPES = [(2, 12, 15), (2, 12, 5, 7), (2, 12, 3, 4, 5)]


def opened(module: CrossDecoderAttention) -> CrossDecoderAttention:
    """The module with its residual gates open, as training would leave them."""
    with torch.no_grad():
        module.seg_gate.uniform_(0.5, 1)
        module.cls_gate.uniform_(0.5, 1)
    return module


def by_hand(module, seg, tokens, seg_mask=None, cls_mask=None):
    """The residual changes of map and tokens, token-major, with the similarity written out."""
    batch, channels = seg.shape[:2]
    x = module.seg_norm(seg).flatten(2).transpose(1, 2)  # [B, N, C]
    t = torch.nn.functional.layer_norm(
        tokens, tokens.shape[-1:], module.cls_norm.weight, module.cls_norm.bias
    )
    q, v_q = (x @ module.seg_in.weight.T + module.seg_in.bias).chunk(2, -1)
    k, v_k = (t @ module.cls_in.weight.T + module.cls_in.bias).chunk(2, -1)
    heads = module.heads
    dim = q.shape[-1] // heads
    seg_read, cls_read = torch.zeros_like(q), torch.zeros_like(k)
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        similarity = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(dim)  # [B, N, M]
        if seg_mask is not None:
            similarity = similarity.masked_fill(~seg_mask.flatten(1)[:, :, None], -math.inf)
        if cls_mask is not None:
            similarity = similarity.masked_fill(~cls_mask[:, None], -math.inf)
        seg_read[..., part] = similarity.softmax(2).nan_to_num() @ v_k[..., part]
        cls_read[..., part] = similarity.softmax(1).nan_to_num().transpose(1, 2) @ v_q[..., part]
    seg_change = (seg_read @ module.seg_out.weight.T + module.seg_out.bias).transpose(1, 2)
    cls_change = cls_read @ module.cls_out.weight.T + module.cls_out.bias
    return seg_change.reshape(seg.shape), cls_change


@pytest.mark.parametrize("shape", SHAPES, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_tokens_match_the_written_out_attention(shape, masked):
    torch.manual_seed(0)
    module = opened(CrossDecoderAttention(12, 10, heads=2, head_dim=16)).double()
    seg, cls = torch.randn(shape, dtype=torch.float64), torch.randn(2, 6, 10, dtype=torch.float64)
    masks = {}
    if masked:
        masks = {
            "seg_mask": torch.rand(2, *shape[2:]) > 0.3,
            "cls_mask": torch.tensor([[True] * 4 + [False] * 2, [True] * 6]),
        }
    out = module(seg, cls, **masks)
    seg_change, cls_change = by_hand(module, seg, cls, **masks)
    gate = module.seg_gate.reshape(-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(out.seg, seg + gate * seg_change)
    torch.testing.assert_close(out.cls, cls + module.cls_gate * cls_change)


def test_a_vector_is_read_as_learned_tokens_and_receives_their_mean():
    torch.manual_seed(0)
    module = opened(CrossDecoderAttention(12, 10, heads=2, head_dim=16, tokens=3)).double()
    seg, cls = torch.randn(2, 12, 5, 7, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    tokens = cls[:, None] + module.tokens
    out = module(seg, cls)
    _, cls_change = by_hand(module, seg, tokens)
    torch.testing.assert_close(out.cls, cls + module.cls_gate * cls_change.mean(1))
    torch.testing.assert_close(out.seg, module(seg, tokens).seg)


@pytest.mark.parametrize("shape", SHAPES, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("cls_shape", [(2, 10), (2, 4, 10)], ids=["vector", "tokens"])
def test_changes_nothing_at_first_and_gradient_reaches_every_parameter(shape, cls_shape):
    torch.manual_seed(0)
    module = CrossDecoderAttention(12, 10, heads=2, head_dim=16)
    seg, cls = torch.randn(shape), torch.randn(cls_shape)
    out = module(seg, cls)
    assert torch.equal(out.seg, seg) and torch.equal(out.cls, cls)
    opened(module)
    out = module(seg, cls)
    (out.seg.square().mean() + out.cls.square().mean()).backward()
    unused = {"tokens"} if len(cls_shape) == 3 else set()
    silent = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == unused


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_the_dense_side_reaches_the_operator_as_a_view(monkeypatch, memory_format):
    """Query and value share one storage with the projection of the map: no copy into another layout."""
    seen = {}
    attention = ops.cross_attention

    def spy(q, k, v_q, v_k, **masks):
        seen.update(q=q, v_q=v_q)
        return attention(q, k, v_q, v_k, **masks)

    monkeypatch.setattr(ops, "cross_attention", spy)
    module = CrossDecoderAttention(12, 10, heads=2, head_dim=16)
    module(torch.randn(2, 12, 5, 7).to(memory_format=memory_format), torch.randn(2, 10))
    q, v_q = seen["q"], seen["v_q"]
    assert q.shape == (2, 2, 35, 16)
    assert q.untyped_storage().data_ptr() == v_q.untyped_storage().data_ptr()
    assert q.untyped_storage().nbytes() == 2 * 64 * 35 * 4  # the projection alone


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((2, 11, 5), (2, 10)), ValueError, "seg: found shape"),
        (((2, 12, 5), (2, 9)), ValueError, r"cls: found shape \(2, 9\), needed \(2, 10\) or \(2, M, 10\)"),
        (((2, 12, 5), (3, 10)), ValueError, "cls: found shape"),
    ],
)
def test_wrong_shapes_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        CrossDecoderAttention(12, 10, heads=2, head_dim=16)(*(torch.zeros(s) for s in arguments))


def test_a_mask_beside_a_vector_is_refused():
    with pytest.raises(ValueError, match="cls_mask"):
        CrossDecoderAttention(12, 10, heads=2, head_dim=16)(
            torch.zeros(2, 12, 5), torch.zeros(2, 10), cls_mask=torch.ones(2, 8, dtype=torch.bool)
        )


def test_a_mask_of_the_map_turned_is_refused():
    module = CrossDecoderAttention(12, 10)
    turned = torch.ones(2, 7, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"seg_mask: found shape \(2, 7, 5\), needed \(2, 5, 7\) like seg"):
        module(torch.zeros(2, 12, 5, 7), torch.zeros(2, 3, 10), seg_mask=turned)


@pytest.mark.parametrize("shape", SHAPES, ids=["1d", "2d", "3d"])
def test_an_empty_batch_gives_an_empty_result(shape):
    module = CrossDecoderAttention(12, 10, heads=2, head_dim=16)
    seg, cls = torch.zeros(0, *shape[1:], requires_grad=True), torch.zeros(0, 10)
    out = module(seg, cls)
    out.seg.sum().backward()
    assert out.seg.shape == seg.shape == seg.grad.shape and out.cls.shape == (0, 10)


@pytest.mark.parametrize("shape", SHAPES, ids=["1d", "2d", "3d"])
def test_token_attention_is_the_column_softmax_that_the_operator_applies(shape):
    torch.manual_seed(2)
    module = CrossDecoderAttention(12, 10, heads=1, head_dim=16, tokens=3).double()
    seg, cls = torch.randn(shape, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    looked = module.token_attention(seg, cls)  # [B, M, *spatial]
    assert looked.shape == (2, 3, *shape[2:]) and looked.dtype == torch.float32
    with torch.no_grad():  # one-hot values make the operator's output the weights themselves
        q, k, v_q, v_k, _ = module._projected(seg, cls)
        for position in range(0, v_q.shape[2], 7):
            one_hot = torch.zeros_like(v_q)
            one_hot[:, :, position] = 1
            read = ops.cross_attention(q, k, one_hot, v_k).out_k[:, 0, :, 0]  # [B, M]
            torch.testing.assert_close(looked.flatten(2)[..., position].double(), read, rtol=1e-5, atol=1e-7)
