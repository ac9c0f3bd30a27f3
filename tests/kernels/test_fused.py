"""The Triton kernels of gated_fusion and task_interaction beyond the contract of every backend."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import bti_fast  # noqa: E402
from bti_fast import ops  # noqa: E402
from bti_fast.kernels import gated_fusion as fusion  # noqa: E402
from bti_fast.kernels import launch, tiles  # noqa: E402
from bti_fast.kernels import task_interaction as interaction  # noqa: E402
from bti_fast.kernels import task_interaction_backward as interaction_back  # noqa: E402
from bti_fast.reference.task_interaction import statistics  # noqa: E402
from tests.ops.operators import fusion_inputs, interaction_inputs  # noqa: E402


def made(inputs, shape, seed=0):
    return [value.float() for value in inputs(shape, torch.Generator().manual_seed(seed)).values()]


def fusion_results():
    x, logits, *small = made(fusion_inputs, (2, 3, 9, 13))
    out = fusion.gated_fusion(x, logits, *small, 0.7)
    grads = fusion.gated_fusion_backward(x.cos(), *out[1:], x, logits, *small, *out[1:3], 0.7)
    return [*out, *grads]


def interaction_results(shape=(2, 6, 9, 13)):
    x, _, weight, bias, *_ = made(interaction_inputs, shape)
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(x.shape[:2], generator=generator)
    summary_grad = torch.randn(x.shape[0], 3 * x.shape[1] // 2 + 1, generator=generator)
    grad_scale, signs = interaction_back.reduce_gradient(x.cos(), x, weight, bias)
    grads = interaction_back.input_gradient(x.cos(), x, weight, signs, scale, summary_grad)
    return [interaction.statistics(x, weight, bias), interaction.modulate(x, scale), grad_scale, *grads]


@pytest.mark.parametrize("results", (fusion_results, interaction_results))
def test_64_bit_offsets_give_the_same_bits(results, monkeypatch):
    narrow = results()
    monkeypatch.setattr(tiles, "INT32_OFFSETS", 0)
    for one, two in zip(results(), narrow, strict=True):
        assert torch.equal(one, two)


def test_statistics_against_float64():
    x, _, weight, bias, *_ = made(interaction_inputs, (2, 6, 3, 9, 10))
    truth = statistics(x.double(), weight.double(), bias.double())
    got = interaction.statistics(x, weight, bias)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


def test_hidden_rows_in_several_chunks_add_up():
    """With 80 channels the 40 hidden rows of float32 do not fit into one chunk of registers."""
    x, _, weight, bias, *_ = made(interaction_inputs, (2, 80, 4, 10))
    assert launch.gradient_shape(x, 40).hidden < 40
    generator = torch.Generator().manual_seed(1)
    by_hidden = torch.randn(2, 40, generator=generator)
    summary_grad = torch.cat([torch.zeros(2, 80), by_hidden, torch.zeros(2, 1)], 1)
    _, signs = interaction_back.reduce_gradient(x, x, weight, bias)
    nothing = torch.zeros_like(x), torch.zeros(2, 80)
    grads = interaction_back.input_gradient(nothing[0], x, weight, signs, nothing[1], summary_grad)

    wide = [value.double().requires_grad_() for value in (x, weight, bias)]
    hidden = torch.einsum("hc,bcyx->bhyx", wide[1], wide[0]) + wide[2].view(-1, 1, 1)
    total = (hidden.relu().mean((2, 3)) * by_hidden).sum()
    for got, truth in zip(grads, torch.autograd.grad(total, wide), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_features_with_float32_weights(dtype):
    """As under autocast: nothing but x' itself may be worse than float32."""
    inputs = made(interaction_inputs, (3, 4, 9, 8))
    inputs[0] = inputs[0].to(dtype)
    results = {}
    for name in ("reference", "triton"):
        with bti_fast.backend(name):
            results[name] = ops.task_interaction(*inputs[:2], ops.TaskInteractionWeights(*inputs[2:]))
    torch.testing.assert_close(results["triton"].gates, results["reference"].gates, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results["triton"].signals, results["reference"].signals, rtol=1e-5, atol=1e-6)
    assert results["triton"].x.dtype == dtype


def test_the_interpreter_is_never_chosen_by_itself():
    inputs = made(fusion_inputs, (2, 3, 9, 13))
    operator = ops.OPERATORS["gated_fusion"]
    assert "only where it is forced" in operator.explain(*inputs, 0.7)["triton"]
    assert operator.choose(*inputs, 0.7).name != "triton"
    with bti_fast.backend("triton"):
        assert operator.choose(*inputs, 0.7).name == "triton"


def test_more_hidden_channels_than_one_chunk():
    """640 channels have 320 hidden ones; the statistics hold 256 at once."""
    x, _, weight, bias, *_ = made(interaction_inputs, (1, 640, 9, 5))
    assert launch.dot_shape(x, weight, tiles.PLANES.value, wide=False)[0] < weight.shape[0]
    hidden = torch.einsum("hc,bcyx->bhyx", weight.double(), x.double()) + bias.double().view(-1, 1, 1)
    truth = statistics(x.double(), weight.double(), bias.double())
    got = interaction.statistics(x, weight, bias)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    grad_scale, signs = interaction_back.reduce_gradient(x.cos(), x, weight, bias)
    torch.testing.assert_close(grad_scale, (x * x.cos()).sum((2, 3)), rtol=1e-5, atol=1e-4)
    bits = (signs.unsqueeze(-1) >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(2)[..., :45].bool(), hidden.flatten(2) > 0)


@pytest.mark.parametrize(
    ("tensor", "kind", "align"),
    (
        (torch.zeros(2, 48, 14, 14), tiles.PLANES, 4),
        (torch.zeros(2, 48, 16, 16), tiles.PLANES, 16),
        (torch.zeros(2, 24, 5, 5).contiguous(memory_format=torch.channels_last), tiles.LAST, 8),
        (torch.zeros(2, 48, 16, 16)[..., 1:9], tiles.ANY, 1),
        (torch.zeros(1).expand(2, 48, 16, 16), tiles.ANY, 1),
    ),
)
def test_formats(tensor, kind, align):
    found = tiles.maps_of([(tensor, True)])[1][0]
    assert (found.format, found.at.align.value) == (kind.value, align)
