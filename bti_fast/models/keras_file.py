"""Reads a .keras file (a zip with config.json and model.weights.h5) without TensorFlow or Keras."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bti_fast.errors import UserError

CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # Keras 3 and 2.14 on; Keras 2.12 and 2.13


class Layer(NamedTuple):
    """One node of the graph."""

    name: str
    kind: str  # the Keras class
    config: dict[str, Any]
    inputs: tuple[str, ...]  # names of the layers it reads, in the order of its arguments


class KerasFile:
    """The graph and the weights of a functional Keras model.

    UserError naming the file where it is missing, damaged, or not a functional model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config, weights = _read_members(self.path)
        if config.get("class_name") not in ("Functional", "Model"):
            raise UserError(
                f"{self.path}: found a {config.get('class_name')!r} model, needed a functional Keras model"
            )
        try:
            graph = config["config"]
            self.layers = {entry["config"]["name"]: _layer(entry) for entry in graph["layers"]}
            self.outputs = tuple(entry[0] for entry in _output_list(graph["output_layers"]))
        except (KeyError, TypeError, IndexError) as cause:
            raise UserError(
                f"{self.path}: config.json does not describe a Keras graph ({cause!r})"
            ) from cause
        self._arrays, names = _read_arrays(weights, self.path)
        self._groups = self._group_names() | names
        self._unread = set(self._arrays)

    def layer(self, name: str, kind: str) -> Layer:
        """The layer of this name; UserError where it is missing or of another class."""
        if name not in self.layers:
            raise UserError(f"{self.path}: layer {name}: missing, needed a {kind}")
        found = self.layers[name]
        if found.kind != kind:
            raise UserError(f"{self.path}: layer {name}: found a {found.kind}, needed a {kind}")
        return found

    def arrays(self, layer: str, inside: str = "") -> list[np.ndarray]:
        """The variables of a layer, or of the layer at the path `inside` it, in Keras' order."""
        prefix = "/".join(part for part in (self._groups[layer], inside, "vars") if part) + "/"
        keys = sorted(
            (k for k in self._arrays if k.startswith(prefix)), key=lambda k: int(k.rpartition("/")[2])
        )
        self._unread.difference_update(keys)
        return [self._arrays[k] for k in keys]

    def unread(self) -> Iterator[str]:
        """Names of the layers that hold weights nobody asked for."""
        owners = {group: name for name, group in self._groups.items()}
        for key in sorted(self._unread):
            yield owners.get(key.split("/")[0], key)

    def _group_names(self) -> dict[str, str]:
        """Layer name -> its group in the weight file: the class in snake case, counted in the graph's order.

        Older files do not state the names, and this is Keras' rule for them.
        """
        seen: Counter[str] = Counter()
        groups = {}
        for layer in self.layers.values():
            snake = _snake_case(layer.kind)
            groups[layer.name] = f"{snake}_{seen[snake]}" if seen[snake] else snake
            seen[snake] += 1
        return groups


def _read_members(path: Path) -> tuple[dict[str, Any], bytes]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    except KeyError as cause:
        raise UserError(f"{path}: not a .keras file ({cause.args[0]})") from cause
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as cause:
        raise UserError(f"{path}: damaged, truncated, or not a .keras file ({cause})") from cause


def _read_arrays(weights: bytes, path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every array by its path below the container, "conv2d_1/vars/0", and the layer names the file states."""
    try:
        import h5py
    except Exception as cause:
        raise UserError(f"{path}: reading it needs h5py, which cannot be imported ({cause})") from cause
    arrays: dict[str, np.ndarray] = {}
    names: dict[str, str] = {}
    try:
        with h5py.File(io.BytesIO(weights), "r") as file:

            def collect(name: str, item: object) -> None:
                parts = name.replace("\\", "/").split("/")
                if parts[0] not in CONTAINERS or "seed_generator" in parts:
                    return  # the optimiser's state, or a dropout's
                if isinstance(item, h5py.Dataset):
                    inner = ["layers" if part in CONTAINERS else part for part in parts[1:]]
                    arrays["/".join(inner)] = item[()]
                elif len(parts) == 3 and parts[2] == "vars" and "name" in item.attrs:
                    names[str(item.attrs["name"])] = parts[1]

            file.visititems(collect)
    except (OSError, RuntimeError) as cause:
        raise UserError(f"{path}: its model.weights.h5 is damaged ({cause})") from cause
    if not arrays:
        raise UserError(f"{path}: its model.weights.h5 holds no layers")
    return arrays, names


def _layer(entry: dict[str, Any]) -> Layer:
    config = entry["config"]
    return Layer(
        config["name"], entry["class_name"], config, tuple(_histories(entry.get("inbound_nodes", [])))
    )


def _histories(node: Any) -> Iterator[str]:
    """The layers whose outputs a call reads, in both spellings: Keras 3's objects and Keras 2's lists."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            yield node["config"]["keras_history"][0]
            return
        for value in node.values():
            yield from _histories(value)
    elif isinstance(node, list):
        if (
            len(node) >= 3
            and isinstance(node[0], str)
            and isinstance(node[1], int)
            and isinstance(node[2], int)
        ):
            yield node[0]
            for extra in node[3:]:
                yield from _histories(extra)
            return
        for value in node:
            yield from _histories(value)


def _output_list(outputs: list[Any]) -> list[list[Any]]:
    return [outputs] if outputs and isinstance(outputs[0], str) else outputs


def _snake_case(name: str) -> str:
    """Keras' own rule: "Conv2DTranspose" -> "conv2d_transpose"."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
