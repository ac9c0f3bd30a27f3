"""The compiled CPU operators under every instruction set that this processor has."""

import pytest
import torch

from bti_fast import _library
from tests.kernels.truth import entropy64

native, reason = _library.native()
reason = reason or _library.load("cpu")
if reason:
    pytest.skip(f"no compiled CPU library: {reason}", allow_module_level=True)

forward = torch.ops.bti_fast_cpu.entropy_uncertainty
backward = torch.ops.bti_fast_cpu.entropy_uncertainty_backward
TRUTH = 1e-15  # what the textbook formula loses in float64, where one probability is close to 1


@pytest.fixture(params=native.supported_isas())
def isa(request):
    native.force_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.force_isa("auto")


def every_half(dtype):
    """All finite numbers of a 16-bit dtype."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_logit(isa, dtype):
    logits = every_half(dtype).reshape(1, 1, -1)
    u, grad = entropy64(logits)
    got = forward(logits)
    assert ((got - u).abs() <= 1e-6 * u + 2e-36).all()  # float32 ends there
    assert got.min() >= 0 and got.max() <= 1
    got_grad = backward(torch.ones_like(got), logits)
    nearest = grad.float().to(dtype)
    # The nearest number of the dtype, or its neighbour where float32 rounding decided otherwise.
    ulp = torch.finfo(dtype).eps * nearest.abs().float() + max(torch.finfo(dtype).smallest_normal, 2e-36)
    assert ((got_grad.float() - nearest.float()).abs() <= ulp).all()
    assert (got_grad == nearest).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 19])
def test_many_classes_and_odd_sizes(isa, classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    logits = (6 * torch.randn(2, classes, 5, 23, generator=generator)).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for layout in (logits, logits.contiguous(memory_format=torch.channels_last), logits[:, :, 1:, 1::2]):
        u, grad = entropy64(layout)
        assert ((forward(layout) - u).abs() <= tolerance * u + TRUTH).all()
        got = backward(torch.ones_like(u, dtype=dtype), layout)
        assert (got - grad).abs().max() <= tolerance * grad.abs().max()
        assert got.stride() == torch.empty_like(layout).stride()


def test_range_of_float32(isa):
    logits = torch.linspace(-1e4, 1e4, 20001).reshape(1, 1, -1)
    u = forward(logits)
    assert u[0, 0] == 0 and u[0, -1] == 0 and u[0, 10000] == 1
    assert torch.isfinite(backward(torch.ones_like(u), logits)).all()
    pair = torch.cat([logits, -logits], 1)
    assert forward(pair)[0, 0] == 0 and forward(pair)[0, 10000] == 1
    assert torch.isfinite(backward(torch.ones_like(u), pair)).all()


def test_threads_do_not_change_a_bit(isa):
    logits = torch.randn(3, 2, 300, 301, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = forward(logits), backward(torch.ones(3, 300, 301), logits)
        torch.set_num_threads(3)
        three = forward(logits), backward(torch.ones(3, 300, 301), logits)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def test_forcing_what_is_not_there():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        native.force_isa("sse9")
    missing = [name for name in ("portable", "avx2", "avx512") if name not in native.supported_isas()]
    for name in missing:
        with pytest.raises(RuntimeError, match=f"{name} is not available: this processor or build"):
            native.force_isa(name)
    assert native.isa() == native.supported_isas()[-1]


def test_direct_calls_are_checked_too():
    with pytest.raises(RuntimeError, match="at least 2 axes"):
        forward(torch.zeros(3))
    with pytest.raises(RuntimeError, match="float32, float64, float16 or bfloat16"):
        forward(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="shape of logits without its class axis"):
        backward(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="grad_u must be Float"):
        backward(torch.zeros(2, dtype=torch.float16), torch.zeros(2, 3, dtype=torch.float16))
