"""Starts the processes of a training on this machine, and ends them all where one of them ends badly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOBase
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console

from bti_fast.engine.collective import EchoedError, LostProcessError
from bti_fast.engine.place import Place
from bti_fast.errors import UserError

# Seconds in which the processes that a failure drags along end, so that the first cause is told from them.
GRACE = 3.0
SAID, FAILED, ECHOED = "said", "failed", "echoed"


class EndedError(UserError):
    """A process was killed or failed, so the training has ended."""


def launch(
    places: Sequence[Place],
    address: Mapping[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    console: Console | None = None,
) -> None:
    """Calls function(*arguments, place, console) in a fresh process a place, and returns when all are done.

    address: MASTER_ADDR and MASTER_PORT. What the processes say goes to the console. The arguments must
    be picklable. Where a process raises UserError, the others are ended and it is raised here; where one is
    killed or fails otherwise (which shows its traceback), EndedError says so.
    """
    context = multiprocessing.get_context("spawn")
    own_screen = console is None or console.file is None or console.stderr
    width = None if own_screen else console.width
    # As bytes: given as they are, tensors would lie in memory that the processes share.
    call = pickle.dumps((function, arguments))
    workers: list[tuple[Any, Connection]] = []
    try:
        with _interrupts_ignored():  # which the new processes inherit: Ctrl-C is for this one to handle
            for place in places:
                receiver, sender = context.Pipe(duplex=False)
                work = (sender, {**address, **place.environment()}, width, call, place)
                process = context.Process(target=_work, args=work)
                process.start()
                sender.close()
                workers.append((process, receiver))
        _watch(places, workers, console)
    finally:
        for process, _ in workers:
            process.kill()  # harmless at any moment: files of a run appear whole or not at all
        for process, receiver in workers:
            process.join()
            receiver.close()


def _work(
    sender: Connection,
    environment: Mapping[str, str],
    width: int | None,
    call: bytes,
    place: Place,
) -> None:
    """The whole of a started process."""
    os.environ.update(environment)
    function, arguments = pickle.loads(call)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    console = Console(stderr=True) if width is None else Console(file=_Sender(sender), width=width)
    try:
        function(*arguments, place, console)
    except (EchoedError, LostProcessError) as error:
        sender.send((ECHOED, str(error)))
        raise SystemExit(1) from None
    except UserError as error:
        sender.send((FAILED, str(error)))
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class _Sender(TextIOBase):
    """A text file whose lines go to the process that started this one."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def write(self, text: str) -> int:
        self._sender.send((SAID, text))
        return len(text)


@contextmanager
def _interrupts_ignored():
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _watch(
    places: Sequence[Place], workers: Sequence[tuple[Any, Connection]], console: Console | None
) -> None:
    """Waits for all processes; UserError with the first cause as soon as one has failed."""
    reports: dict[int, tuple[str, str]] = {}
    deadline = None
    while True:
        running = [process.sentinel for process, _ in workers if process.exitcode is None]
        pipes = [receiver for _, receiver in workers if not receiver.closed]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        wait([*running, *pipes], timeout=left)
        for number, (_, receiver) in enumerate(workers):
            _read(receiver, number, reports, console)
        codes = [process.exitcode for process, _ in workers]
        if None not in codes and not any(codes):
            return
        if any(codes) and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and (None not in codes or time.monotonic() >= deadline):
            raise _cause(places, codes, reports)


def _read(
    receiver: Connection, number: int, reports: dict[int, tuple[str, str]], console: Console | None
) -> None:
    while not receiver.closed and receiver.poll():
        try:
            kind, text = receiver.recv()
        except EOFError:
            receiver.close()
            return
        if kind == SAID:
            console.file.write(text)
        else:
            reports[number] = kind, text


def _cause(
    places: Sequence[Place], codes: Sequence[int | None], reports: Mapping[int, tuple[str, str]]
) -> UserError:
    """Why the processes ended: a kill before a message, and a message before what only followed from it."""
    for place, code in zip(places, codes, strict=True):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            why = "; out of memory, perhaps" if name == "SIGKILL" else ""
            return EndedError(
                f"process {place.rank} of {place.world} was killed ({name}{why}), so the others were stopped"
            )
    failed = [text for _, (kind, text) in sorted(reports.items()) if kind == FAILED]
    if failed:
        return UserError(failed[0])
    silent = [place.rank for n, place in enumerate(places) if codes[n] and n not in reports]
    if silent:
        return EndedError(
            f"process {silent[0]} of {places[0].world} failed (see above), so the others were stopped"
        )
    return EndedError(next(iter(reports.values()))[1])
