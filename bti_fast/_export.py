"""Named tuples that torch.export.save can write: those that operators and modules return."""

from __future__ import annotations

from typing import TypeVar

from torch.utils import _pytree

T = TypeVar("T", bound=type)


def exportable(cls: T) -> T:
    """A decorator that gives a named tuple a name in saved programs; PyTorch has no public way to."""
    register = getattr(_pytree, "_register_namedtuple", None)
    if register is not None:
        register(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls
