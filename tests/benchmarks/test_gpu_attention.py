"""The GPU benchmark of cross_attention, as far as it runs without one."""

import pytest
import torch

from benchmarks import gpu, gpu_attention


def row(provider, milliseconds, mode="forward", m=16):
    times = {"p50": milliseconds} if milliseconds else {"reason": "No available kernel"}
    return {"class_tokens": m, "mode": mode, "provider": provider, **times}


ROWS = [row("bti_fast", 2.0), row("flash", 5.0), row("efficient", 4.0), row("cudnn", None), row("maths", 1.0)]


def test_the_best_pinned_pair_is_what_counts():
    assert gpu_attention.against_best(ROWS) == [
        {"class_tokens": 16, "mode": "forward", "best": "efficient", "times_faster": 2.0}
    ]
    assert gpu_attention.against_best([row("bti_fast", None), row("flash", 1.0)]) == []


def test_share_of_copy_counts_the_least_traffic():
    # A copy moves two tensors, the forward three, forward and backward eight.
    shares = gpu_attention.with_shares([row("bti_fast", 2.0), row("flash", 8.0, "forward+backward")], 1.0)
    assert [one["share_of_copy"] for one in shares] == [0.75, 0.5]
    assert "share_of_copy" not in gpu_attention.with_shares([row("cudnn", None)], 1.0)[0]
    assert "n/a: No available kernel" in gpu_attention.line(row("cudnn", None))


@pytest.mark.parametrize("layout", ("tokens", "maps"))
def test_providers_compute_the_same(layout):
    tokens = gpu_attention.inputs(5, layout, batch=1, n=60, device="cpu")
    assert tokens[0].stride(2 if layout == "maps" else 3) == 1
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = gpu_attention.maths(*(value.double() for value in tokens))
        for call in (gpu_attention.fused, gpu_attention.maths):
            for got, expected in zip(call(*tokens), truth, strict=True):
                assert (got - expected).abs().max() < 0.02
    assert set(gpu_attention.PINNED) < set(gpu_attention.providers())


def test_attention_is_a_step():
    assert "attention" in gpu.STEPS
