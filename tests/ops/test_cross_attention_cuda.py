"""The cuda backend of cross_attention as far as it shows without a GPU: when it is chosen, and why not."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from bti_fast.ops import OPERATORS
from tests.ops.operators import pairs

OPERATOR = OPERATORS["cross_attention"]
module = importlib.import_module("bti_fast.ops.cross_attention")


def test_the_contract_covers_it_on_a_gpu():
    assert {"cross_attention", "cross_attention_masked"} <= {case.name for case, _ in pairs(("cuda",))}


def test_it_comes_before_sdpa_and_names_its_reason():
    order = [name for name in OPERATOR.order if name in OPERATOR.backends]
    assert order.index("cuda") < order.index("sdpa")
    tokens = [torch.zeros(1, 1, 4, 16) for _ in range(4)]
    assert "needs cuda tensors, got cpu" in OPERATOR.explain(*tokens, None, None, 1.0)["cuda"]


@pytest.mark.parametrize(("shared", "fits"), ((99 * 1024, False), (163 * 1024, True), (227 * 1024, True)))
def test_gpus_with_little_shared_memory_are_left_to_sdpa(monkeypatch, shared, fits):
    properties = SimpleNamespace(name="GPU", shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    module._too_small.cache_clear()
    reason = module._too_small("cuda:0")
    module._too_small.cache_clear()
    assert reason is None if fits else f"GPU has {shared} bytes of shared memory" in reason
