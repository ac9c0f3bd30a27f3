"""The CUDA kernels of cross_attention on the CPU (emulator.h): compiled per dtype, called with tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# The storage type and the numbers of channels that are compiled: together every variant of the kernels.
STORAGE = {
    torch.float32: ("float", "32,128"),
    torch.float16: ("Half", "32"),
    torch.bfloat16: ("BFloat16", "16,64,128"),
}
SPLIT = 128  # tokens, the largest tile of any kernel
A100, H100 = 163 * 1024, 227 * 1024  # bytes of shared memory that a block may have


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "head", "token", "channel")),
        ("channels", c_int),
        ("vector", c_int),
    ]


class MaskView(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("token", c_int64)]


class Shape(ctypes.Structure):
    _fields_ = [
        ("groups", c_int64),
        *((name, c_int) for name in ("heads", "n", "splits", "split_tokens", "m", "d", "e")),
        ("scale", c_float),
        ("q_mask", MaskView),
        ("k_mask", MaskView),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, Operand) for name in ("q", "k", "v_q", "v_k", "out_q", "out_k")),
        *((name, c_void_p) for name in ("statistics", "partial", "kept")),
        ("parts", c_int),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, Operand) for name in ("grad_out_q", "grad_out_k", "q", "k", "v_q", "v_k", "out_q", "out_k")),
        ("statistics", c_void_p),
        *((name, Operand) for name in ("grad_q", "grad_k", "grad_v_q", "grad_v_k")),
        ("partial", c_void_p),
        ("kept", c_void_p),
        ("column_gain", c_float),
        ("column_gain_inverse", c_float),
    ]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for one storage dtype, compiled on first use and kept while their sources stay."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.*")), *sorted((ROOT / "csrc" / "common").glob("*.h"))]
    sources += sorted((ROOT / "tests" / "csrc").glob("*.[ch]*"))
    key = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"bti_fast_emulated_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    storage, channels = STORAGE[dtype]
    file = folder / f"{storage}-{key}.so"
    if not file.is_file():
        made = file.with_suffix(f".{os.getpid()}")
        command = [
            compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
            "-U_FORTIFY_SOURCE",  # which takes a jump from one fiber's stack to another's for a mistake
            f"-DSTORAGE={storage}", f"-DBTI_FAST_CHANNELS={channels}", f"-I{ROOT / 'csrc'}",
            str(ROOT / "tests/csrc/cross_attention.cpp"), "-o", str(made),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        made.rename(file)
    return ctypes.CDLL(str(file))


class Guarded:
    """Fresh memory in the layout of ``like``, NaN, between margins that nothing may write to."""

    MARGIN = 64

    def __init__(self, like: Tensor):
        template = torch.empty_like(like)
        self.memory = torch.full((template.numel() + 2 * self.MARGIN,), torch.nan, dtype=like.dtype)
        self.tensor = self.memory.as_strided(template.shape, template.stride(), self.MARGIN)

    def checked(self) -> Tensor:
        margins = torch.cat([self.memory[: self.MARGIN], self.memory[-self.MARGIN :]])
        assert margins.isnan().all(), "written outside of an output"
        return self.tensor


def _operand(x: Tensor) -> Operand:
    return Operand(x.data_ptr(), *x.stride(), x.shape[3], 0)


def _mask(mask: Tensor | None) -> MaskView:
    return MaskView(None, 0, 0) if mask is None else MaskView(mask.data_ptr(), *mask.stride())


def _shape(q: Tensor, k: Tensor, v_k: Tensor, q_mask, k_mask, scale: float, splits: int) -> Shape:
    batch, heads, n, d = q.shape
    tiles = max(-(-n // SPLIT), 1)
    tokens = -(-tiles // splits) * SPLIT
    masks = _mask(q_mask), _mask(k_mask)
    sizes = heads, n, max(-(-n // tokens), 1), tokens, k.shape[2], d, v_k.shape[3]
    return Shape(batch * heads, *sizes, scale, *masks)


def _run(
    name: str, dtype: torch.dtype, job: ctypes.Structure, limit: int, late: bool, descending: bool
) -> int:
    """Bytes of shared memory that the kernel had."""
    message = ctypes.create_string_buffer(200)
    function = getattr(library(dtype), name)
    used = function(ctypes.byref(job), limit, int(late), int(descending), message, len(message))
    assert used >= 0, message.value.decode()
    return used


def forward(
    q, k, v_q, v_k, q_mask=None, k_mask=None, scale=1.0,
    *, splits=2, limit=A100, late=True, descending=False,
):  # fmt: skip
    """As bti_fast_cuda::cross_attention: out_q, out_k, statistics."""
    empty = torch.empty(*q.shape[:2], q.shape[2] + k.shape[2], 2)
    made = [Guarded(value) for value in (v_q, v_k, empty)]
    out_q, out_k, statistics = (one.tensor for one in made)
    shape = _shape(q, k, v_k, q_mask, k_mask, scale, splits)
    views = map(_operand, (q, k, v_q, v_k, out_q, out_k))
    job = Forward(shape, *views, statistics.data_ptr(), None, None, 0)
    _run("cross_forward", q.dtype, job, limit, late, descending)
    return tuple(one.checked() for one in made)


def backward(
    grad_out_q, grad_out_k, q, k, v_q, v_k, out_q, out_k, statistics,
    q_mask=None, k_mask=None, scale=1.0, *, splits=2, limit=A100, late=True, descending=False,
):  # fmt: skip
    """As bti_fast_cuda::cross_attention_backward: gradients of q, k, v_q, v_k."""
    made = [Guarded(value) for value in (q, k, v_q, v_k)]
    grads = [one.tensor for one in made]
    shape = _shape(q, k, v_k, q_mask, k_mask, scale, splits)
    job = Backward(
        shape, *map(_operand, (grad_out_q, grad_out_k, q, k, v_q, v_k, out_q, out_k)), statistics.data_ptr(),
        *map(_operand, grads), None, None, 0.0, 0.0,
    )  # fmt: skip
    _run("cross_backward", q.dtype, job, limit, late, descending)
    return tuple(one.checked() for one in made)
