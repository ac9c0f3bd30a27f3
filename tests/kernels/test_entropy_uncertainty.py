"""The Triton kernels of entropy_uncertainty, interpreted on CPU tensors, against float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from bti_fast.kernels import entropy_uncertainty as kernels  # noqa: E402
from bti_fast.kernels import tiles  # noqa: E402
from tests.kernels.truth import entropy64  # noqa: E402

EPSILON = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def contiguous(x):
    return x


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x):
    return torch.cat([x, torch.full_like(x, torch.nan)], -1).repeat_interleave(2, 0)[::2, ..., : x.shape[-1]]


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 3 else x


SHAPES = [(3, 7), (2, 1, 5), (2, 3, 33, 41), (2, 1, 3, 4, 5), (2, 4, 3, 2, 5)]


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    logits = layout((4 * torch.randn(shape, generator=generator)).to(dtype))
    u, grad = entropy64(logits)
    weight = torch.randn(u.shape, generator=generator)

    got = kernels.entropy_uncertainty(logits)
    got_grad = kernels.entropy_uncertainty_backward(weight, logits)

    assert got.dtype == torch.float32 and got.is_contiguous()
    assert ((got - u).abs() <= 1e-5 * u + 1e-15).all()
    assert got_grad.dtype == dtype and got_grad.stride() == torch.empty_like(logits).stride()
    expected = grad * weight.unsqueeze(1)
    assert (got_grad - expected).abs().max() <= EPSILON[dtype] * expected.abs().max()


def test_grad_of_a_sum_has_no_strides():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    got = kernels.entropy_uncertainty_backward(torch.ones(()).expand(2, 4, 5), logits)
    torch.testing.assert_close(got.double(), entropy64(logits)[1], rtol=1e-5, atol=1e-6)


def test_64_bit_offsets_give_the_same_bits(monkeypatch):
    logits = torch.randn(3, 4, 37, 29, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(3, 37, 29, generator=torch.Generator().manual_seed(3))
    u = kernels.entropy_uncertainty(logits)
    grad = kernels.entropy_uncertainty_backward(weight, logits)
    monkeypatch.setattr(tiles, "INT32_OFFSETS", 0)
    assert torch.equal(kernels.entropy_uncertainty(logits), u)
    assert torch.equal(kernels.entropy_uncertainty_backward(weight, logits), grad)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_saturated_logits_are_certain(value):
    for logits in (torch.tensor([[value]]), torch.tensor([[value, 0.0, -value]])):
        assert kernels.entropy_uncertainty(logits).tolist() == [0.0]
        assert kernels.entropy_uncertainty_backward(torch.ones(1), logits).abs().max() == 0


def test_equal_logits_know_nothing():
    assert kernels.entropy_uncertainty(torch.full((1, 7), 3.0)).tolist() == [1.0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("classes", [1, 3])
def test_nan_and_inf_stay_in_their_position(bad, classes):
    logits = torch.randn(4, classes, 6, generator=torch.Generator().manual_seed(4))
    clean = kernels.entropy_uncertainty(logits)
    clean_grad = kernels.entropy_uncertainty_backward(torch.ones(4, 6), logits)
    logits[1, 0, 2] = bad
    u = kernels.entropy_uncertainty(logits)
    grad = kernels.entropy_uncertainty_backward(torch.ones(4, 6), logits)
    hit = torch.zeros(4, 6, dtype=torch.bool)
    hit[1, 2] = True
    assert u[hit].isnan().all() and torch.equal(u[~hit], clean[~hit])
    grad, clean_grad = grad.movedim(1, -1), clean_grad.movedim(1, -1)
    assert grad[hit].isnan().all() and torch.equal(grad[~hit], clean_grad[~hit])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0, 4), (2, 1, 0)], ids=str)
def test_nothing_in_nothing_out(shape):
    logits = torch.empty(shape)
    u = kernels.entropy_uncertainty(logits)
    assert u.shape == shape[:1] + shape[2:]
    assert kernels.entropy_uncertainty_backward(u, logits).shape == shape
