"""The Triton kernels of task_interaction's gate algebra: values, gradients, and how many launches."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from bti_fast.kernels.gate_algebra import gate_algebra  # noqa: E402
from bti_fast.kernels.gate_algebra_backward import gate_algebra_backward  # noqa: E402
from triton.runtime.interpreter import GridExecutor  # noqa: E402

from bti_fast.ops import TaskInteractionWeights  # noqa: E402
from bti_fast.ops import task_interaction_passes as passes  # noqa: E402
from bti_fast.reference.task_interaction import gate_algebra as reference  # noqa: E402
from tests.ops.operators import interaction_inputs  # noqa: E402

# (B, C, F): less than a block of everything; more than one of samples, and of channels and features.
SIZES = ((3, 3, 2), (35, 6, 19), (2, 134, 131))


def made(batch, channels, features):
    """float32 summary, y, all weights and cotangents of scale, y', gates and signals."""
    inputs = interaction_inputs((batch, channels, 9), torch.Generator().manual_seed(0), features)
    x, y, *weights = (value.float() for value in inputs.values())
    generator = torch.Generator().manual_seed(1)
    summary = torch.rand(batch, channels + weights[0].shape[0] + 1, generator=generator)
    summary[:, :channels] -= 0.5
    shapes = (batch, channels), (batch, features), (batch, 2), (batch, 3)
    return summary, y, weights, [torch.randn(shape, generator=generator) for shape in shapes]


def close(got, truth, rtol, among=()):
    """By the largest true value; by 1 % of its peers' where it is mathematically zero."""
    peak = max((float(value.abs().max()) for value in among), default=0.0)
    assert (got.double() - truth).abs().max() <= rtol * max(float(truth.abs().max()), 0.01 * peak)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, training):
    summary, y, weights, cotangents = made(*size)

    def exact(summary, y, rest):
        w = TaskInteractionWeights(*[value.double() for value in weights[:2]], *rest)
        return tuple(reference(summary, y, w, 0.7, training))

    primals = summary.double(), y.double(), [value.double() for value in weights[2:]]
    truth, pull_back = torch.func.vjp(exact, *primals)
    zeros = [torch.zeros_like(value) for value in truth[4:]]
    grads = pull_back((*[value.double() for value in cotangents], *zeros))

    got = gate_algebra(summary, y, weights[2:], 0.7, training)
    for value, expected in zip(got, truth, strict=True):
        close(value, expected, 1e-5)
    scale, *rest = gate_algebra_backward(*cotangents, summary, y, weights[2:], 0.7, training)
    close(scale, truth[0], 1e-5)
    truths = [*grads[:2], *grads[2]]
    for value, expected in zip((*rest[:2], *rest[2]), truths, strict=True):
        close(value, expected, 1e-4, truths)


def test_gradients_come_in_the_dtype_of_each_weight():
    summary, y, weights, cotangents = made(4, 6, 5)
    weights[8] = weights[8].bfloat16()
    weights[12] = weights[12].half()
    _, _, grad_y, grads = gate_algebra_backward(*cotangents, summary, y.half(), weights[2:], 0.7, True)
    assert grad_y.dtype == torch.float16
    assert [value.dtype for value in grads] == [value.dtype for value in weights[2:]]


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given: kernels, and those of PyTorch's operators that are not views."""

    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")

    def __init__(self, monkeypatch):
        super().__init__()
        self.kernels, self.operators = [], []
        monkeypatch.setattr(
            GridExecutor, "__call__", lambda kernel, *args, **kwargs: self.kernels.append(kernel.fn.__name__)
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in self.FREE and not function.is_view:
            self.operators.append(name)
        return out


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_few_launches(dtype, training, monkeypatch):
    """4 or 5 forward, 6 or 8 backward; with a gate algebra in PyTorch 60 and 180 (training, float32)."""
    inputs = interaction_inputs((4, 6, 9, 8), torch.Generator().manual_seed(0))
    x, y, *weights = (value.to(dtype) for value in inputs.values())
    with Launches(monkeypatch) as forward:
        out = passes.forward(x, y, weights, 0.7, training)
    with Launches(monkeypatch) as backward:
        passes.backward(x, y, out[2], out[3], x, y, out[6], weights, 0.7, training)
    passes_over_x = ["statistics_kernel", "sum_rows_kernel", "modulate_kernel"]
    assert sorted(forward.kernels) == sorted(
        [*passes_over_x, "gate_kernel", *["normalise_kernel"] * training]
    )
    assert len(backward.kernels) == 6 + 2 * training
    assert forward.operators == [] and backward.operators == []
