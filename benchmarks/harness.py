"""What a benchmark is: one case, those who can compute it, and the check that they compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bti_fast import ops, reference
from bti_fast.nn import interaction
from bti_fast.nn.headed_fusion import one_by_one

# channels, side: the four decoder levels at 224 px
PAPER_LEVELS = ((384, 14), (192, 28), (96, 56), (48, 112))
MODES = ("forward", "forward+backward")
# Relative to the largest value; a 16-bit dtype rounds its results to about half of these.
FLOORS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-10}


class WrongResult(AssertionError):
    """Somebody's numbers are not the reference's."""


@dataclass(frozen=True)
class Case:
    """One operator or module at one size, in one dtype and layout.

    ``inputs`` makes the float32 arguments of ``reference`` and ``ours``; those at the positions ``constant``
    have no gradient. Where there is a ``module``, it is made once, and its parameters get gradients too;
    ``reference`` and ``ours`` then take it as their first argument. ``within`` is entered around calls of
    ``reference``. ``peers`` maps further providers to (call, context around it) or to the reason why they
    cannot take part. ``traffic`` (bytes) and ``flop`` are the least that any implementation needs, by mode.
    ``x`` is the quantity that a sweep varies.
    """

    kernel: str
    size: str
    inputs: Callable[[], list[Tensor]]
    reference: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    traffic: Mapping[str, float]
    flop: Mapping[str, float]
    constant: tuple[int, ...] = ()
    module: Callable[[], nn.Module] | None = None
    within: Callable[[], AbstractContextManager] = nullcontext
    peers: Mapping[str, tuple[Callable, Callable[[], AbstractContextManager]] | str] = field(
        default_factory=dict
    )
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    group: str = "levels"
    level: int | None = None
    x: float | None = None
    compiled: bool = True  # in the default set, whose time is limited, torch.compile is measured here

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {self.size} {name} {self.layout}"

    @property
    def sweeps(self) -> bool:
        """Part of a sweep: a quantity varies between the cases of its group."""
        return self.group.startswith("sweep")

    def marked(self, **marks) -> Case:
        """The same case under another group, level or x."""
        return replace(self, **marks)


@dataclass(frozen=True)
class Provider:
    """Somebody who can compute a case; ``within`` is entered around a call, outside of what is timed."""

    name: str
    call: Callable[..., tuple[Tensor, ...]]
    within: Callable[[], AbstractContextManager] = nullcontext
    ours: bool = False


@dataclass(frozen=True)
class Bound:
    """A case with its tensors: what every provider is called with, in one mode."""

    case: Case
    mode: str
    inputs: list[Tensor]
    module: nn.Module | None
    cotangents: list[Tensor]
    truth: list[Tensor]  # results of the reference in float64

    def arguments(self) -> list:
        """The positional arguments of every provider."""
        return [*([self.module] if self.module is not None else []), *self.inputs]


def bind(case: Case, mode: str, device: str = "cpu") -> Bound:
    """Makes the tensors of a case, always the same ones, and its true results."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = [_arranged(value, case).to(device) for value in case.inputs()]
        module = None if case.module is None else case.module().to(device, case.dtype)
        if module is not None:
            module.train(mode != "forward")
        exact = [value.double() for value in inputs]
        wide = None if module is None else copy.deepcopy(module).double()
        if mode == "forward":
            with torch.no_grad():
                return Bound(case, mode, inputs, module, [], list(_reference(case, wide, exact)))
        _require(case, exact)
        _require(case, inputs)
        outputs = _reference(case, wide, exact)
        # Reading the results in the dtype that the others return them in makes the cotangents exact for all.
        with torch.no_grad():
            dtypes = [value.dtype for value in _reference(case, copy.deepcopy(module), inputs)]
        cotangents = [torch.randn_like(out).to(t) for out, t in zip(outputs, dtypes, strict=True)]
    wanted = [value for value in exact if value.requires_grad]
    wanted += [] if wide is None else list(wide.parameters())
    grads = torch.autograd.grad(
        outputs, wanted, [value.double() for value in cotangents], materialize_grads=True
    )
    return Bound(case, mode, inputs, module, cotangents, [out.detach() for out in outputs] + list(grads))


