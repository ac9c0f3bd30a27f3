import pytest
import torch

from bti_fast import ops
from bti_fast.nn import TaskInteraction, UncertaintyProxyAttention
from bti_fast.nn.task_interaction import operator_weights, scene_complexity

from .golden import Golden, keras_layers, relative_error

FORWARD, WEIGHTS = 1e-5, 1e-4
SIZES = {"tim_upa_c48_28x28": (48, 256), "tim_upa_c384_14x14": (384, 256), "tim_upa_c20_9x13": (20, 72)}


def load(shared_dir, name, channels, features):
    golden = Golden(shared_dir / "golden" / f"{name}.npz")
    tim, upa = (
        TaskInteraction(channels, features).eval(),
        UncertaintyProxyAttention(channels, features).eval(),
    )
    layers = {f"tim.{k}": v for k, v in keras_layers(tim).items()}
    layers |= {f"upa.{k}": v for k, v in keras_layers(upa).items()}
    golden.fill({k: v for k, v in layers.items() if any(a.startswith(f"w.{k}.") for a in golden.arrays)})
    return golden, tim, upa, layers


def compose(tim, upa, seg, cls, *, fused):
    """TIM then UPA, in plain PyTorch or by the operator: seg', cls', gates, signals."""
    if fused:
        return ops.task_interaction(
            seg, cls, operator_weights(tim, upa), tau=tim.tau, training=tim.s2c_bn.training
        )
    enhanced = tim(seg, cls)
    return upa(seg, enhanced.seg, cls, enhanced.cls)


@pytest.mark.parametrize("name", SIZES)
def test_parts_match_the_published_code(shared_dir, name):
    golden, tim, upa, _ = load(shared_dir, name, *SIZES[name])
    cot_seg, cot_cls = golden.tensor("cot_seg"), golden.tensor("cot_clf")
    seg, cls = golden.leaf("in_seg"), golden.leaf("in_clf")
    out = tim(seg, cls)
    ((out.seg * cot_seg).sum() + (out.cls * cot_cls).sum()).backward()
    assert relative_error(out.seg, golden.tensor("tim_out_seg")) <= FORWARD
    assert relative_error(out.cls, golden.tensor("tim_out_clf")) <= FORWARD
    assert relative_error(seg.grad, golden.tensor("tim_grad_seg")) <= FORWARD
    assert relative_error(cls.grad, golden.tensor("tim_grad_clf")) <= FORWARD

    inputs = [golden.leaf(k) for k in ("in_seg", "tim_out_seg", "in_clf", "tim_out_clf")]
    out = upa(*inputs)
    ((out.seg * cot_seg).sum() + (out.cls * cot_cls).sum()).backward()
    assert relative_error(out.seg, golden.tensor("upa_out_seg")) <= FORWARD
    assert relative_error(out.cls, golden.tensor("upa_out_clf")) <= FORWARD
    truth = torch.stack((golden.tensor("upa_w_seg"), golden.tensor("upa_w_clf")), 1)
    assert relative_error(out.gates, truth) <= FORWARD
    for i, key in enumerate(("align", "seg_energy", "clf_energy")):
        assert relative_error(out.signals[:, i : i + 1], golden.tensor(f"upa_signal_{key}")) <= FORWARD
    for x, key in zip(inputs, ("seg_base", "seg_enh", "clf_base", "clf_enh"), strict=True):
        assert relative_error(x.grad, golden.tensor(f"upa_grad_{key}")) <= FORWARD, key


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "operator"])
@pytest.mark.parametrize("name", SIZES)
def test_composition_matches_the_published_code(shared_dir, name, fused):
    golden, tim, upa, layers = load(shared_dir, name, *SIZES[name])
    seg, cls = golden.leaf("in_seg"), golden.leaf("in_clf")
    seg_out, cls_out, *_ = compose(tim, upa, seg, cls, fused=fused)
    ((seg_out * golden.tensor("cot_seg")).sum() + (cls_out * golden.tensor("cot_clf")).sum()).backward()
    assert relative_error(seg_out, golden.tensor("upa_out_seg")) <= FORWARD
    assert relative_error(cls_out, golden.tensor("upa_out_clf")) <= FORWARD
    assert relative_error(seg.grad, golden.tensor("comp_grad_seg")) <= FORWARD
    assert relative_error(cls.grad, golden.tensor("comp_grad_clf")) <= FORWARD
    errors = golden.weight_gradient_errors(layers, "comp_grad_w")
    assert set(errors) == golden.weight_gradients("comp_grad_w")
    assert max(errors.values()) <= WEIGHTS, max(errors, key=errors.get)


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "operator"])
def test_training_mode_matches_the_published_code(shared_dir, fused):
    golden, tim, upa, layers = load(shared_dir, "tim_upa_c20_9x13", 20, 72)
    mean, var = tim.s2c_bn.running_mean.clone(), tim.s2c_bn.running_var.clone()
    tim.train()
    seg, cls = golden.leaf("in_seg"), golden.leaf("in_clf")
    seg_out, cls_out, *_ = compose(tim, upa, seg, cls, fused=fused)
    ((seg_out * golden.tensor("cot_seg")).sum() + (cls_out * golden.tensor("cot_clf")).sum()).backward()
    assert relative_error(seg_out, golden.tensor("train_upa_out_seg")) <= FORWARD
    assert relative_error(cls_out, golden.tensor("train_upa_out_clf")) <= FORWARD
    assert relative_error(seg.grad, golden.tensor("train_comp_grad_seg")) <= FORWARD
    assert relative_error(cls.grad, golden.tensor("train_comp_grad_clf")) <= FORWARD
    errors = golden.weight_gradient_errors(layers, "train_comp_grad_w")
    assert set(errors) == golden.weight_gradients("train_comp_grad_w")
    assert max(errors.values()) <= WEIGHTS, max(errors, key=errors.get)
    assert relative_error(tim.s2c_bn.running_mean, golden.tensor("train_bn_mean_after")) <= FORWARD
    # Keras keeps the biased batch variance here, torch the unbiased one: 5/4 of it for a batch of 5
    biased = (golden.tensor("train_bn_var_after") - 0.99 * var) / 0.01
    assert relative_error(tim.s2c_bn.running_var, 0.99 * var + 0.01 * 1.25 * biased) <= FORWARD
    assert not torch.equal(tim.s2c_bn.running_mean, mean)


