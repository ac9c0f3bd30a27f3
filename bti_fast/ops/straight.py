"""Calls of operators past PyTorch's dispatcher: when that changes nothing, and their autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice

import torch
from torch import Tensor
from torch.autograd import forward_ad

_CLASSES = (Tensor, torch.nn.Parameter)
# What PyTorch itself asks for this purpose, but promises nobody else.
_NEEDED = (
    "_len_torch_dispatch_stack",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
    "_dispatch_keys",
    "_any_requires_grad",
    "_AutoDispatchBelowAutograd",
)
_modes, _transforms, _tracing, _keys_of, any_requires_grad, _BelowAutograd = (
    getattr(torch._C, name, None) for name in _NEEDED
)
_KNOWN = all(hasattr(torch._C, name) for name in _NEEDED)  # else every call goes through the dispatcher


def is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """True where the dispatcher would do nothing with these tensors but find an operator's kernel.

    Not so under compilation, modes (fake tensors, tracing, counting), functorch's transforms, forward-mode
    differentiation and autocast; nor with subclasses of Tensor, on the meta device, or with bits still to be
    resolved (negated views).
    """
    if not _KNOWN or torch.compiler.is_compiling() or _modes() or _transforms() or _tracing() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    first = tensors[0]
    device = "cpu" if first.is_cpu else "cuda" if first.is_cuda else None  # device.type takes longer
    if device is None or torch.is_autocast_enabled(device):
        return False
    ordinary, inference = _ordinary_keys(device)
    classes, keys_of = _CLASSES, _keys_of
    for tensor in tensors:  # a generator takes twice as long
        if type(tensor) not in classes:
            return False
        keys = keys_of(tensor)
        if not (keys == ordinary or keys == inference):  # their != takes longer
            return False
    return True


def is_transformed() -> bool:
    """True under torch.func's transforms and forward-mode differentiation, which an operator with one formula
    for its gradient does not serve: they would fail, or take its result for a constant."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    innermost = torch._C._functorch.peek_interpreter_stack().key()
    return innermost != torch._C._functorch.TransformType.Functionalize


@cache
def _ordinary_keys(device: str) -> tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]:
    """The dispatch keys of an ordinary tensor, and of one made in inference mode."""
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(_keys_of(torch.empty(0, device=device)))
    return tuple(keys)


def flatten(values: Sequence) -> tuple[list[Tensor], list]:
    """The tensors of ``values``, those in lists too, and what restore needs to put them back."""
    tensors, layout = [], []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            layout.append(_TENSOR)
        elif isinstance(value, (list, tuple)):
            tensors.extend(value)
            layout.append(len(value))
        else:
            layout.append((value,))
    return tensors, layout


_TENSOR = object()


def restore(layout: list, tensors: Sequence[Tensor]) -> tuple:
    left = iter(tensors)
    values = []
    for kind in layout:
        if kind is _TENSOR:
            values.append(next(left))
        else:
            values.append(kind[0] if type(kind) is tuple else list(islice(left, kind)))
    return tuple(values)


class Straight(torch.autograd.Function):
    """The autograd of a dispatch.Operator without the dispatcher; in it, register_autograd does the same."""

    @staticmethod
    def forward(ctx, operator, args: tuple, layout: list, *tensors: Tensor):
        ctx.operator, ctx.inputs, ctx.chosen = operator, layout, operator.choose(*args)
        with _BelowAutograd():
            outputs = ctx.chosen.forward(*args)
        operator._setup_context(ctx, args, outputs)
        ctx.set_materialize_grads(False)  # the engine would also fill those of outputs that have none
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.made = [(out.shape, out.dtype, out.device) for out in outputs[: operator.differentiable]]
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx, *grads):
        operator = ctx.operator
        grads = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.made, strict=False)
        ]
        if torch.is_grad_enabled() or not is_ordinary(grads):
            result = operator._autograd(ctx, *grads)
        else:
            saved = restore(ctx.layout, ctx.saved_tensors)
            with _BelowAutograd():
                result = operator.gradients(ctx.chosen.backward(*grads, *saved))
        flat = [None, None, None]
        for kind, grad in zip(ctx.inputs, result, strict=True):
            if kind is _TENSOR:
                flat.append(grad)
            elif type(kind) is int:
                flat.extend(grad)
        return tuple(flat)
