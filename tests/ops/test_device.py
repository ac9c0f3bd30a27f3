"""Operators on a GPU that is not the current one, as far as it shows without two of them."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from bti_fast.ops.backends import on_its_device


def test_triton_launches_on_the_device_of_its_tensors(monkeypatch):
    current = [0]

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    run = on_its_device(lambda *args: current[0])
    assert run(SimpleNamespace(device=torch.device("cuda", 1)), 0.7) == 1
    assert current == [0]
    assert run(torch.zeros(1)) == 0
