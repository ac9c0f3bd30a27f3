"""What the processes of a training tell each other; in a single process everything stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bti_fast.engine.place import Place
from bti_fast.errors import UserError

Value = TypeVar("Value")
# The first process may read a large data set, or write the report, while the others wait.
PATIENCE = timedelta(minutes=30)
# How gloo and NCCL say that another process is not there any more.
_NETWORK = re.compile(r"gloo|nccl|tcpstore|distributed", re.IGNORECASE)
_LOST = re.compile(r"closed|reset|refused|broken pipe|timed out|timeout|remote|peer|heartbeat", re.IGNORECASE)


class EchoedError(UserError):
    """Another process has failed, and says why itself."""


class OwnError(UserError):
    """An error of this process alone, which the first one does not know of."""

    own = True


class LostProcessError(OwnError):
    """Another process of the training has ended: the cause lies there."""


@contextmanager
def group(place: Place, device: torch.device) -> Iterator[None]:
    """Within: the processes can talk, over gloo on a CPU and over NCCL on GPUs; one alone needs no group.

    UserError where they do not find each other; LostProcessError where another one ends in the middle.
    """
    if place.world == 1:
        yield
        return
    # CPU tensors and objects travel over gloo in either case.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as cause:
        why = str(cause).splitlines()[0]
        raise UserError(f"the {place.world} processes could not connect ({why})") from cause
    try:
        yield
    except RuntimeError as cause:
        if _means_lost(cause):
            raise LostProcessError("another process of this training was killed or failed") from cause
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def said_by_main() -> Iterator[None]:
    """Within, all processes do the same: what is wrong in the first one is wrong, and said, there."""
    try:
        yield
    except UserError as error:
        if rank() == 0 or isinstance(error, EchoedError):
            raise
        raise EchoedError(str(error)) from error


@contextmanager
def said_by_each() -> Iterator[None]:
    """Within, a process other than the first says itself what is wrong in it."""
    try:
        yield
    except UserError as error:
        if rank() == 0 or isinstance(error, EchoedError):
            raise
        raise OwnError(str(error)) from error


def joined() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if joined() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if joined() else 1


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if joined():
        from_main(lambda: None)


def from_main(function: Callable[[], Value]) -> Value:
    """What function returns in the first process, which alone calls it; EchoedError where it failed there."""
    if not joined():
        return function()
    found: list[Any] = [None, False]
    if rank() == 0:
        try:
            found = [function(), True]
        finally:
            dist.broadcast_object_list(found, src=0)
    else:
        dist.broadcast_object_list(found, src=0)
        if not found[1]:
            raise EchoedError("the first process failed")
    return found[0]


def added_up(sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Pairs added up over the processes by name; a name may be missing in some of them."""
    if not joined():
        return dict(sums)
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, dict(sums))
    total: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(name for own in found for name in own):
        pairs = [own[name] for own in found if name in own]
        total[name] = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return total


def joint_sum(values: Tensor) -> Tensor:
    """The sum of a tensor of one shape over the processes; no gradient."""
    if joined():
        values = values.detach().clone()
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> tuple[Tensor, slice]:
    """values (n, ...) of all processes behind each other, and where this one's lie; n may differ."""
    if not joined():
        return values, slice(0, len(values))
    counts = torch.zeros(world(), dtype=torch.int64, device=values.device)
    counts[rank()] = len(values)
    dist.all_reduce(counts)
    lengths = counts.tolist()
    padded = values.new_zeros((max(lengths), *values.shape[1:]))
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    start = sum(lengths[: rank()])
    joint = torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])
    return joint, slice(start, start + lengths[rank()])


def _means_lost(cause: RuntimeError) -> bool:
    text = str(cause)
    return isinstance(cause, dist.DistError) or bool(_NETWORK.search(text) and _LOST.search(text))
