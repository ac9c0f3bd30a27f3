"""Numbers of the operators against independent truths: closed forms, scipy, torch's own modules, loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy

import bti_fast
from bti_fast import ops
from tests.ops.operators import (
    BACKENDS_HERE,
    attention_inputs,
    call_interaction,
    call_interaction_training,
    fusion_inputs,
    interaction_inputs,
)

ENTROPY_BACKENDS = [name for name in BACKENDS_HERE if name in ops.OPERATORS["entropy_uncertainty"].backends]


@pytest.mark.parametrize("backend", ENTROPY_BACKENDS)
def test_entropy_against_scipy(backend):
    logits = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(1))
    truth = scipy_entropy(torch.softmax(logits.double(), 1).numpy(), axis=1) / math.log(6)
    with bti_fast.backend(backend):
        np.testing.assert_allclose(ops.entropy_uncertainty(logits).numpy(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ENTROPY_BACKENDS)
@pytest.mark.parametrize("classes", (1, 2, 5))
def test_entropy_of_saturated_logits_is_exactly_zero_with_finite_gradient(backend, classes):
    logits = torch.zeros(3, classes, 4)
    logits[:, 0] = torch.tensor([1e4, -1e4, 60.0]).view(3, 1)
    if classes > 1:
        logits[1, 1] = 1e4
    logits.requires_grad_()
    with bti_fast.backend(backend):
        u = ops.entropy_uncertainty(logits)
        u.sum().backward()
    assert torch.equal(u[:2], torch.zeros(2, 4))
    assert u.min() >= 0 and u.max() <= 1
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("backend", ENTROPY_BACKENDS)
@pytest.mark.parametrize("classes", (1, 2, 3, 7, 64))
def test_entropy_of_ignorance_is_one(backend, classes):
    with bti_fast.backend(backend):
        u = ops.entropy_uncertainty(torch.full((2, classes, 9), 3.0 if classes > 1 else 0.0))
    torch.testing.assert_close(u, torch.ones(2, 9), rtol=0, atol=1e-6)
    assert u.max() <= 1


@pytest.mark.parametrize("backend", ENTROPY_BACKENDS)
def test_entropy_gradient_against_the_closed_form(backend):
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    with bti_fast.backend(backend):
        u = ops.entropy_uncertainty(logits)
        u.sum().backward()
    log_p = torch.log_softmax(logits.detach().double(), 1)
    truth = -log_p.exp() * (log_p + u.detach().double().unsqueeze(1) * math.log(4)) / math.log(4)
    torch.testing.assert_close(logits.grad.double(), truth, rtol=1e-4, atol=1e-6)


def test_fusion_against_loops():
    inputs = fusion_inputs((2, 3, 4, 5), torch.Generator().manual_seed(3))
    result = ops.gated_fusion(*inputs.values(), tau=0.4)
    x, logits, prior, doubt, (alpha, beta, gamma) = (value.numpy() for value in inputs.values())
    for b in range(2):
        p = np.exp(logits[b]) / np.exp(logits[b]).sum(0)
        u = -(p * np.log(p)).sum(0) / math.log(3)
        gate = 1 / (1 + np.exp(-(alpha * u + beta * (1 - doubt[b]) + gamma)))
        weight = 1 - u + 1e-3
        np.testing.assert_allclose(result.uncertainty[b], u, rtol=1e-9)
        np.testing.assert_allclose(result.mean_uncertainty[b], u.mean(), rtol=1e-9)
        for c in range(3):
            np.testing.assert_allclose(result.x[b, c], x[b, c] * (1 + 0.4 * gate * prior[b, c]), rtol=1e-9)
            np.testing.assert_allclose(
                result.pooled[b, c], (weight * x[b, c]).sum() / weight.sum(), rtol=1e-9
            )


def test_training_moves_the_running_statistics_as_torch_does():
    inputs = list(interaction_inputs((6, 4, 9, 8), torch.Generator().manual_seed(4)).values())
    weights = ops.TaskInteractionWeights(*inputs[2:])
    norm = torch.nn.BatchNorm1d(10, eps=1e-3, momentum=0.01, dtype=torch.float64).train()
    norm.weight.data, norm.bias.data = weights.bn_weight.clone(), weights.bn_bias.clone()
    norm.running_mean.copy_(weights.bn_mean)
    norm.running_var.copy_(weights.bn_var)
    hidden = torch.einsum("hc,bcyx->bhyx", weights.conv_weight, inputs[0]) + weights.conv_bias.view(-1, 1, 1)
    hidden = torch.relu(hidden)
    norm(torch.relu(hidden.mean((2, 3)) @ weights.fc_weight.T + weights.fc_bias))
    ops.task_interaction(inputs[0], inputs[1], weights, training=True)
    torch.testing.assert_close(weights.bn_mean, norm.running_mean)
    torch.testing.assert_close(weights.bn_var, norm.running_var)


def test_evaluation_leaves_the_running_statistics_alone():
    inputs = list(interaction_inputs((3, 4, 9, 8), torch.Generator().manual_seed(4)).values())
    before = [value.clone() for value in inputs]
    call_interaction(*inputs)
    call_interaction_training(*inputs)  # on copies of the statistics
    assert all(torch.equal(one, two) for one, two in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("shape", "axes"), (((2, 4, 9, 13), (2, 3)), ((2, 4, 5, 9, 6), (2, 3, 4)), ((2, 4, 11), (2,)))
)
def test_scene_complexity(shape, axes):
    inputs = list(interaction_inputs(shape, torch.Generator().manual_seed(5)).values())
    x = inputs[0].numpy()
    expected = sum(np.abs(np.diff(x, axis=axis)).reshape(2, -1).sum(1) for axis in axes) / x[0].size
    np.testing.assert_allclose(call_interaction(*inputs)[3][:, 1], expected, rtol=1e-9)


@pytest.mark.parametrize("shape", ((2, 4, 7, 13), (2, 4, 9, 7, 16), (2, 4, 7)))
def test_scene_complexity_is_zero_below_eight_rows(shape):
    inputs = list(interaction_inputs(shape, torch.Generator().manual_seed(5)).values())
    assert call_interaction(*inputs)[3][:, 1].abs().max() == 0


def test_attention_against_two_softmaxes():
    q, k, v_q, v_k = attention_inputs((2, 3, 11, 8, 4, 6), torch.Generator().manual_seed(6)).values()
    out = ops.cross_attention(q, k, v_q, v_k, scale=0.7)
    similarity = 0.7 * torch.einsum("bhnd,bhmd->bhnm", q, k)
    torch.testing.assert_close(out.out_q, torch.einsum("bhnm,bhme->bhne", similarity.softmax(3), v_k))
    torch.testing.assert_close(out.out_k, torch.einsum("bhnm,bhne->bhme", similarity.softmax(2), v_q))


@pytest.mark.parametrize("backend", ("reference", "sdpa"))
def test_attention_scale_zero_is_the_mean(backend):
    q, k, v_q, v_k = attention_inputs((2, 3, 11, 8, 4, 8), torch.Generator().manual_seed(6)).values()
    with bti_fast.backend(backend):
        out = ops.cross_attention(q, k, v_q, v_k, scale=0.0)
    torch.testing.assert_close(out.out_q, v_k.mean(2, keepdim=True).expand_as(out.out_q))
    torch.testing.assert_close(out.out_k, v_q.mean(2, keepdim=True).expand_as(out.out_k))


@pytest.mark.parametrize("backend", ("reference", "sdpa"))
def test_attention_with_everything_masked_gives_zeros_and_zero_gradients(backend):
    inputs = attention_inputs((2, 3, 11, 8, 4, 8), torch.Generator().manual_seed(6))
    tensors = [value.requires_grad_() for value in inputs.values()]
    k_mask = torch.tensor([[True, False, True, True], [False] * 4])
    with bti_fast.backend(backend):
        out = ops.cross_attention(*tensors, k_mask=k_mask)
        (out.out_q.sum() + out.out_k.sum()).backward()
    assert out.out_q[1].abs().max() == 0 and out.out_k[1].abs().max() == 0 and out.out_q[0].abs().min() > 0
    assert all(value.grad[1].abs().max() == 0 and torch.isfinite(value.grad).all() for value in tensors)
