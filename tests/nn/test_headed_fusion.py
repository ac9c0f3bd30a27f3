"""Gated fusion with its head in the same passes, against the head and then the reference, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bti_fast
from bti_fast import _library
from bti_fast.nn import GatedInteraction
from bti_fast.nn import headed_fusion as module_of_it
from bti_fast.nn.headed_fusion import headed_fusion
from bti_fast.ops.dispatch import BackendUnavailable

compiled = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))
CASES = [  # (B, C, *spatial), K
    ((1, 1, 1), 1),
    ((3, 7, 100), 2),
    ((2, 48, 45, 33), 1),  # several tiles
    ((2, 5, 3, 4, 6), 3),
    ((3, 390, 9, 8), 1),  # more channels than fit a tile of many pixels
    ((1, 33, 37, 41), 4),
]
NAMES = ("x", "head", "bias", "prior", "cls_uncertainty", "coeffs")


def made(shape, classes: int, dtype=torch.float32) -> tuple[nn.Linear, list[Tensor]]:
    """The head, and x, prior, class uncertainty and coefficients."""
    torch.manual_seed(0)
    batch, channels, *_ = shape
    head = nn.Linear(channels, classes)
    operands = [torch.randn(shape), torch.rand(batch, channels), torch.rand(batch), torch.randn(3)]
    return head.to(dtype), [value.to(dtype) for value in operands]


def computed(head: nn.Linear, operands: list[Tensor], *, gradients: bool = True) -> list[Tensor]:
    """All outputs, then the gradients of everything for fixed cotangents of all outputs."""
    leaves = [value.detach().requires_grad_(gradients) for value in operands]
    fused, logits = headed_fusion(head, *leaves, 0.7)
    outputs = [*fused, logits]
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    found = torch.autograd.grad(outputs, (*leaves, head.weight, head.bias), cotangents)
    return [out.detach() for out in outputs] + list(found)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("shape", "classes"), CASES, ids=str)
def test_outputs_and_gradients_of_every_instruction_set(isa, shape, classes, layout):
    head, operands = made(shape, classes)
    exact = copy.deepcopy(head).double(), [value.double() for value in operands]
    with bti_fast.backend("reference"):
        expected = computed(*exact)
        eager = computed(head, operands)
    if layout == "channels_last":
        operands[0] = operands[0].movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        operands[0] = torch.cat((operands[0], operands[0]), -1)[..., : shape[-1]]
    got = computed(head, operands)
    for number, (one, two, plain) in enumerate(zip(got, expected, eager, strict=True)):
        error, lost = ((value.double() - two).abs().max() for value in (one, plain))
        budget = 2 if number < 5 else 3  # of what the reference loses in the same dtype, SPEC section 2
        scale = two.abs().max()
        assert error <= max(budget * lost, 1e-6 * scale), number
        assert error <= (1e-5 if number < 5 else 1e-4) * scale, number
    if layout != "strided":
        assert got[0].stride() == operands[0].stride()


@compiled
@pytest.mark.parametrize(("shape", "classes"), CASES, ids=str)
def test_threads_and_runs_change_no_bit(shape, classes):
    head, operands = made(shape, classes)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            results.append(computed(head, operands))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@compiled
def test_nan_stays_in_its_sample():
    head, operands = made((3, 6, 11, 7), 1)
    clean = computed(head, operands)
    operands[0][1, 2, 3, 4] = torch.nan
    dirty = computed(head, operands)
    for one, other in zip(clean[:6], dirty[:6], strict=True):  # the outputs and the gradient of x
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert dirty[0][1].isnan().any() and dirty[4][1, 0, 3, 4].isnan()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty_maps(shape):
    head, operands = made(shape, 2)
    got = computed(head, operands)
    assert got[0].shape == shape and got[4].shape == (shape[0], 2, *shape[2:])
    assert not got[-2].any() and not got[-1].any()


def test_forced_backends_are_obeyed(monkeypatch):
    head, operands = made((2, 6, 5, 5), 1)
    expected = computed(head, operands, gradients=False)
    monkeypatch.setattr(module_of_it, "_HeadedFusion", None)
    with bti_fast.backend("reference"):
        got = computed(head, operands, gradients=False)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    with pytest.raises(BackendUnavailable, match="cuda"), bti_fast.backend("cuda"):
        headed_fusion(head, *operands, 0.7)


@compiled
def test_second_derivatives():
    head, operands = made((1, 2, 3), 1)
    leaves = [value.requires_grad_() for value in operands]

    def square(*values):
        fused, logits = headed_fusion(head, *values, 0.7)
        (grad,) = torch.autograd.grad((fused.x.square().sum() + logits.sum()), values[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), values)

    got = square(*leaves)
    exact = head.double(), [value.detach().double().requires_grad_() for value in operands]
    with bti_fast.backend("reference"):
        expected = square(*exact[1])
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_the_module_gives_what_it_gives_with_the_same_logits_from_outside(memory_format):
    torch.manual_seed(0)
    module = GatedInteraction(12, 16, uncertainty="entropy", cls_classes=3, seg_classes=2)
    seg = torch.randn(2, 12, 9, 10).contiguous(memory_format=memory_format)
    cls = torch.randn(2, 16)
    own = module(seg, cls)
    given = module(seg, cls, own.seg_logits.detach(), own.cls_logits.detach())
    assert given.seg_logits is None and given.cls_logits is None
    for one, two in zip(own[:4], given[:4], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_transforms_autocast_and_export():
    torch.manual_seed(0)
    module = GatedInteraction(12, 16, uncertainty="entropy", cls_classes=3)
    seg, cls = torch.randn(2, 12, 5, 6), torch.randn(2, 16)
    expected = module(seg, cls)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(seg, cls).seg.shape == seg.shape
    exported = torch.export.export(module, (seg, cls)).module()
    torch.testing.assert_close(exported(seg, cls).seg, expected.seg, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True, backend="aot_eager")(seg, cls).seg,
        expected.seg,
        rtol=1e-5,
        atol=1e-6,
    )
    _, tangent = torch.func.jvp(lambda x: module(x, cls).seg, (seg,), (torch.zeros_like(seg),))
    assert not tangent.any()
