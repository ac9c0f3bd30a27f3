"""The C++ backend of cross_attention: numbers, instruction sets, masks, memory, determinism."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import bti_fast
from bti_fast import _library, ops
from bti_fast.ops.cross_attention import OPERATOR

pytestmark = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))
NATIVE = _library.native()[0]
ISAS = NATIVE.supported_isas() if NATIVE else ()


def tokens(batch, heads, n, d, m, e, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (m, d), (n, e), (m, e))
    return [torch.randn(batch, heads, *shape, generator=generator) for shape in shapes]


def run(inputs, backend, dtype=torch.float32, **options):
    """Outputs and gradients of one cotangent, computed by ``backend`` in ``dtype``."""
    inputs = [value.detach().to(dtype).requires_grad_() for value in inputs]
    with bti_fast.backend(backend):
        outputs = ops.cross_attention(*inputs, **options)
        generator = torch.Generator().manual_seed(5)
        cotangents = [torch.randn(out.shape, generator=generator).to(dtype) for out in outputs]
        grads = torch.autograd.grad(tuple(outputs), inputs, cotangents)
    return [out.detach() for out in outputs], list(grads)


def assert_accurate(inputs, **options):
    """Within SPEC 2's errors, relative to the largest true value, of the reference in float64."""
    truth, true_grads = run(inputs, "reference", torch.float64, **options)
    outputs, grads = run(inputs, "cpu", **options)
    for results, exacts, bound in ((outputs, truth, 1e-5), (grads, true_grads, 1e-4)):
        peak = max(float(exact.abs().max()) for exact in exacts)
        for got, exact in zip(results, exacts, strict=True):  # a truth of zero is measured against its peers
            assert float((got - exact).abs().max()) <= bound * max(float(exact.abs().max()), 0.01 * peak)


@pytest.fixture
def isa(request):
    NATIVE.force_isa(request.param)
    yield request.param
    NATIVE.force_isa("auto")


# Several splits of the dense tokens, a last tile that is not full, every head dimension, odd M, small M.
SIZES = (
    (2, 2, 2500, 32, 64, 32),
    (1, 1, 1201, 16, 7, 128),
    (1, 2, 97, 128, 256, 64),
    (1, 1, 50, 64, 33, 16),
    (1, 2, 1, 32, 5, 32),
    (2, 1, 1, 16, 1, 16),
    (1, 1, 3, 32, 200, 32),
    (1, 1, 1300, 32, 1, 32),
    (1, 2, 203, 64, 2, 128),
    (2, 1, 45, 128, 4, 16),
)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_instruction_set_against_float64(isa, size):
    inputs = tokens(*size)
    assert_accurate(inputs)
    batch, _, n, _, m, _ = size
    q_mask = torch.arange(n).expand(batch, -1) % 5 != 3
    k_mask = torch.arange(m).expand(batch, -1) % 3 != 1
    assert_accurate(inputs, q_mask=q_mask, k_mask=k_mask, scale=0.4)


def extreme_tokens(n, m):
    """Whole numbers, so that the logits, from -10000 to 10000, are exact in float32 at scale 1."""
    inputs = tokens(1, 2, n, 16, m, 16, seed=2)
    generator = torch.Generator().manual_seed(3)
    q = torch.zeros(1, 2, n, 16)
    k = torch.zeros(1, 2, m, 16)
    q[..., 0] = torch.randint(-100, 101, (1, 2, n), generator=generator)
    k[..., 0] = torch.randint(-100, 101, (1, 2, m), generator=generator)
    q[..., 0, 0], q[..., 1, 0], k[..., 0, 0] = 100, -100, 100
    q[..., 1], k[..., 1] = 1, torch.randint(0, 3, (1, 2, m), generator=generator)  # near ties
    inputs[0], inputs[1] = q, k
    return inputs


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("m", (21, 3))
def test_logits_from_minus_to_plus_ten_thousand(isa, m):
    inputs = extreme_tokens(1500, m)
    logits = inputs[0] @ inputs[1].transpose(2, 3)
    assert logits.min() <= -1e4 + 2 and logits.max() >= 1e4
    assert_accurate(inputs, scale=1.0)
    assert_accurate(inputs, scale=0.001)  # -10 to 10


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("far", (60.0, 120.0, 178.0, 1e25))
def test_weights_far_below_the_others_of_their_row_and_column(isa, far):
    inputs = tokens(1, 2, 96, 32, 64, 32)
    q, k = inputs[0].mul_(0.1), inputs[1]
    q[..., 0], q[..., ::2, 0] = 0.0, far
    k[..., 0], k[..., ::2, 0] = 0.0, -1.0
    assert_accurate(inputs, scale=1.0)


