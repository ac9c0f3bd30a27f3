"""How Keras lays out the weights of a layer, and how they become a torch module's tensors: one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bti_fast.nn.blocks import SeparableConv

Transform = Callable[[np.ndarray], np.ndarray]


class KerasVariable(NamedTuple):
    """One Keras variable: its conventional name, the torch tensor it fills, and the change of layout."""

    name: str
    tensor: str
    transform: Transform


def _as_is(a: np.ndarray) -> np.ndarray:
    return a


def _conv(a: np.ndarray) -> np.ndarray:  # HWIO -> OIHW; transposed: HW,out,in -> in,out,HW
    return a.transpose(3, 2, 0, 1)


def _depthwise(a: np.ndarray) -> np.ndarray:  # H,W,C,1 -> C,1,H,W
    return a.transpose(2, 3, 0, 1)


def _dense(a: np.ndarray) -> np.ndarray:  # in,out -> out,in; also a 1x1 convolution 1,1,in,out
    return a.reshape(a.shape[-2:]).T


def variables(module: nn.Module) -> list[KerasVariable]:
    """The Keras variables of a torch layer, in the order in which Keras stores them.

    TypeError for a layer that has no Keras counterpart here.
    """
    if isinstance(module, SeparableConv):
        return [
            KerasVariable("dw", "depthwise.weight", _depthwise),
            KerasVariable("pw", "pointwise.weight", _conv),
            KerasVariable("bias", "pointwise.bias", _as_is),
        ]
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return [
            KerasVariable("gamma", "weight", _as_is),
            KerasVariable("beta", "bias", _as_is),
            KerasVariable("mean", "running_mean", _as_is),
            KerasVariable("var", "running_var", _as_is),
        ]
    if isinstance(module, nn.Linear):
        kernel = _dense
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        kernel = _depthwise
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        kernel = _conv
    else:
        raise TypeError(f"module: found {type(module).__name__}, which has no Keras layout here")
    found = [KerasVariable("kernel", "weight", kernel)]
    if module.bias is not None:
        found.append(KerasVariable("bias", "bias", _as_is))
    return found


def target(module: nn.Module, tensor: str) -> Tensor:
    """The parameter or buffer of `module` with this dotted name."""
    owner, _, leaf = tensor.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


@torch.no_grad()
def assign(module: nn.Module, arrays: Sequence[np.ndarray], where: str) -> None:
    """Fills a torch layer with the Keras arrays of the layer called `where`.

    ValueError naming the layer where the number of arrays or a shape is not what the torch layer needs.
    """
    needed = variables(module)
    if len(arrays) != len(needed):
        names = ", ".join(v.name for v in needed)
        raise ValueError(f"layer {where}: found {len(arrays)} arrays, needed {len(needed)} ({names})")
    for variable, array in zip(needed, arrays, strict=True):
        tensor = target(module, variable.tensor)
        try:
            value = variable.transform(array)
        except ValueError:  # too few axes for the change of layout
            value = array
        if tuple(value.shape) != tuple(tensor.shape):
            raise ValueError(
                f"layer {where}, {variable.name}: found shape {tuple(array.shape)}, which does not give "
                f"the {tuple(tensor.shape)} needed here"
            )
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(value)))
