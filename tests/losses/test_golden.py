"""The probability-level losses against the numbers of the published code, values 1e-5 and gradients 1e-4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bti_fast import losses

PARTS = {
    "tversky_index": lambda p, y: losses.tversky_index(p, y)[:, 0],
    "focal_tversky": lambda p, y: losses.focal_tversky(p, y).mean(),
    "texture": lambda p, y: losses.texture_loss(p, y).mean(),
    "lesion_focus": lambda p, y: losses.lesion_focus(p, y, boundary="hard").mean(),
    "soft_iou": lambda p, y: losses.soft_iou(p, y)[:, 0],
}


def relative_error(found: Tensor, truth: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.detach().double() - truth.double()).abs().max() / truth.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PARTS)
def test_part_has_published_value_and_gradient(golden, name, dtype):
    prob = golden["y_pred_seg"].to(dtype).requires_grad_()
    value = PARTS[name](prob, golden["y_true_seg"].to(dtype))
    assert relative_error(value.reshape(-1), golden[name]) <= 1e-5
    (grad,) = torch.autograd.grad(value.sum(), prob)
    assert relative_error(grad, golden[f"{name}.grad"]) <= 1e-4


def test_hard_boundary_has_published_value_and_no_gradient(golden):
    assert int(golden["boundary.grad_is_none"]) == 1
    prob = golden["y_pred_seg"].clone().requires_grad_()
    value = losses.boundary_loss(prob, golden["y_true_seg"], boundary="hard").mean()
    assert relative_error(value.reshape(1), golden["boundary"]) <= 1e-5
    assert not value.requires_grad


def test_soft_boundary_equals_hard_on_binary_predictions(golden):
    binary = (golden["y_pred_seg"] > 0.5).float()
    soft = losses.boundary_loss(binary, golden["y_true_seg"]).mean()
    assert relative_error(soft.reshape(1), golden["boundary"]) <= 1e-5


def test_curvature_kernel(golden):
    assert relative_error(losses.curvature_kernel(), golden["curvature_kernel"]) <= 1e-6


def test_each_sample_alone(golden):
    alone = losses.lesion_focus(golden["y_pred_seg"], golden["y_true_seg"], boundary="hard")
    assert relative_error(alone, golden["lesion_focus.per_sample_alone"]) <= 1e-5


def test_focal_cross_entropy(golden):
    prob = golden["y_pred_clf"].clone().requires_grad_()
    value = losses.focal_cross_entropy(prob, golden["y_true_clf"])
    assert relative_error(value.mean().reshape(1), golden["clf_focal"]) <= 1e-5
    (grad,) = torch.autograd.grad(value.mean(), prob)
    assert relative_error(grad, golden["clf_focal.grad"]) <= 1e-4
    # 1 - p and 1 - exp(log p) round differently in float32 near p = 1, in their code as in any.
    exact = losses.focal_cross_entropy(prob.double(), golden["y_true_clf"])
    assert relative_error(exact, golden["clf_focal.per_sample"]) <= 1e-5


def test_nonfinite_probabilities_as_published(golden):
    prob = golden["y_pred_seg_nonfinite"]
    value = losses.lesion_focus(prob, golden["y_true_seg"], boundary="hard", nonfinite="zero").mean()
    assert relative_error(value.reshape(1), golden["lesion_focus.nonfinite_in"]) <= 1e-5
    value = losses.focal_cross_entropy(
        golden["y_pred_clf_nonfinite"], golden["y_true_clf"], nonfinite="ten"
    ).mean()
    assert relative_error(value.reshape(1), golden["clf_focal.nonfinite_in"]) <= 1e-5


def test_nonfinite_probabilities_show_by_default(golden):
    seg = losses.lesion_focus(golden["y_pred_seg_nonfinite"], golden["y_true_seg"])
    assert seg.isnan()[:1].all() and seg[2:].isfinite().all()
    cls = losses.focal_cross_entropy(golden["y_pred_clf_nonfinite"], golden["y_true_clf"])
    assert cls.isnan().tolist() == [False, False, True, False, False]


def test_segmentation_loss_from_logits(golden):
    logits = golden["y_pred_seg"].double().logit().requires_grad_()
    value = losses.segmentation_loss(logits, golden["y_true_seg"], boundary="hard")
    assert relative_error(value.reshape(1), golden["lesion_focus"]) <= 1e-5
    (grad,) = torch.autograd.grad(value, logits)
    prob = golden["y_pred_seg"].double()
    assert relative_error(grad, golden["lesion_focus.grad"] * prob * (1 - prob)) <= 1e-4


def test_classification_loss_from_logits(golden):
    logits = golden["y_pred_clf"].double().log().requires_grad_()
    value = losses.classification_loss(logits, golden["y_true_clf"])
    assert relative_error(value.reshape(1), golden["clf_focal"]) <= 1e-5
    (grad,) = torch.autograd.grad(value, logits)
    # d/d(log p) of a loss that renormalises is p · d/dp.
    assert relative_error(grad, golden["clf_focal.grad"] * golden["y_pred_clf"].double()) <= 1e-4


@pytest.mark.parametrize("task", ["seg", "clf"])
def test_minmax_targets_and_gate_cross_entropy(golden, task):
    if task == "seg":
        score = losses.soft_iou(golden["y_pred_seg"], golden["y_true_seg"])[:, 0]
    else:
        score = golden["y_pred_clf"].amax(1)
    target = losses.minmax_scale(1 - score)
    assert relative_error(target, golden[f"{task}_gate_target"]) <= 1e-5
    gate = golden[f"gate_w_{task}"].clone().requires_grad_()
    value = losses.gate_cross_entropy(gate, target).mean()
    task_loss = golden["lesion_focus" if task == "seg" else "clf_focal"]
    for weight in ("0.01", "1.0"):
        total = task_loss + float(weight) * value
        assert relative_error(total, golden[f"{task}_gate_loss.lambda{weight}"]) <= 1e-5
        (grad,) = torch.autograd.grad(float(weight) * value, gate, retain_graph=True)
        assert relative_error(grad, golden[f"{task}_gate_loss.lambda{weight}.grad_w"]) <= 1e-4


def test_gate_loss_from_logits(golden):
    gates = [
        torch.stack([s, c], 1).requires_grad_()
        for s, c in zip(golden["gate_w_seg"], golden["gate_w_clf"], strict=True)
    ]
    seg_logits = golden["y_pred_seg"].logit().requires_grad_()
    cls_logits = golden["y_pred_clf"].log().requires_grad_()
    value = losses.gate_loss(
        gates, seg_logits, golden["y_true_seg"], cls_logits, golden["y_true_clf"], scaling="minmax"
    )
    truth = golden["seg_gate_loss.lambda1.0"] - golden["lesion_focus"]
    truth = truth + golden["clf_gate_loss.lambda1.0"] - golden["clf_focal"]
    assert relative_error(value.reshape(1), truth) <= 1e-5
    *grads, seg_grad, cls_grad = torch.autograd.grad(
        value, [*gates, seg_logits, cls_logits], allow_unused=True
    )
    assert seg_grad is None and cls_grad is None
    grads = torch.stack(grads)
    assert relative_error(grads[..., 0], golden["seg_gate_loss.lambda1.0.grad_w"]) <= 1e-4
    assert relative_error(grads[..., 1], golden["clf_gate_loss.lambda1.0.grad_w"]) <= 1e-4
