import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bti_fast.nn import FixedInteraction, GatedInteraction

SHAPES = {"1d": (3, 6, 17), "2d": (3, 6, 9, 8), "3d": (3, 6, 3, 9, 5)}
KINDS = {
    "proxy": {"uncertainty": "proxy"},
    "entropy": {"uncertainty": "entropy", "cls_classes": 4},
    "proxy+attention": {"uncertainty": "proxy", "attention_heads": 2},
    "entropy+attention": {"uncertainty": "entropy", "cls_classes": 4, "attention_heads": 2},
}


def build(kind: str, seg_classes: int = 1) -> GatedInteraction:
    torch.manual_seed(0)
    module = GatedInteraction(6, 10, seg_classes=seg_classes, **KINDS[kind])
    if module.attention is not None:
        with torch.no_grad():
            module.attention.seg_gate.uniform_(0.5, 1)
            module.attention.cls_gate.uniform_(0.5, 1)
    return module


def inputs(shape, **kwargs):
    torch.manual_seed(1)
    return torch.randn(shape, **kwargs), torch.randn(shape[0], 10, **kwargs)


def bernoulli_entropy(a):
    p = a.sigmoid()
    return -(p * p.log() + (1 - p) * (1 - p).log()) / math.log(2)


def categorical_entropy(a):
    p = a.softmax(1)
    return -(p * p.log()).sum(1) / math.log(a.shape[1])


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("seg_classes", [1, 3])
def test_entropy_equals_the_formula_of_the_specification(rank, seg_classes):
    module = build("entropy", seg_classes).double()
    with torch.no_grad():
        module.exchange.raw_alpha.copy_(torch.tensor([0.3, -0.4]))
        module.exchange.beta.copy_(torch.tensor([-0.7, 0.9]))
        module.exchange.gamma.copy_(torch.tensor([0.2, -0.1]))
    x, y = inputs(SHAPES[rank], dtype=torch.float64)
    seg_logits = torch.randn(3, seg_classes, *x.shape[2:], dtype=torch.float64)
    cls_logits = torch.randn(3, 4, dtype=torch.float64)
    out = module(x, y, seg_logits, cls_logits)

    linear = torch.nn.functional.linear
    e = module.exchange
    alpha, alpha_c = e.raw_alpha.exp().log1p()
    u = bernoulli_entropy(seg_logits[:, 0]) if seg_classes == 1 else categorical_entropy(seg_logits)
    u_c = categorical_entropy(cls_logits)
    each = (3, *[1] * (x.ndim - 2))
    r = torch.sigmoid(alpha * u + e.beta[0] * (1 - u_c).reshape(each) + e.gamma[0])
    prior = linear(y, e.prior.weight, e.prior.bias).sigmoid()
    omega = 1 - u + 1e-3
    axes = tuple(range(2, x.ndim))
    pooled = (omega[:, None] * x).sum(axes) / omega.flatten(1).sum(1)[:, None]
    ctx = linear(pooled, e.context.weight, e.context.bias).clamp_min(0)
    r_c = torch.sigmoid(alpha_c * u_c + e.beta[1] * (1 - u.flatten(1).mean(1)) + e.gamma[1])
    gate = linear(ctx, e.context_gate.weight, e.context_gate.bias).sigmoid()

    torch.testing.assert_close(out.seg, x * (1 + 0.7 * r[:, None] * prior.reshape(3, 6, *each[1:])))
    torch.testing.assert_close(out.cls, y + r_c[:, None] * gate * ctx)
    torch.testing.assert_close(out.gates, torch.stack((r.flatten(1).mean(1), r_c), 1))
    torch.testing.assert_close(out.uncertainty, u)
    assert out.seg_logits is None and out.cls_logits is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", SHAPES)
def test_shapes_and_gradient_to_every_parameter(kind, rank):
    module = build(kind)
    x, y = inputs(SHAPES[rank])
    x.requires_grad_(True)
    y.requires_grad_(True)
    out = module(x, y)
    entropy = kind.startswith("entropy")
    assert out.seg.shape == x.shape and out.cls.shape == y.shape and out.gates.shape == (3, 2)
    assert out.uncertainty.shape == ((3, *x.shape[2:]) if entropy else (3, 3))
    assert (out.seg_logits is not None) == (out.cls_logits is not None) == entropy
    assert bool(((out.gates >= 0) & (out.gates <= 1)).all())
    (out.seg.square().mean() + out.cls.square().mean()).backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x.grad.any() and y.grad.any()


@pytest.mark.parametrize("kind", ["proxy+attention", "entropy+attention"])
def test_tokens_come_back_as_tokens(kind):
    module = build(kind)
    x, _ = inputs(SHAPES["2d"])
    tokens = torch.randn(3, 5, 10)
    out = module(x, tokens)
    assert out.cls.shape == tokens.shape
    attended = module.attention(x, tokens)
    added = out.cls - attended.cls
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-5)
    module.attention = None  # the fusion alone, on the attended map and the mean token
    fused = module(attended.seg, attended.cls.mean(1))
    torch.testing.assert_close(out.seg, fused.seg)
    torch.testing.assert_close(out.cls.mean(1), fused.cls)


