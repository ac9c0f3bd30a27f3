"""A linear layer at every position, against the same layer with the channels last."""

import pytest
import torch
from torch import nn

from bti_fast.nn.pointwise import pointwise


@pytest.mark.parametrize("spatial", [(7,), (3, 5), (2, 3, 1)])
@pytest.mark.parametrize("outputs", [1, 6])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other"])
def test_values_and_gradients(spatial, outputs, layout):
    torch.manual_seed(0)
    linear = nn.Linear(4, outputs)
    if layout == "channels last":
        x = torch.randn(3, *spatial, 4).movedim(-1, 1)
    else:
        x = torch.randn(3, 8, *spatial)[:, ::2] if layout == "every other" else torch.randn(3, 4, *spatial)
    wide, wide_x = nn.Linear(4, outputs).double(), x.double().requires_grad_()
    wide.load_state_dict(linear.state_dict())
    expected = wide(wide_x.movedim(1, -1)).movedim(-1, 1)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    x.requires_grad_()
    found = pointwise(linear, x)
    found.backward(grad.float())
    assert found.is_contiguous()
    for one, two in (
        (found, expected),
        (x.grad, wide_x.grad),
        (linear.weight.grad, wide.weight.grad),
        (linear.bias.grad, wide.bias.grad),
    ):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5)


def test_no_images():
    assert pointwise(nn.Linear(4, 2), torch.randn(0, 4, 5, 6)).shape == (0, 2, 5, 6)
