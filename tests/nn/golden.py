"""Reads the recorded numbers of the published code and compares modules with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bti_fast.models import keras_layout


class Golden:
    """One .npz of recorded numbers."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def leaf(self, key: str) -> Tensor:
        return self.tensor(key).clone().requires_grad_(True)

    def fill(self, layers: dict[str, nn.Module]) -> None:
        """Loads the weights `w.<name>.*` into each torch layer."""
        for name, layer in layers.items():
            keys = [f"w.{name}.{v.name}" for v in keras_layout.variables(layer)]
            keras_layout.assign(layer, [self.arrays[k] for k in keys], name)

    def weight_gradient_errors(
        self, layers: dict[str, nn.Module], prefix: str = "grad_w"
    ) -> dict[str, float]:
        """Relative error of every recorded weight gradient."""
        errors = {}
        for name, layer in layers.items():
            for variable in keras_layout.variables(layer):
                key = f"{prefix}.{name}.{variable.name}"
                if key in self.arrays:
                    truth = torch.from_numpy(np.ascontiguousarray(variable.transform(self.arrays[key])))
                    errors[key] = relative_error(keras_layout.target(layer, variable.tensor).grad, truth)
        return errors

    def weight_gradients(self, prefix: str = "grad_w") -> set[str]:
        return {k for k in self.arrays if k.startswith(prefix + ".")}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """max|found - truth| / max|truth|; fails on a shape mismatch, NaN compares as infinite."""
    assert found.shape == truth.shape, f"found {tuple(found.shape)}, needed {tuple(truth.shape)}"
    error = ((found.detach().double() - truth.double()).abs().max() / truth.double().abs().max()).item()
    return error if error == error else float("inf")


def keras_layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Every layer with a Keras counterpart below `module`, by dotted name."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        try:
            keras_layout.variables(child)
        except TypeError:
            found.update(keras_layers(child, f"{full}."))
        else:
            found[full] = child
    return found
