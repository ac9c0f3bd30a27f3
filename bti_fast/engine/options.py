"""Settings as dataclasses: one field, one default, one sentence of help, one check."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from os import PathLike
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bti_fast.errors import UserError


def option(
    default: Any, help: str, group: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field that carries its help text, its group in `--help` and its closed range."""
    return field(default=default, metadata={"help": help, "group": group, "low": low, "high": high})


def flag(name: str) -> str:
    """The command-line spelling of a setting: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def check_ranges(config: Any) -> None:
    """Raises UserError, naming the flag, where a setting has a wrong type or is out of range."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(
                f"{flag(item.name)} {value}: must be one of {', '.join(map(str, get_args(hint)))}"
            )
        optional = type(None) in get_args(hint)
        if value is None:
            if not optional:
                raise UserError(f"{flag(item.name)}: has no value; give one or leave it out")
            continue
        hint = get_args(hint)[0] if optional else hint
        if hint in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, hint))):
            raise UserError(
                f"{flag(item.name)} {value!r}: must be {'a whole number' if hint is int else 'a number'}"
            )
        if hint is bool and not isinstance(value, bool):
            raise UserError(f"{flag(item.name)} {value!r}: must be true or false")
        if hint is str and not isinstance(value, (str, PathLike)):
            raise UserError(f"{flag(item.name)} {value!r}: must be text")
        low, high = item.metadata["low"], item.metadata["high"]
        if low is not None and not low <= value <= high:
            raise UserError(f"{flag(item.name)} {value}: must lie between {low:g} and {high:g}")


def from_dict(cls: type, values: dict[str, Any], source: str) -> Any:
    """Builds a config of type cls from plain values; UserError names source and any unknown setting."""
    known = {item.name for item in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"{source}: unknown setting {unknown[0]!r}")
    hints = get_type_hints(cls)
    plain = {
        name: tuple(v) if get_origin(hints[name]) is tuple and isinstance(v, list) else v
        for name, v in values.items()
    }
    return cls(**plain)