def test_fewer_than_eight_rows_count_as_no_complexity(shared_dir):
    golden = Golden(shared_dir / "golden" / "upa_c48_7x7_Hlt8.npz")
    upa = UncertaintyProxyAttention(48, 256)
    golden.fill({f"upa.{k}": v for k, v in keras_layers(upa).items()})
    names = ("seg_base", "seg_enh", "clf_base", "clf_enh")
    inputs = [golden.leaf(f"in_{k}") for k in names]
    out = upa(*inputs)
    ((out.seg * golden.tensor("cot_seg")).sum() + (out.cls * golden.tensor("cot_clf")).sum()).backward()
    assert torch.equal(out.signals[:, 1], torch.zeros(3))
    assert relative_error(out.seg, golden.tensor("fixed_out_seg")) <= FORWARD
    assert relative_error(out.cls, golden.tensor("fixed_out_clf")) <= FORWARD
    truth = torch.stack((golden.tensor("fixed_w_seg"), golden.tensor("fixed_w_clf")), 1)
    assert relative_error(out.gates, truth) <= FORWARD
    for x, key in zip(inputs, names, strict=True):
        assert relative_error(x.grad, golden.tensor(f"fixed_grad_{key}")) <= FORWARD, key


def test_zero_residual_has_zero_alignment_and_finite_gradients(shared_dir):
    golden = Golden(shared_dir / "golden" / "upa_degenerate_zero_residual.npz")
    upa = UncertaintyProxyAttention(16, 32)
    golden.fill({f"upa.{k}": v for k, v in keras_layers(upa).items()})
    inputs = [golden.leaf(k) for k in ("in_seg", "in_seg", "in_clf", "in_clf")]
    out = upa(*inputs)
    ((out.seg * golden.tensor("cot_seg")).sum() + (out.cls * golden.tensor("cot_clf")).sum()).backward()
    assert torch.equal(out.signals[:, :1], golden.tensor("align"))
    assert relative_error(out.seg, golden.tensor("out_seg")) <= FORWARD
    assert relative_error(out.cls, golden.tensor("out_clf")) <= FORWARD
    for x, key in zip(inputs, ("seg_base", "seg_enh", "clf_base", "clf_enh"), strict=True):
        truth = golden.tensor(f"grad_{key}")
        assert (x.grad - truth).abs().max() <= 1e-5 * max(truth.abs().max(), 1e-3), key


def test_scene_complexity_of_a_checkerboard_and_of_a_ramp():
    rows, cols = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    checkerboard = ((rows + cols) % 2).float()[None, None]
    # every forward difference is 1: 7·10 along rows and 8·9 along columns, of 80 positions
    assert scene_complexity(checkerboard).item() == pytest.approx((70 + 72) / 80)
    ramp = torch.arange(9.0)[None, None]
    assert scene_complexity(ramp).item() == pytest.approx(8 / 9)
    assert scene_complexity(ramp[..., :7]).item() == 0
    assert scene_complexity(torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(1, 2, 9, 7, 3)).item() == 0


@pytest.mark.parametrize("shape", [(3, 6, 17), (3, 6, 9, 8), (3, 6, 4, 9, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_operator_equals_the_parts_at_every_rank(shape, training):
    torch.manual_seed(0)
    tim, upa = TaskInteraction(6, 10).double().train(training), UncertaintyProxyAttention(6, 10).double()
    seg, cls = torch.randn(shape, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    for found, truth in zip(
        compose(tim, upa, seg, cls, fused=True), compose(tim, upa, seg, cls, fused=False), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("seg", "cls", "error", "message"),
    [
        (
            torch.zeros(2, 5, 8, 8),
            torch.zeros(2, 4),
            ValueError,
            r"seg: found shape \(2, 5, 8, 8\), needed \(B, 6",
        ),
        (torch.zeros(2, 6), torch.zeros(2, 4), ValueError, r"seg: found shape \(2, 6\)"),
        (
            torch.zeros(2, 6, 8, 8),
            torch.zeros(3, 4),
            ValueError,
            r"cls: found shape \(3, 4\), needed \(2, 4\)",
        ),
        (torch.zeros(2, 6, 8, 8, dtype=torch.int32), torch.zeros(2, 4), TypeError, "seg: found torch.int32"),
        (torch.zeros(2, 6, 8, 8), [0.0], TypeError, "cls: found list"),
    ],
)
def test_wrong_arguments_are_refused_by_name(seg, cls, error, message):
    with pytest.raises(error, match=message):
        TaskInteraction(6, 4)(seg, cls)