def runner(bound: Bound, provider: Provider) -> Callable[[], list[Tensor]]:
    """Runs the provider once: the outputs, followed in mode "forward+backward" by the gradients."""
    arguments = bound.arguments()
    if bound.mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(provider.call(*arguments))

        return forward
    wanted = [value for value in bound.inputs if value.requires_grad]
    wanted += [] if bound.module is None else list(bound.module.parameters())
    module = bound.module is not None  # some of its parameters may have no part in the outputs

    def forward_backward() -> list[Tensor]:
        outputs = provider.call(*arguments)
        grads = torch.autograd.grad(outputs, wanted, bound.cotangents, materialize_grads=module)
        return [*(out.detach() for out in outputs), *grads]

    return forward_backward


def check(bound: Bound, provider: Provider, got: list[Tensor], eager: list[Tensor]) -> None:
    """WrongResult where the error against float64 exceeds four times eager's and the dtype's floor."""
    floor = FLOORS[bound.case.dtype]
    outputs = len(bound.truth) if bound.mode == "forward" else len(bound.cotangents)
    parts = slice(0, outputs), slice(outputs, len(bound.truth))
    for kind, part in zip(("output", "gradient"), parts, strict=True):
        peak = max((float(value.abs().max()) for value in bound.truth[part]), default=0.0)
        for i, (value, own, true) in enumerate(zip(got[part], eager[part], bound.truth[part], strict=True)):
            allowed = max(4 * _error(own, true, peak), floor)
            found = _error(value, true, peak)
            if not found <= allowed:  # NaN is wrong too
                raise WrongResult(
                    f"{bound.case}, {bound.mode}: {kind} {i} of {provider.name} is off by {found:.1e} of its "
                    f"largest value, allowed {allowed:.1e}"
                )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within: fresh memory is NaN, so that an output left unwritten shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _plain_task_interaction(x, y, weights, *, tau, training=False, momentum=None):
    """Without the running statistics, which no result depends on."""
    return ops.TaskInteraction(*reference.task_interaction(x, y, list(weights), tau, training)[:4])


@contextmanager
def plain_operators() -> Iterator[None]:
    """Within: the modules of bti_fast.nn compute in plain PyTorch, differentiated by autograd."""
    plain = {
        "entropy_uncertainty": reference.entropy_uncertainty,
        "gated_fusion": lambda *args, tau: ops.GatedFusion(*reference.gated_fusion(*args, tau)),
        "task_interaction": _plain_task_interaction,
        "cross_attention": lambda *tokens, q_mask=None, k_mask=None: ops.CrossAttention(
            *reference.cross_attention(*tokens, q_mask, k_mask, tokens[0].shape[-1] ** -0.5)[:2]
        ),
    }
    places = [(ops, name, function) for name, function in plain.items()]
    places.append((interaction, "headed_fusion", one_by_one))
    kept = [getattr(module, name) for module, name, _ in places]
    for place in places:
        setattr(*place)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, kept, strict=True):
            setattr(module, name, function)


def _error(value: Tensor, truth: Tensor, peak: float) -> float:
    if truth.numel() == 0:
        return 0.0
    return float((value.double() - truth).abs().max() / max(float(truth.abs().max()), 0.01 * peak, 1e-12))


def _require(case: Case, inputs: list[Tensor]) -> None:
    for i, value in enumerate(inputs):
        value.requires_grad_(i not in case.constant)


def _reference(case: Case, module: nn.Module | None, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with case.within():
        return case.reference(*([] if module is None else [module]), *inputs)


def _arranged(value: Tensor, case: Case) -> Tensor:
    value = value.to(case.dtype)
    if case.layout == "channels_last" and value.ndim in (4, 5):
        return value.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[value.ndim - 4])
    if case.layout == "channel-major":  # (B, h, N, d) whose tokens lie side by side, as a map's do
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    return value
