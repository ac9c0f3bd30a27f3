"""The mask loss from logits: missing masks, several classes, precision, extremes, errors."""

from __future__ import annotations

import math

import pytest
import torch

from bti_fast.losses import boundary_loss, lesion_focus, segmentation_loss


def batch(count: int = 5, classes: int = 1, size=(13, 17), dtype=torch.float32):
    generator = torch.Generator().manual_seed(count + classes)
    logits = 3 * torch.randn(count, classes, *size, generator=generator, dtype=dtype)
    mask = (torch.rand(count, 1, *size, generator=generator) > 0.6).to(dtype)
    return logits.requires_grad_(), mask


def value_and_grad(logits, *args, **kwargs):
    value = segmentation_loss(logits, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("boundary", ["soft", "hard"])
def test_mixed_batch_equals_its_labelled_part(boundary):
    logits, mask = batch(dtype=torch.float64)
    has = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        logits[1], mask[4] = math.nan, 255.0
    value, grad = value_and_grad(logits, mask, has, boundary=boundary)
    part = logits[has].detach().requires_grad_()
    truth, truth_grad = value_and_grad(part, mask[has], boundary=boundary)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[has], truth_grad, rtol=1e-12, atol=1e-16)
    assert (grad[~has] == 0).all()


def test_no_mask_at_all_is_exactly_zero_with_zero_gradient():
    logits, mask = batch()
    value, grad = value_and_grad(logits, mask * math.nan, torch.zeros(5, dtype=torch.bool))
    assert value == 0 and (grad == 0).all()


def test_empty_batch_is_zero():
    logits = torch.zeros(0, 1, 8, 8, requires_grad=True)
    assert value_and_grad(logits, torch.zeros(0, 1, 8, 8))[0] == 0


def test_gradient_by_finite_differences():
    logits, mask = batch(2, size=(6, 7), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, mask), logits)
    logits, _ = batch(2, 3, size=(6, 7), dtype=torch.float64)
    index = torch.randint(3, (2, 1, 6, 7), generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, index), logits)


def test_hand_computed_value():
    # Logits 0: p = 1/2 everywhere. 16x16, left half lesion: Dice = 2·64/(128+128) = 1/2, area = 1/2.
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    value = segmentation_loss(torch.zeros(1, 1, 16, 16), mask)
    half = torch.full_like(mask, 0.5)
    # A constant 1/2 minus the mask is ±1/2: curvature inside vanishes but along the step and the frame.
    rest = 0.25 * boundary_loss(half, mask)
    # Sobel of the mask: 4 along the step's two columns (3 in the first and last row) as -; left frame +,
    # zeros outside.
    sobel = torch.zeros(16, 16)
    sobel[:, 7:9] = -4
    sobel[:, 0] = 4
    sobel[0] *= 0.75
    sobel[-1] *= 0.75
    flat = torch.zeros(16, 16)
    flat[:, 0], flat[:, -1] = 2, -2
    flat[0] *= 0.75
    flat[-1] *= 0.75
    spread = [(x.var(correction=0) + 1e-8).sqrt() for x in (sobel, flat)]
    expected = 0.5**0.75 * (1 + math.exp(-5)) + rest + 0.15 * (spread[0] - spread[1]).abs()
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_soft_boundary_trains_and_hard_does_not():
    logits, mask = batch()
    prob = logits.sigmoid()
    (grad,) = torch.autograd.grad(boundary_loss(prob, mask).sum(), prob, retain_graph=True)
    assert (grad != 0).float().mean() > 0.9
    assert not boundary_loss(prob, mask, boundary="hard").requires_grad


def test_several_classes_are_a_mean_of_one_against_the_rest():
    logits, _ = batch(3, 4, dtype=torch.float64)
    index = torch.randint(4, (3, 1, 13, 17), generator=torch.Generator().manual_seed(1))
    prob = logits.softmax(1)
    rest = [lesion_focus(prob[:, k : k + 1], (index == k).double()) for k in range(4)]
    truth = torch.stack(rest).mean()
    planes = torch.nn.functional.one_hot(index[:, 0], 4).permute(0, 3, 1, 2)
    for mask in (index, index.float(), planes, planes.double()):
        torch.testing.assert_close(segmentation_loss(logits, mask), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computed_in_fp32_under_autocast(dtype):
    logits, mask = batch()
    half = logits.detach().to(dtype)
    expected = segmentation_loss(half.float(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = segmentation_loss(half, mask)
    assert value.dtype == torch.float32
    assert float(value) == float(expected)


@pytest.mark.parametrize("truth", [0.0, 1.0])
@pytest.mark.parametrize("scale", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_extreme_logits_and_masks_stay_finite(truth, scale):
    logits = torch.full((2, 1, 16, 16), scale, requires_grad=True)
    value, grad = value_and_grad(logits, torch.full((2, 1, 16, 16), truth))
    assert value.isfinite() and grad.isfinite().all()


def test_perfect_prediction_is_near_zero():
    _, mask = batch()
    assert float(segmentation_loss(40 * mask - 20, mask)) < 1e-4


def test_nan_logits_show_in_the_loss():
    logits, mask = batch()
    with torch.no_grad():
        logits[0, 0, 0, 0] = math.nan
    assert segmentation_loss(logits, mask).isnan()


def test_no_graph_break():
    logits, mask = batch()
    has = torch.tensor([True, False, True, True, False])
    compiled = torch.compile(segmentation_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, mask, has), segmentation_loss(logits, mask, has))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(5, 1, 13, 16)}, r"mask: got shape \(5, 1, 13, 16\), needs \(5, 1, 13, 17\)"),
        ({"mask": torch.full((5, 1, 13, 17), 255.0)}, r"mask: got values 255..255, needs 0..1"),
        ({"has_mask": torch.ones(5)}, "has_mask: got torch.float32"),
        ({"has_mask": torch.ones(4, dtype=torch.bool)}, r"has_mask: .*\(4,\).*\(5,\)"),
        ({"logits": torch.zeros(5, 13, 17)}, "logits: got"),
        ({"boundary": "medium"}, "boundary: got 'medium'"),
    ],
)
def test_errors_name_the_argument(change, message):
    logits, mask = batch()
    with pytest.raises(ValueError, match=message):
        segmentation_loss(**{"logits": logits, "mask": mask, **change})


def test_what_is_no_tensor_is_named():
    logits = torch.zeros(2, 1, 4, 4)
    with pytest.raises(TypeError, match="mask: got NoneType, needs a torch.Tensor"):
        segmentation_loss(logits, None)
    with pytest.raises(TypeError, match="logits: got ndarray"):
        segmentation_loss(logits.numpy(), logits)
    with pytest.raises(TypeError, match="has_mask: got list"):
        segmentation_loss(logits, logits, [True, False])
