"""Wrong arguments: ValueError or TypeError that names the argument, what it got and what it needs."""

from __future__ import annotations

import pytest
import torch

import bti_fast
from bti_fast import ops
from tests.ops.operators import attention_inputs, fusion_inputs, interaction_inputs


def made(inputs, shape):
    return {name: value.float() for name, value in inputs(shape, torch.Generator().manual_seed(0)).items()}


def fusion(**changes):
    return ops.gated_fusion(**{**made(fusion_inputs, (2, 3, 9, 13)), **changes})


def interaction(training=False, **changes):
    inputs = {**made(interaction_inputs, (2, 4, 9, 13)), **changes}
    x, y = inputs.pop("x"), inputs.pop("y")
    return ops.task_interaction(x, y, ops.TaskInteractionWeights(**inputs), training=training)


def attention(**changes):
    return ops.cross_attention(**{**made(attention_inputs, (2, 2, 9, 16, 5, 8)), **changes})


SHAPES = (
    (lambda: ops.entropy_uncertainty(torch.zeros(3)), "logits.*2 to 5 dimensions.*got 1 dimensions"),
    (lambda: ops.entropy_uncertainty(torch.zeros(2, 0, 4)), "logits needs at least one class.*2, 0, 4"),
    (lambda: fusion(x=torch.zeros(2, 3)), "gated_fusion: x must have shape"),
    (lambda: fusion(x=torch.zeros(2, 0, 9, 13)), "x needs at least one channel"),
    (
        lambda: fusion(seg_logits=torch.zeros(2, 1, 9, 12)),
        r"seg_logits.*\(2, 1, 9, 13\), got \(2, 1, 9, 12\)",
    ),
    (lambda: fusion(seg_logits=torch.zeros(3, 1, 9, 13)), r"seg_logits.*got \(3, 1, 9, 13\)"),
    (lambda: fusion(seg_logits=torch.zeros(2, 1, 9)), r"seg_logits.*got \(2, 1, 9\)"),
    (lambda: fusion(prior=torch.zeros(2, 4)), r"prior.*\(B, C\) = \(2, 3\), got \(2, 4\)"),
    (lambda: fusion(cls_uncertainty=torch.zeros(2, 1)), r"cls_uncertainty.*\(B,\) = \(2,\), got \(2, 1\)"),
    (lambda: fusion(coeffs=torch.zeros(2)), r"coeffs.*\(3,\), got \(2,\)"),
    (lambda: fusion(prior=torch.zeros(2, 3, device="meta")), "prior must be on cpu like x, got meta"),
    (lambda: interaction(x=torch.zeros(2, 5, 9, 13)), r"weights.conv_weight.*= \(2, 5\), got \(2, 4\)"),
    (lambda: interaction(y=torch.zeros(3, 10)), r"y must have shape \(B, F\) = \(2, 10\), got \(3, 10\)"),
    (lambda: interaction(y=torch.zeros(2, 10, 1)), "y must have shape"),
    (lambda: interaction(gate2_bias=torch.zeros(3)), r"weights.gate2_bias.*\(2,\), got \(3,\)"),
    (lambda: interaction(bn_var=torch.zeros(9)), r"weights.bn_var.*\(10,\), got \(9,\)"),
    (lambda: attention(k=torch.zeros(2, 2, 5, 15)), r"k must have shape \(B, h, M, d\) = \(2, 2, 5, 16\)"),
    (lambda: attention(v_q=torch.zeros(2, 2, 9, 9)), r"v_q must have shape \(B, h, N, e\) = \(2, 2, 9, 8\)"),
    (lambda: attention(v_k=torch.zeros(2, 1, 5, 8)), "v_k must have shape"),
    (lambda: attention(q=torch.zeros(2, 9, 16)), "q must have shape"),
    (
        lambda: attention(q_mask=torch.ones(2, 5, dtype=torch.bool)),
        r"q_mask.*\(B, N\) = \(2, 9\), got \(2, 5\)",
    ),
)

TYPES = (
    (lambda: ops.entropy_uncertainty([1.0, 2.0]), "logits must be a torch.Tensor, got list"),
    (lambda: ops.entropy_uncertainty(torch.zeros(2, 3, dtype=torch.int64)), "logits must be float32.*int64"),
    (lambda: ops.entropy_uncertainty(torch.zeros(2, 3).to_sparse()), "logits must be a dense"),
    (lambda: fusion(prior=None), "prior must be a torch.Tensor, got NoneType"),
    (lambda: fusion(x=torch.zeros(2, 3, 9, 13, dtype=torch.complex64)), "x must be float32.*complex64"),
    (lambda: fusion(tau="0.7"), "tau must be a number, got str"),
    (lambda: interaction(y=torch.zeros(2, 10, dtype=torch.int32)), "y must be float32"),
    (
        lambda: ops.task_interaction(torch.zeros(2, 4, 9), torch.zeros(2, 10), []),
        "TaskInteractionWeights, got list",
    ),
    (lambda: attention(k=torch.zeros(2, 2, 5, 16, dtype=torch.float16)), "k must have q's dtype"),
    (lambda: attention(k_mask=torch.ones(2, 5)), "k_mask must be a bool tensor"),
    (lambda: attention(scale="big"), "scale must be a number or None, got str"),
)


@pytest.mark.parametrize(("call", "message"), SHAPES)
def test_wrong_shapes_and_devices(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_training_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples.*batch of 1"):
        interaction(training=True, x=torch.zeros(1, 4, 9, 13), y=torch.zeros(1, 10))


def test_backend_names():
    with pytest.raises(ValueError, match="got 'gpu', needs one of reference, cpu, triton, cuda, sdpa"):
        with bti_fast.backend("gpu"):
            pass
    with pytest.raises(bti_fast.errors.BackendUnavailable, match="cuda.*needs cuda tensors, got cpu"):
        with bti_fast.backend("cuda"):
            ops.entropy_uncertainty(torch.zeros(2, 3))
    with pytest.raises(bti_fast.errors.BackendUnavailable, match="'sdpa' does not implement it"):
        with bti_fast.backend("sdpa"):
            ops.entropy_uncertainty(torch.zeros(2, 3))
