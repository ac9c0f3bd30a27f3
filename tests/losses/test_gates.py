"""Gate loss, auxiliary loss and the schedule of the loss weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

from bti_fast.losses import (
    auxiliary_loss,
    classification_loss,
    gate_loss,
    loss_weights,
    minmax_scale,
    rank_scale,
    segmentation_loss,
    soft_iou,
)
from bti_fast.losses.gates import gate_targets


def batch(count: int = 6, classes: int = 1):
    generator = torch.Generator().manual_seed(count)
    mask = (torch.rand(count, 1, 12, 10, generator=generator) > 0.5).double()
    seg = torch.randn(count, classes, 12, 10, generator=generator, dtype=torch.float64)
    cls = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    gates = [
        torch.rand(count, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)
    ]
    return gates, seg, mask, cls


def test_rank_scale_agrees_with_scipy_and_shares_ties():
    for values in (
        [0.3, 0.9, 0.1, 0.5],
        [0.2, 0.7, 0.7, 0.1, 0.7],
        [0.4, 0.4],
        torch.rand(50).round(decimals=1),
    ):
        values = torch.as_tensor(values, dtype=torch.float64)
        truth = (rankdata(values.numpy()) - 1) / (len(values) - 1)
        torch.testing.assert_close(rank_scale(values), torch.from_numpy(truth))


def test_rank_scale_of_one_is_the_difficulty_itself():
    assert rank_scale(torch.tensor([0.37])).tolist() == pytest.approx([0.37])
    has = torch.tensor([False, True, False])
    assert rank_scale(torch.tensor([0.9, 0.37, 0.1]), has).tolist() == pytest.approx([0, 0.37, 0])


def test_minmax_of_one_opens_the_gate():
    assert minmax_scale(torch.tensor([0.1])).tolist() == pytest.approx([1 - 1e-6])
    assert minmax_scale(torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.bool)).tolist() == [0, 0]


@pytest.mark.parametrize("scaling", ["rank", "minmax"])
def test_targets_lie_in_0_1_and_leave_missing_samples_out(scaling):
    _, seg, mask, cls = batch()
    has_mask = torch.tensor([True, False, True, True, True, False])
    has_label = torch.tensor([True, True, False, False, True, False])
    full = gate_targets(seg, mask, cls, has_mask, has_label, scaling=scaling)
    assert all(((t >= 0) & (t <= 1)).all() for t in full)
    part, _ = gate_targets(seg[has_mask], mask[has_mask], cls[has_mask], scaling=scaling)
    torch.testing.assert_close(full[0][has_mask], part)
    _, part = gate_targets(seg[has_label], mask[has_label], cls[has_label], scaling=scaling)
    torch.testing.assert_close(full[1][has_label], part)


def test_harder_samples_get_higher_targets():
    _, seg, mask, cls = batch()
    seg_target, cls_target = gate_targets(seg, mask, cls)
    iou = soft_iou(seg.sigmoid(), mask)[:, 0]
    assert torch.equal(seg_target.argsort(), iou.argsort(descending=True))
    assert torch.equal(cls_target.argsort(), cls.softmax(1).amax(1).argsort(descending=True))


def test_iou_of_several_classes_counts_those_present():
    logits = torch.zeros(1, 3, 4, 4)
    index = torch.zeros(1, 1, 4, 4)
    index[..., :2, :] = 1
    # p = 1/3; both present classes cover 8 of 16: overlap 8/3, union 8 + 16/3 - 8/3.
    target, _ = gate_targets(logits, index, torch.zeros(1, 2))
    assert float(target) == pytest.approx(1 - (8 / 3) / (8 + 8 / 3), rel=1e-6)


def test_gate_loss_is_binary_cross_entropy_of_both_gates():
    gates, seg, mask, cls = batch()
    seg_target, cls_target = gate_targets(seg, mask, cls)
    stacked = torch.stack(gates)
    truth = F.binary_cross_entropy(stacked[..., 0], seg_target.expand(4, -1))
    truth = truth + F.binary_cross_entropy(stacked[..., 1], cls_target.expand(4, -1))
    torch.testing.assert_close(gate_loss(gates, seg, mask, cls), truth)


def test_gate_loss_reaches_the_gates_only():
    gates, seg, mask, cls = batch()
    seg, cls = seg.requires_grad_(), cls.requires_grad_()
    gate_loss(gates, seg, mask, cls).backward()
    assert seg.grad is None and cls.grad is None and all((g.grad != 0).any() for g in gates)


def test_mixed_batch_equals_its_labelled_part():
    gates, seg, mask, cls = batch()
    has = torch.tensor([True, True, False, True, False, True])
    with torch.no_grad():
        for x in (gates[0], seg, cls):
            x[2] = math.nan
    value = gate_loss(gates, seg, mask, cls, None, has, has)
    grads = torch.autograd.grad(value, gates)
    parts = [g[has].detach().requires_grad_() for g in gates]
    truth = gate_loss(parts, seg[has], mask[has], cls[has])
    torch.testing.assert_close(value, truth)
    for grad, expected in zip(grads, torch.autograd.grad(truth, parts), strict=True):
        torch.testing.assert_close(grad[has], expected)
        assert (grad[~has] == 0).all()


def test_nothing_known_is_exactly_zero_with_zero_gradient():
    gates, seg, mask, cls = batch()
    none = torch.zeros(6, dtype=torch.bool)
    value = gate_loss(gates, seg, mask, cls, None, none, none)
    assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, gates))


def test_saturated_gates_stay_finite():
    _, seg, mask, cls = batch(2)
    gates = [torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)]
    value = gate_loss(gates, seg, mask, cls)
    assert value.isfinite() and torch.autograd.grad(value, gates)[0].isfinite().all()


def test_gate_errors_name_the_argument():
    gates, seg, mask, cls = batch()
    with pytest.raises(ValueError, match="gates: got none"):
        gate_loss((), seg, mask, cls)
    with pytest.raises(ValueError, match=r"gates\[1\]: got shape \(6,\)"):
        gate_loss((gates[0], gates[1][:, 0]), seg, mask, cls)
    with pytest.raises(ValueError, match="scaling: got 'log'"):
        gate_loss(gates, seg, mask, cls, scaling="log")


def test_levels_may_come_as_one_tensor():
    gates = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0))
    seg_logits, mask, cls_logits = torch.randn(3, 1, 5, 5), torch.ones(3, 1, 5, 5), torch.randn(3, 2)
    together, apart = (gate_loss(g, seg_logits, mask, cls_logits) for g in (gates, list(gates)))
    assert torch.equal(together, apart)
    with pytest.raises(TypeError, match=r"gates\[1\]: got NoneType"):
        gate_loss([gates[0], None], seg_logits, mask, cls_logits)


def test_auxiliary_loss_is_a_tenth_of_the_task_losses_on_averaged_masks():
    _, _, mask, cls = batch()
    label, has = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([True, True, False, True, True, True])
    seg = [torch.randn(6, 1, h, w, dtype=torch.float64, requires_grad=True) for h, w in ((3, 5), (6, 10))]
    value = auxiliary_loss(seg, (cls, 2 * cls), mask, label, has)
    averaged = mask.view(6, 1, 3, 4, 5, 2).mean((3, 5)), mask.view(6, 1, 6, 2, 10, 1).mean((3, 5))
    truth = sum(segmentation_loss(s, m, has) for s, m in zip(seg, averaged, strict=True))
    truth = 0.1 * (truth + classification_loss(cls, label) + classification_loss(2 * cls, label))
    torch.testing.assert_close(value.double(), truth)
    assert all((grad[2] == 0).all() and (grad != 0).any() for grad in torch.autograd.grad(value, seg))


def test_auxiliary_loss_takes_class_indices_and_no_levels():
    index = torch.randint(3, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 3, 4, 4)
    planes = F.avg_pool2d(F.one_hot(index[:, 0], 3).permute(0, 3, 1, 2).float(), 2)
    label = torch.tensor([0, 1])
    torch.testing.assert_close(
        auxiliary_loss((logits,), (), index, label), 0.1 * segmentation_loss(logits, planes)
    )
    assert auxiliary_loss((), (), index, label) == 0


def test_loss_weights_move_and_then_fall_back():
    assert loss_weights(0) == pytest.approx((0.82, 0.18))
    assert loss_weights(10) == pytest.approx((0.89, 0.11))
    assert loss_weights(14) == pytest.approx((0.918, 0.082))
    for epoch in (15, 40):
        assert loss_weights(epoch) == pytest.approx((0.80, 0.20))
    with pytest.raises(ValueError, match="got -1"):
        loss_weights(-1)
