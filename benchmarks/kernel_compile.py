"""One launch of a Triton kernel compiled ahead of time, and what the machine code says; needs no GPU.

The launchers run on meta tensors with the launch itself intercepted, so what is compiled is exactly what they
would launch.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from benchmarks.kernel_specimens import Specimen

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most shared memory that one block can have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|v_mfma)\w*")


@dataclass
class Row:
    """One kernel compiled for one target."""

    operator: str
    specimen: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    wide_loads: int
    tensor_cores: int  # their instructions
    occupancy: float  # share of the warps that the chip could hold, bounded by registers and shared memory
    bytes: float | None  # read and written, each tensor once, for each element of the map; None without one
    problem: str | None = None


@contextmanager
def intercepted_launches(target: str = "sm_90"):
    """Within: nothing is launched; yields the list of (kernel, arguments, keywords) that would have been."""
    launches = []
    original = jit.JITFunction.run
    tiles = importlib.import_module("bti_fast.kernels.tiles")
    launch = importlib.import_module("bti_fast.kernels.launch")
    for_amd, tiles.for_amd = tiles.for_amd, lambda: target == "gfx942"
    unknown, launch.UNKNOWN = launch.UNKNOWN, target

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    jit.JITFunction.run = run
    try:
        yield launches
    finally:
        jit.JITFunction.run = original
        tiles.for_amd, launch.UNKNOWN = for_amd, unknown


def compile_launch(kernel, args, kwargs, target: GPUTarget):
    """The compiled kernel that this launch would have used on `target`."""
    backend = make_backend(target)
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, *described = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, *described)  # signature, constants, attributes
    return triton.compile(source, target=target, options=options.__dict__)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def ptxas_version() -> str:
    """Of the assembler that Triton brings."""
    said = subprocess.run([_tool("ptxas"), "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([0-9.]+)", said)[1]


def _nvidia_usage(cubin: bytes) -> tuple[int, int, int, int]:
    """(registers, spill instructions, 16-byte global loads, tensor-core instructions) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    if usage.returncode or sass.returncode:
        raise RuntimeError(f"cuobjdump or nvdisasm failed: {(usage.stderr + sass.stderr).strip()}")
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass.stdout))
    wide = len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128\b", sass.stdout))
    return int(registers[1]), spills, wide, len(TENSOR_CORES.findall(sass.stdout))


def _amd_usage(text: str) -> tuple[int, int, int, int]:
    """(vector registers, spilled registers, 16-byte global loads, tensor-core instructions) of assembly."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    # Scalar registers spill into lanes of vector registers, not into memory.
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))
    return number("vgpr_count"), number("vgpr_spill_count"), wide, len(TENSOR_CORES.findall(text))


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Share of the warps that a multiprocessor could hold, as registers and shared memory bound it."""
    if target == "gfx942":
        waves = min(8, 512 // max(-(-registers // 8) * 8, 1)) * 4  # of 64, on 4 units of 512 registers a lane
        blocks = min(waves // warps, 64 * 1024 // max(shared, 1))
        return min(blocks * warps / 32, 1.0)
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(64 // warps, 65536 // (per_warp * warps), (SHARED_LIMIT[target] + 1024) // (shared + 1024))
    return blocks * warps / 64


def traffic(kernel, args: tuple) -> float | None:
    """Bytes of all tensors that this launch reads or writes for each element of the map that it works on."""
    given = dict(zip(kernel.arg_names, args, strict=False))  # the constants come by keyword
    main = given.get("x", given.get("logits"))
    moved = sum(value.numel() * value.element_size() for value in tensors_in(args))
    return None if main is None else moved / main.numel()


def tensors_in(args: tuple) -> Iterator[torch.Tensor]:
    """The tensors among a launch's arguments, those in tuples too."""
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_in(value)


def row_of(specimen: Specimen, kernel, args, kwargs, target: str) -> Row:
    """The Row of one intercepted launch."""
    compiled = compile_launch(kernel, args, kwargs, TARGETS[target])
    if "cubin" in compiled.asm:
        registers, spills, wide, cores = _nvidia_usage(compiled.asm["cubin"])
    else:
        registers, spills, wide, cores = _amd_usage(compiled.asm["amdgcn"])
    shared = compiled.metadata.shared
    reads_map = "x_at" in kernel.arg_names or specimen.operator == "entropy_uncertainty"
    problem = None
    if spills:
        problem = "spills registers"
    elif shared > SHARED_LIMIT[target]:
        problem = f"needs {shared} bytes of shared memory, the chip has {SHARED_LIMIT[target]}"
    elif specimen.wide_loads and reads_map and not wide:
        problem = "no 16-byte loads"
    elif "PRECISION" in kwargs and not cores:
        problem = "no tensor cores"
    return Row(
        specimen.operator,
        specimen.name,
        kernel.__name__.removesuffix("_kernel"),
        target,
        registers,
        spills,
        shared,
        wide,
        cores,
        occupancy(target, compiled.metadata.num_warps, registers, shared),
        traffic(kernel, args),
        problem,
    )
