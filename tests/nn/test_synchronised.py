"""Synchronised batch normalisation against torch's own layer on the joint batch, in float64.

Two threads stand for two processes; the real thing is tested in tests/engine/test_many_devices.py.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bti_fast.nn import synchronised
from bti_fast.nn.blocks import ReluBatchNorm
from bti_fast.nn.interaction import GatedInteraction
from bti_fast.nn.normalised_silu import normalised_silu
from bti_fast.nn.synchronised import SynchronisedBatchNorm, synchronise

CPU = torch.device("cpu")


class Threads:
    """The part of torch.distributed that the layer calls, between threads."""

    def __init__(self, world: int) -> None:
        self.world, self.given = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=20)
        self.own = threading.local()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return self.world

    def all_gather(self, found: list[torch.Tensor], value: torch.Tensor) -> None:
        self.given[self.own.rank] = value.clone()
        self.barrier.wait()
        for target, source in zip(found, self.given, strict=True):
            target.copy_(source)
        self.barrier.wait()

    def all_reduce(self, value: torch.Tensor) -> None:
        found = [torch.empty_like(value) for _ in range(self.world)]
        self.all_gather(found, value)
        value.copy_(torch.stack(found).sum(0))

    def run(self, function):
        """function(rank) in every thread -> the results."""

        def begin(rank):
            self.own.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(begin, range(self.world)))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    found = Threads(2)
    monkeypatch.setattr(synchronised, "dist", found)
    return found


def split_run(threads, layer, parts, cotangents):
    """Every part through its own copy of the layer: outputs, input gradients, parameter gradients, layers."""

    def one(rank):
        mine, x = copy.deepcopy(layer), parts[rank].clone().requires_grad_()
        out = mine(x * 1)  # a copy, as some layers overwrite their input
        grads = torch.autograd.grad(out, (x, *mine.parameters()), cotangents[rank])
        return out.detach(), grads[0], grads[1:], mine

    return [list(column) for column in zip(*threads.run(one), strict=True)]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("base", "shape", "affine"),
    [
        (nn.BatchNorm1d, (4,), True),
        (nn.BatchNorm1d, (4,), False),
        (nn.BatchNorm2d, (4, 4, 7), True),
        (nn.BatchNorm2d, (4, 4, 7), False),
        (ReluBatchNorm, (4, 4, 7), True),
    ],
)
def test_parts_of_a_batch_give_what_the_whole_gives(threads, base, shape, affine, momentum):
    torch.manual_seed(0)
    truth = base(4, eps=1e-3, momentum=momentum, affine=affine).double()
    for parameter in truth.parameters():
        nn.init.normal_(parameter)
    layer = copy.deepcopy(truth)
    synchronise(layer, CPU)
    assert isinstance(layer, (base, SynchronisedBatchNorm))
    x = torch.randn(4, *shape, dtype=torch.float64) * 3 + 2
    cotangent = torch.randn_like(x)
    whole = x.clone().requires_grad_()
    wanted = truth(whole * 1)
    grads = torch.autograd.grad(wanted, (whole, *truth.parameters()), cotangent)
    cuts = (3, 1)  # one process has a single sample
    outs, inputs, weights, layers = split_run(threads, layer, x.split(cuts), cotangent.split(cuts))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(torch.cat(outs), wanted.detach())
    close(torch.cat(inputs), grads[0])
    for found, true in zip(zip(*weights, strict=True), grads[1:], strict=True):
        close(sum(found), true)
    for own in layers:
        for name, value in truth.named_buffers():
            close(own.get_buffer(name), value)


def test_single_precision_and_channels_last(threads):
    torch.manual_seed(0)
    truth = nn.BatchNorm2d(8, eps=1e-3)
    layer = copy.deepcopy(truth)
    synchronise(layer, CPU)
    x = torch.randn(4, 8, 6, 5).contiguous(memory_format=torch.channels_last) * 2 + 5
    cotangent = torch.randn_like(x)
    whole = x.double().requires_grad_()
    wanted = truth.double()(whole)
    grads = torch.autograd.grad(wanted, (whole, *truth.parameters()), cotangent.double())
    outs, inputs, weights, _ = split_run(threads, layer, x.chunk(2), cotangent.chunk(2))
    assert outs[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.cat(outs).double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(inputs).double(), grads[0], rtol=1e-5, atol=1e-5)
    for found, true in zip(zip(*weights, strict=True), grads[1:], strict=True):
        torch.testing.assert_close(sum(found).double(), true, rtol=1e-5, atol=1e-5)


def test_layers_that_use_the_statistics_themselves_share_them_too(threads):
    """The recomputing activation, and the paper's module, whose operator normalises inside."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.exchange = nn.BatchNorm2d(6), GatedInteraction(6, 5)

        def forward(self, x):
            x = normalised_silu(self.norm, x)
            out = self.exchange(x, x.mean((2, 3))[:, :5])
            return torch.cat((out.seg.flatten(1), out.cls), 1)

    truth = Both().double()
    layer = copy.deepcopy(truth)
    synchronise(layer, CPU)
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    wanted = truth(whole)
    cotangent = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (whole, *truth.parameters()), cotangent)
    outs, inputs, weights, layers = split_run(threads, layer, x.split((1, 3)), cotangent.split((1, 3)))
    torch.testing.assert_close(torch.cat(outs), wanted.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat(inputs), grads[0], rtol=1e-9, atol=1e-9)
    for found, true in zip(zip(*weights, strict=True), grads[1:], strict=True):
        torch.testing.assert_close(sum(found), true, rtol=1e-9, atol=1e-9)
    for name in ("norm.running_var", "exchange.tim.s2c_bn.running_mean", "exchange.tim.s2c_bn.running_var"):
        at_one = truth.get_buffer(name)
        assert not torch.equal(at_one, Both().get_buffer(name))
    torch.testing.assert_close(layers[1].norm.running_var, truth.norm.running_var)


def test_one_value_a_channel_is_refused(threads):
    layer = nn.BatchNorm1d(3)
    synchronise(layer, CPU)
    threads.world = 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, 3))


def test_in_evaluation_and_alone_it_is_the_usual_layer():
    plain = nn.BatchNorm2d(3)
    shared = copy.deepcopy(plain)
    synchronise(shared, CPU)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(shared(x), plain(x))
    assert torch.equal(shared.eval()(x), plain.eval()(x))
    assert shared.state_dict().keys() == plain.state_dict().keys()


def test_on_gpus_it_is_torchs_and_relu_stays_first():
    model = nn.Sequential(ReluBatchNorm(3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    weight = model[0].weight
    synchronise(model, torch.device("cuda"))
    order = type(model[0]).__mro__
    assert order.index(ReluBatchNorm) < order.index(nn.SyncBatchNorm)
    assert isinstance(model[1], nn.SyncBatchNorm) and type(model[2]) is nn.Linear
    assert model[0].weight is weight
    synchronise(model, torch.device("cuda"))  # a second time changes nothing
    assert type(model[0]).__mro__ == order