@settings(max_examples=40, deadline=None)
@given(
    parameters=st.lists(st.floats(-4, 4), min_size=6, max_size=6),
    shrink=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_more_uncertainty_never_lets_less_through(parameters, shrink, seed):
    torch.manual_seed(seed)
    module = GatedInteraction(4, 6, uncertainty="entropy", cls_classes=3).double()
    with torch.no_grad():
        values = torch.tensor(parameters, dtype=torch.float64)
        module.exchange.raw_alpha.copy_(values[:2])
        module.exchange.beta.copy_(values[2:4])
        module.exchange.gamma.copy_(values[4:])
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64) + 0.1
    y = torch.randn(2, 6, dtype=torch.float64)
    a, c = 3 * torch.randn(2, 1, 5, 5, dtype=torch.float64), 3 * torch.randn(2, 3, dtype=torch.float64)
    sure = module(x, y, a, c)
    unsure_mask = module(x, y, shrink * a, c)  # logits nearer to zero: entropy no lower anywhere
    slack = 1e-12
    assert bool((unsure_mask.uncertainty >= sure.uncertainty - slack).all())
    assert bool((unsure_mask.gates[:, 0] >= sure.gates[:, 0] - slack).all())
    assert bool((unsure_mask.seg / x >= sure.seg / x - slack).all())
    unsure_class = module(x, y, a, shrink * c)
    assert bool((unsure_class.gates[:, 1] >= sure.gates[:, 1] - slack).all())
    assert bool(((unsure_class.cls - y) >= (sure.cls - y) - slack).all())  # ctx and its gate are not negative


def test_fixed_is_the_proxy_with_open_gates():
    fixed = FixedInteraction(6, 10).double().eval()
    proxy = build("proxy").double().eval()
    proxy.tim.load_state_dict(fixed.tim.state_dict())
    with torch.no_grad():
        proxy.upa.wn_fc2.weight.zero_()
        proxy.upa.wn_fc2.bias.fill_(60)  # sigmoid gives 1
    x, y = inputs(SHAPES["2d"], dtype=torch.float64)
    found, truth = fixed(x, y), proxy(x, y)
    torch.testing.assert_close(found.seg, truth.seg)
    torch.testing.assert_close(found.cls, truth.cls)
    assert torch.equal(found.gates, torch.ones(3, 2))
    assert found.uncertainty is None


@pytest.mark.parametrize("momentum", [0.1, None], ids=["0.1", "cumulative"])
def test_running_statistics_move_as_those_of_the_layers(momentum):
    torch.manual_seed(3)
    module = GatedInteraction(6, 10).train()
    module.tim.s2c_bn.momentum = momentum
    layers = copy.deepcopy(module)
    for _ in range(3):
        seg, cls = torch.randn(4, 6, 9, 8), torch.randn(4, 10)
        out, plain = module(seg, cls), layers.tim(seg, cls)
        torch.testing.assert_close(out.gates, layers.upa(seg, plain.seg, cls, plain.cls).gates)
    for name, value in layers.tim.s2c_bn.named_buffers():
        torch.testing.assert_close(module.tim.s2c_bn.get_buffer(name), value, msg=name)
    assert module.tim.s2c_bn.num_batches_tracked == 3


