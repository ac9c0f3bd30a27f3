"""The diagnosis loss from logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bti_fast.losses import auxiliary_loss, class_balanced_weights, classification_loss


def batch():
    logits = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.requires_grad_(), torch.tensor([0, 3, 1, 2, 2, 0])


def test_gamma_zero_is_cross_entropy():
    logits, label = batch()
    torch.testing.assert_close(classification_loss(logits, label, gamma=0.0), F.cross_entropy(logits, label))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_definition_and_gradient(gamma):
    logits, label = batch()
    p = logits.softmax(1)[torch.arange(6), label]
    torch.testing.assert_close(
        classification_loss(logits, label, gamma=gamma), (-((1 - p) ** gamma) * p.log()).mean()
    )
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, label, gamma=gamma), logits)


def test_hand_computed_value():
    # Two equal logits: p = 1/2, (1/2)^2 · log 2.
    assert float(classification_loss(torch.zeros(1, 2), torch.tensor([1]))) == pytest.approx(math.log(2) / 4)


def test_mixed_batch_equals_its_labelled_part():
    logits, label = batch()
    has = torch.tensor([True, False, True, True, False, True])
    label[~has] = -1
    with torch.no_grad():
        logits[1] = math.nan
    value = classification_loss(logits, label, has)
    (grad,) = torch.autograd.grad(value, logits)
    part = logits[has].detach().requires_grad_()
    truth = classification_loss(part, label[has])
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(grad[has], torch.autograd.grad(truth, part)[0])
    assert (grad[~has] == 0).all()


def test_no_label_at_all_is_exactly_zero_with_zero_gradient():
    logits, _ = batch()
    value = classification_loss(logits, torch.full((6,), -1), torch.zeros(6, dtype=torch.bool))
    assert value == 0 and (torch.autograd.grad(value, logits)[0] == 0).all()


def test_confident_mistake_keeps_its_gradient():
    logits = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    value = classification_loss(logits, torch.tensor([1]))
    assert value.item() == pytest.approx(1e4)
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], torch.tensor([[1.0, -1.0, 0.0]]))


def test_confident_hit_is_zero_with_finite_gradient():
    for gamma in (0.5, 2.0):
        logits = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
        value = classification_loss(logits, torch.tensor([0]), gamma=gamma)
        assert value.item() == 0 and torch.autograd.grad(value, logits)[0].isfinite().all()


def test_computed_in_fp32_under_autocast():
    logits, label = batch()
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = classification_loss(half, label)
    assert value.dtype == torch.float32 and float(value) == float(classification_loss(half.float(), label))


def test_no_graph_break():
    logits, label = batch()
    compiled = torch.compile(classification_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, label), classification_loss(logits, label))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": torch.tensor([0, 3, 1, 4, 2, 0])}, r"label: got 4, needs 0..3"),
        ({"label": torch.tensor([0, -1, 1, 2, 2, 0])}, r"label: got -1, needs 0..3"),
        ({"label": torch.zeros(6)}, "label: got torch.float32"),
        ({"label": torch.zeros(5, dtype=torch.long)}, r"label: .*\(5,\)"),
        ({"logits": torch.zeros(6, 1)}, "logits: got"),
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"has_label": torch.ones(6, dtype=torch.long)}, "has_label: got torch.int64"),
    ],
)
def test_errors_name_the_argument(change, message):
    logits, label = batch()
    with pytest.raises(ValueError, match=message):
        classification_loss(**{"logits": logits, "label": label, **change})


def test_class_balanced_weights_by_hand():
    # (1 - 0.5) / (1 - 0.5^n) for n = 1, 2, 3: 1, 2/3, 4/7; mean over the six cases (1 + 4/3 + 12/7) / 6.
    weights = torch.tensor([1, 2 / 3, 4 / 7], dtype=torch.float64)
    weights = weights / ((1 + 4 / 3 + 12 / 7) / 6)
    torch.testing.assert_close(class_balanced_weights([1, 2, 3], 0.5), weights.float())
    assert class_balanced_weights([5, 1, 9], 0.0).tolist() == [1.0, 1.0, 1.0]
    by_count = class_balanced_weights([10, 40], 1 - 1e-12)
    torch.testing.assert_close(by_count, torch.tensor([2.5, 0.625]))  # N / (L n)
    found = class_balanced_weights([30, 0, 10], 0.99)
    assert found[1] == 0 and float((found * torch.tensor([30.0, 0, 10])).sum()) == pytest.approx(40)


@pytest.mark.parametrize(
    ("counts", "beta", "message"),
    [([1, 2], 1.0, "beta: got 1.0"), ([0, 0], 0.9, "counts: got"), ([1, -1], 0.9, "counts: got")],
)
def test_class_balanced_weights_refuse(counts, beta, message):
    with pytest.raises(ValueError, match=message):
        class_balanced_weights(counts, beta)


def test_class_weights_multiply_each_sample():
    logits, label = batch()
    has = torch.tensor([True, True, False, True, True, True])
    weights = torch.tensor([2.0, 0.5, 1.0, 0.0])
    alone = [classification_loss(logits[i : i + 1], label[i : i + 1]) * weights[label[i]] for i in range(6)]
    truth = sum(loss for loss, h in zip(alone, has, strict=True) if h) / 5
    torch.testing.assert_close(classification_loss(logits, label, has, class_weights=weights), truth)
    auxiliary = auxiliary_loss(
        (), (logits,), torch.zeros(6, 1, 2, 2), label, None, has, class_weights=weights
    )
    torch.testing.assert_close(auxiliary, 0.1 * truth)
    with pytest.raises(ValueError, match=r"class_weights: got shape \(3,\), needs \(4,\)"):
        classification_loss(logits, label, class_weights=weights[:3])


def test_what_is_no_tensor_is_named():
    logits = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="label: got NoneType, needs a torch.Tensor"):
        classification_loss(logits, None)
    with pytest.raises(TypeError, match="class_weights: got list"):
        classification_loss(logits, torch.tensor([0, 1]), class_weights=[1.0, 1.0, 1.0])
