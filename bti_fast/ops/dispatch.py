"""How an operator finds the code that runs it: schema, backends, predicates, forced choice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bti_fast.errors import BackendUnavailable
from bti_fast.ops.straight import (
    Straight,
    any_requires_grad,
    flatten,
    is_ordinary,
    is_transformed,
    restore,
)

BACKENDS = ("reference", "cpu", "triton", "cuda", "sdpa")

_log = logging.getLogger("bti_fast.dispatch")
_forced: ContextVar[str | None] = ContextVar("bti_fast_backend", default=None)
_library = torch.library.Library("bti_fast", "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    ``predicate`` takes the operator's forward arguments and returns None where this backend can run them,
    or the reason why it cannot. ``forward`` and ``backward`` have the signatures of the two schemas.
    """

    name: str
    predicate: Callable[..., str | None]
    forward: Callable
    backward: Callable


@dataclass
class Operator:
    """An operator ``bti_fast::<name>``, its backward ``bti_fast::<name>_backward``, and their backends.

    ``schema`` and ``backward_schema`` leave out the name. ``saves`` maps (inputs, outputs) of the forward to
    the arguments of the backward that follow the output gradients; ``primals`` picks the forward's inputs, on
    which predicates decide, out of the backward's arguments; ``gradients`` lays the backward's results out as
    one gradient per forward input. Outputs beyond ``differentiable`` carry no gradient.
    """

    name: str
    schema: str
    backward_schema: str
    fake: Callable
    fake_backward: Callable
    saves: Callable[[tuple, tuple], tuple]
    primals: Callable[[tuple], tuple]
    gradients: Callable[[object], tuple]
    differentiable: int
    order: Sequence[str] = ("cpu", "triton", "cuda", "sdpa", "reference")
    backends: dict[str, Backend] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self
        _define(self.name, self.schema, self._forward, self.fake)
        _define(f"{self.name}_backward", self.backward_schema, self._backward, self.fake_backward)
        torch.library.register_autograd(
            f"bti_fast::{self.name}", self._autograd, setup_context=self._setup_context, lib=_library
        )
        self.op = getattr(torch.ops.bti_fast, self.name).default
        self.backward_op = getattr(torch.ops.bti_fast, f"{self.name}_backward").default

    def __call__(self, *args):
        """The outputs of ``op``, without the dispatcher where nothing in it waits for this call.

        On the way through it two Python kernels are called, and one for each gradient: longer work than a
        small operator itself.
        """
        tensors, layout = flatten(args)
        if not is_ordinary(tensors):
            return self._plain("forward", args) if is_transformed() else self.op(*args)
        if torch.is_grad_enabled() and any_requires_grad(*tensors):
            return Straight.apply(self, args, layout, *tensors)
        return self._forward(*args)

    def add(self, backend: Backend) -> None:
        """Makes ``backend`` available to this operator."""
        if backend.name not in BACKENDS:
            raise ValueError(f"backend {backend.name!r}: must be one of {', '.join(BACKENDS)}")
        self.backends[backend.name] = backend

    def explain(self, *inputs) -> dict[str, str | None]:
        """For these forward inputs: every backend's name with None (it can run) or the reason why not."""
        return {name: self.backends[name].predicate(*inputs) for name in self.order if name in self.backends}

    def choose(self, *inputs) -> Backend:
        """The backend that runs these forward inputs: the forced one, or the first whose predicate agrees.

        Raises BackendUnavailable, with the reason, where the forced backend cannot run them.
        """
        forced = _forced.get()
        if forced is not None:
            if forced not in self.backends:
                raise BackendUnavailable(
                    f"{self.name}: backend {forced!r} does not implement it; "
                    f"it has {', '.join(self.backends)}"
                )
            backend = self.backends[forced]
            reason = backend.predicate(*inputs)
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend {forced!r} cannot run this call: {reason}")
            return backend
        for name in self.order:
            backend = self.backends.get(name)
            if backend is not None and backend.predicate(*inputs) is None:
                _log.debug("%s: %s", self.name, name)
                return backend
        raise BackendUnavailable(f"{self.name}: no backend can run this call: {self.explain(*inputs)}")

    def _plain(self, direction: str, args: tuple):
        """The reference's "forward" or "backward", of PyTorch's operators, which every derivative knows."""
        forced = _forced.get()
        if forced not in (None, "reference"):
            raise BackendUnavailable(
                f"{self.name}: backend {forced!r} cannot run this call: torch.func, forward-mode derivatives "
                "and gradients of gradients are computed by the reference backend only"
            )
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return getattr(self.backends["reference"], direction)(*args)

    def _forward(self, *args):
        return self.choose(*args).forward(*args)

    def _backward(self, *args):
        return self.choose(*self.primals(args)).backward(*args)

    def _setup_context(self, ctx, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[self.differentiable :])
        ctx.backend = _forced.get()
        tensors, ctx.layout = flatten(self.saves(inputs, outputs))
        ctx.save_for_backward(*tensors)

    def _autograd(self, ctx, *grads):
        args = (*grads[: self.differentiable], *restore(ctx.layout, ctx.saved_tensors))
        with _force(ctx.backend):
            differentiable = torch.is_grad_enabled()  # create_graph=True
            result = self._plain("backward", args) if differentiable else self.backward_op(*args)
        return self.gradients(result)


def _define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """Registers one operator of the namespace: its schema, the backend choice, the fake, and autocast."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bti_fast::{name}", fake, lib=_library)

    def without_autocast(*args):
        # Every operator accumulates in fp32 by itself and keeps the dtype that each tensor arrives in.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return getattr(torch.ops.bti_fast, name).default(*args)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, without_autocast, key)


@contextmanager
def _force(name: str | None) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every bti_fast operator called inside to run on one backend, its backward pass included.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "sdpa".

    Raises:
        ValueError: the name is not a backend's.
        BackendUnavailable: raised by an operator inside, with the reason, where that backend cannot run.

    Enter it outside of a function given to torch.compile; compiled code obeys it when it runs.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, needs one of {', '.join(BACKENDS)}")
    with _force(name):
        yield


def forced() -> str | None:
    """The name of the backend that is forced here, or None."""
    return _forced.get()


def like(tensor: Tensor, template: Tensor) -> Tensor:
    """``tensor`` in the strides that ``torch.empty_like(template)`` has, copied only where they differ.

    Not under torch.func: there one of the two may stand for many tensors, and the copy would have no room.
    """
    if is_transformed():
        return tensor
    strides = torch.empty_like(template, device="meta").stride()
    return tensor if tensor.stride() == strides else torch.empty_like(template).copy_(tensor)