def test_frozen_batch_statistics_stay_frozen():
    module = build("proxy").train()
    x, y = inputs(SHAPES["2d"])
    before = module.tim.s2c_bn.running_mean.clone()
    module.tim.s2c_bn.eval()
    module(x, y)
    assert torch.equal(module.tim.s2c_bn.running_mean, before)
    module.train()(x, y)
    assert not torch.equal(module.tim.s2c_bn.running_mean, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_carry_everything(kind):
    module = build(kind).eval()
    x, y = inputs(SHAPES["2d"])
    clone = copy.deepcopy(module)
    fresh = GatedInteraction(6, 10, **KINDS[kind]).eval()
    fresh.load_state_dict(module.state_dict())
    truth = module(x, y)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for other in (clone, fresh):
        for found, needed in zip(other(x, y), truth, strict=True):
            assert (found is None and needed is None) or torch.equal(found, needed)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_stays_near_full_precision(kind):
    module = build(kind).eval()
    x, y = inputs(SHAPES["2d"])
    truth = module(x, y)
    x.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x.bfloat16(), y.bfloat16())
        loss = out.seg.float().square().mean() + out.cls.float().square().mean()
    loss.backward()
    assert out.seg.dtype == torch.bfloat16
    for found, needed in zip(out, truth, strict=True):
        if needed is not None:
            torch.testing.assert_close(found.float(), needed.float(), rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind, training):
    module = build(kind).train(training)
    x, y = inputs(SHAPES["2d"])
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, eager):
        seg, cls = x.clone().requires_grad_(True), y.clone().requires_grad_(True)
        out = run(seg, cls)
        (out.seg.square().sum() + out.cls.square().sum()).backward()
        gradients.append((out.seg.detach(), out.cls.detach(), seg.grad, cls.grad))
    for found, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    for found, truth in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (
            "proxy",
            (torch.zeros(2, 5, 8, 8), torch.zeros(2, 10)),
            ValueError,
            r"seg: found shape \(2, 5, 8, 8\)",
        ),
        ("proxy", (torch.zeros(2, 6, 8, 8), torch.zeros(2, 3, 10)), ValueError, "cls: found shape"),
        ("proxy", (torch.zeros(2, 6, 8, 8).long(), torch.zeros(2, 10)), TypeError, "seg: found torch.int64"),
        (
            "entropy",
            (torch.zeros(2, 6, 8, 8), torch.zeros(2, 10), torch.zeros(2, 1, 8, 9)),
            ValueError,
            r"seg_logits: found shape \(2, 1, 8, 9\), needed \(2, 1, 8, 8\)",
        ),
        (
            "entropy",
            (torch.zeros(2, 6, 8, 8), torch.zeros(2, 10), None, torch.zeros(2, 5)),
            ValueError,
            r"cls_logits: found shape \(2, 5\), needed \(2, 4\)",
        ),
        (
            "entropy",
            (torch.zeros(2, 6, 8, 8).bfloat16(), torch.zeros(2, 10)),
            TypeError,
            "seg: found torch.bfloat16, needed torch.float32 like the parameters",
        ),
        (
            "entropy",
            (torch.zeros(2, 6, 8, 8), torch.zeros(2, 10).double()),
            TypeError,
            "cls: found torch.float64, needed torch.float32",
        ),
        (
            "proxy+attention",
            (torch.zeros(2, 6, 8, 8).half(), torch.zeros(2, 10)),
            TypeError,
            "seg: found torch.float16, needed torch.float32",
        ),
        (
            "entropy",
            (torch.zeros(2, 6, 8, 8, device="meta"), torch.zeros(2, 10, device="meta")),
            ValueError,
            "cls: found device meta, needed cpu like the parameters",
        ),
        (
            "proxy",
            (torch.zeros(2, 6, 8, 8).to_sparse(), torch.zeros(2, 10)),
            TypeError,
            "seg: found .*sparse",
        ),
        (
            "proxy+attention",
            (torch.zeros(2, 6, 8, 8), torch.zeros(2, 0, 10)),
            ValueError,
            "cls: found no token",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        build(kind)(*arguments)


def test_entropy_without_class_logits_needs_to_know_the_classes():
    module = GatedInteraction(6, 10, uncertainty="entropy")
    x, y = inputs(SHAPES["2d"])
    with pytest.raises(ValueError, match="cls_logits: found None"):
        module(x, y)
    with pytest.raises(TypeError, match="cls_logits: found list, needed a torch.Tensor"):
        module(x, y, cls_logits=[[0.0] * 7] * 3)
    with pytest.raises(ValueError, match=r"cls_logits: found shape \(3, 0\), needed \(3, L\)"):
        module(x, y, cls_logits=torch.zeros(3, 0))
    out = module(x, y, cls_logits=torch.zeros(3, 7))
    assert out.seg_logits is not None and out.cls_logits is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertainty": "dropout"}, "uncertainty: found 'dropout'"),
        ({"attention_heads": -1}, "attention_heads: found -1, needed at least 0"),
        ({"attention_heads": True}, "attention_heads: found True, needed an integer"),
        ({"seg_channels": 6.0}, "seg_channels: found 6.0, needed an integer of at least 1"),
        ({"cls_features": 0}, "cls_features: found 0, needed at least 1"),
        ({"uncertainty": "entropy", "seg_classes": 0}, "seg_classes: found 0"),
        ({"uncertainty": "entropy", "cls_classes": 0}, "cls_classes: found 0"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GatedInteraction(**{"seg_channels": 6, "cls_features": 10, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device_tells_every_shape(kind):
    x, y = inputs(SHAPES["2d"])
    with torch.device("meta"):
        shapes = build(kind)(x.to("meta"), y.to("meta"))
    for found, truth in zip(shapes, build(kind)(x, y), strict=True):
        assert (found is None) == (truth is None)
        assert found is None or (found.shape, found.dtype) == (truth.shape, truth.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_module_is_saved_and_loaded_for_other_sizes(kind, tmp_path):
    module = build(kind).eval()
    auto = torch.export.Dim.AUTO
    sizes = {"seg": {0: auto, 2: auto, 3: auto}, "cls": {0: auto}}
    program = torch.export.export(module, inputs(SHAPES["2d"]), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "exchange.pt2")
    loaded = torch.export.load(tmp_path / "exchange.pt2").module()
    x, y = inputs((4, 6, 12, 11))
    found, truth = loaded(x, y), module(x, y)
    assert type(found) is type(truth)
    for one, two in zip(found, truth, strict=True):
        assert (one is None and two is None) or torch.allclose(one, two, rtol=1e-4, atol=1e-5)