def with_exact_logits(inputs):
    """q and k in eighths, so that float32 holds every sum of their products."""
    return [(8 * value).round() / 8 for value in inputs[:2]] + list(inputs[2:])


@pytest.mark.parametrize("offset", (-300.0, 90.0, 5000.0))
def test_a_common_offset_of_all_logits_changes_nothing(offset):
    q, k, v_q, v_k = with_exact_logits(tokens(1, 2, 1300, 16, 20, 32))
    q[..., 0], k[..., 0] = 1.0, 0.0
    shifted = k.clone()
    shifted[..., 0] = offset
    plain, plain_grads = run((q, k, v_q, v_k), "cpu", scale=1.0)
    got, grads = run((q, shifted, v_q, v_k), "cpu", scale=1.0)
    for one, two in zip((*got, *grads[1:]), (*plain, *plain_grads[1:]), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * max(1, float(two.abs().max())))


@pytest.mark.parametrize("m", (40, 2))
def test_only_some_tiles_are_extreme(m):
    q, k, v_q, v_k = with_exact_logits(tokens(1, 1, 3000, 32, m, 32))
    q[:, :, 1000:1100] *= 64.0
    q[:, :, 2500] = 0.0
    assert_accurate((q, k, v_q, v_k), scale=0.125)


@pytest.mark.parametrize("masked", ("q", "k", "both"))
def test_everything_masked_gives_zeros_and_zero_gradients(masked):
    inputs = tokens(2, 2, 60, 16, 5, 32)
    q_mask, k_mask = torch.ones(2, 60, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    if masked != "k":
        q_mask[1] = False
    if masked != "q":
        k_mask[1] = False
    outputs, grads = run(inputs, "cpu", q_mask=q_mask, k_mask=k_mask)
    for value in (*outputs, *grads):
        assert value[1].abs().max() == 0
        assert value[0].abs().min(dim=-1).values.max() > 0 and torch.isfinite(value).all()


@pytest.mark.parametrize("m", (9, 3))
def test_what_masked_tokens_hold_reaches_nobody(m):
    inputs = tokens(2, 2, 130, 16, m, 16)
    q_mask = torch.arange(130).expand(2, -1) % 3 != 1
    k_mask = torch.arange(m).expand(2, -1) % 4 != 0
    clean, clean_grads = run(inputs, "cpu", q_mask=q_mask, k_mask=k_mask)
    inputs[0][:, :, 1::3], inputs[2][:, :, 1::3] = torch.nan, torch.inf
    inputs[1][:, :, 0::4], inputs[3][:, :, 0::4] = torch.inf, torch.nan
    got, grads = run(inputs, "cpu", q_mask=q_mask, k_mask=k_mask)
    for one, two in zip((*got, *grads), (*clean, *clean_grads), strict=True):
        assert torch.equal(one, two)
    assert got[0][:, :, 1::3].abs().max() == 0 and grads[3][:, :, 0::4].abs().max() == 0


def bi_multi_head_attention(q, k, v_q, v_k, scale, shift, clamp):
    """The attention of GLIP's BiMultiHeadAttention as published, v = dense side, l = the other."""
    weights = scale * (q @ k.transpose(-1, -2))
    if shift:
        weights = weights - weights.max()
    if clamp:
        weights = weights.clamp(-50000, 50000)
    transposed = weights.transpose(-1, -2)
    transposed = transposed - transposed.max(dim=-1, keepdim=True).values
    if clamp:
        transposed = transposed.clamp(-50000, 50000)
    return weights.softmax(-1) @ v_k, transposed.softmax(-1) @ v_q


@pytest.mark.parametrize(("shift", "clamp"), ((False, False), (True, False), (False, True), (True, True)))
def test_the_published_variants_give_the_same_numbers(shift, clamp):
    inputs = tokens(2, 4, 300, 32, 21, 32)
    expected = bi_multi_head_attention(*(value.double() for value in inputs), 32**-0.5, shift, clamp)
    with bti_fast.backend("cpu"):
        got = ops.cross_attention(*inputs)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    (
        lambda: tokens(1, 3, 5000, 32, 24, 32),
        lambda: tokens(1, 3, 5000, 32, 3, 32),
        lambda: extreme_tokens(2600, 21),
    ),
)
def test_the_number_of_threads_changes_no_bit(make):
    inputs, before = make(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(sum(results[0], []), sum(results[1], []), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("side", (7, 49))  # 49 tokens: 4x4 blocks of the tile's transposition and their rest
@pytest.mark.parametrize("m", (9, 2))
def test_channel_major_maps_keep_their_layout(side, m):
    inputs = tokens(2, 3, side * side, 32, m, 16)
    maps = [value.transpose(2, 3).contiguous().transpose(2, 3) for value in inputs]
    assert maps[0].stride()[2:] == (1, side * side)
    q_mask = torch.arange(side * side).expand(2, -1) % 11 != 4
    for options in ({}, {"q_mask": q_mask}):
        plain, plain_grads = run(inputs, "cpu", **options)
        got, grads = run(maps, "cpu", **options)
        assert [out.stride() for out in got] == [maps[2].stride(), maps[3].stride()]
        assert [grad.stride() for grad in grads] == [value.stride() for value in maps]
        for one, two in zip((*got, *grads), (*plain, *plain_grads), strict=True):
            assert torch.equal(one, two)


def peak_growth(code: str) -> float:
    """By how many MB the resident peak grows between the prints of a program's ``mark()``."""
    head = """
        import resource, torch, bti_fast
        from bti_fast import ops
        torch.set_num_threads(1)
        def mark(): print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        def attend(*inputs):
            with bti_fast.backend("cpu"): return ops.cross_attention(*inputs)
        attend(*(torch.randn(1, 1, 50, 16) for _ in range(4)))
    """
    program = textwrap.dedent(head) + textwrap.dedent(code)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    return after - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident peak as Linux reports it")
def test_memory_of_a_volume_grows_with_its_tokens_alone():
    """48³ tokens of 32 channels, channel-major: N·M would be 113 MB, and one copy of q 14 MB."""
    growth = peak_growth("""
        q, v = (torch.randn(1, 1, 32, 48**3).transpose(2, 3) for _ in range(2))
        k, w = torch.randn(1, 1, 256, 32), torch.randn(1, 1, 256, 32)
        mark()
        out = attend(q, k, v, w)
        mark()
    """)
    assert growth < 13.5 + 9  # out_q, its statistics, and partial sums of 64 splits
    growth = peak_growth("""
        q, v = (torch.randn(1, 1, 48**3, 32).requires_grad_() for _ in range(2))
        k, w = (torch.randn(1, 1, 256, 32).requires_grad_() for _ in range(2))
        gradients = torch.randn(1, 1, 48**3, 32), torch.randn(1, 1, 256, 32)
        mark()
        torch.autograd.grad(tuple(attend(q, k, v, w)), (q, k, v, w), gradients)
        mark()
    """)
    assert growth < 3 * 13.5 + 18


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    (
        ((1, 1, 9, 24, 3, 32), torch.float32, "q has head dimension 24"),
        ((1, 1, 9, 32, 3, 48), torch.float32, "v_k has head dimension 48"),
        ((1, 1, 9, 32, 257, 32), torch.float32, "k has 257 tokens"),
        ((1, 1, 9, 32, 3, 32), torch.float64, "float64"),
    ),
)
def test_what_it_leaves_to_sdpa_and_why(size, dtype, reason):
    inputs = [value.to(dtype) for value in tokens(*size)]
    why = OPERATOR.explain(*inputs, None, None, 0.5)
    assert reason in why["cpu"] and why["sdpa"] is None
    assert OPERATOR.choose(*inputs, None, None, 0.5).name == "sdpa"


def test_it_is_chosen_for_what_it_can_run():
    assert OPERATOR.choose(*tokens(1, 1, 9, 32, 3, 32), None, None, 0.5).name == "cpu"
