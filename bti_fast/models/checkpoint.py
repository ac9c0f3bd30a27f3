"""Files of weights: safetensors with the configuration as JSON in the metadata, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from bti_fast.errors import UserError

FORMAT = "bti_fast.BTINet/1"


class Stored(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    classes: tuple[str, ...] | None
    metadata: dict[str, Any]


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    classes: tuple[str, ...] | None,
    metadata: Mapping[str, Any],
) -> None:
    """Writes a file of weights; an interrupted write leaves what was there before.

    UserError for an unwritable path, TypeError for metadata that JSON cannot hold.
    """
    from safetensors.torch import save_file

    path = Path(path)
    header = {
        "format": FORMAT,
        "config": json.dumps(dict(config)),
        "classes": json.dumps(classes),
        "metadata": json.dumps(dict(metadata)),
    }
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        save_file(dense, temporary, metadata=header)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as cause:
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause})") from cause
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def read(path: str | Path) -> Stored:
    """Reads a file of weights. UserError naming the file where it is missing, truncated, or not ours."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(
                    f"{path}: not a BTINet checkpoint (format {header.get('format')!r}, needed {FORMAT!r})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as cause:
        raise UserError(f"{path}: damaged, truncated, or not a safetensors file ({cause})") from cause
    try:
        config, classes, metadata = (json.loads(header[key]) for key in ("config", "classes", "metadata"))
    except (KeyError, ValueError) as cause:
        raise UserError(f"{path}: its configuration cannot be read ({cause})") from cause
    if not isinstance(config, dict) or not isinstance(metadata, dict):
        raise UserError(f"{path}: its configuration cannot be read (found {type(config).__name__})")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise UserError(f"{path}: its class names cannot be read (found {classes!r})")
    return Stored(tensors, config, None if classes is None else tuple(classes), metadata)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Loads the tensors; UserError naming the file and the first tensor that does not fit."""
    needed = model.state_dict()
    for name in (*needed, *tensors):
        if name not in tensors:
            raise UserError(f"{path}: of another configuration: {name} is missing")
        if name not in needed:
            raise UserError(f"{path}: of another configuration: {name} is not part of this network")
        if tensors[name].shape != needed[name].shape:
            raise UserError(
                f"{path}: of another configuration: {name} has shape {tuple(tensors[name].shape)}, "
                f"needed {tuple(needed[name].shape)}"
            )
    model.load_state_dict(tensors)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
