"""Compile the GPU kernels ahead of time, without a GPU, and report what the compilers made of them.

    python benchmarks/kernel_report.py [--json FILE] [--operator NAME] [--specimen REGEX] [--target sm_90]

Triton: the launchers run on meta tensors with the launch itself intercepted, so what is compiled is exactly
what they would launch. cross_attention is CUDA C++ and needs nvcc: every variant is compiled, and a specimen
is a dtype with a variant. Exit status 1 where a kernel spills, exceeds the chip's shared memory, lacks the
16-byte loads that its specimen promises, or tensor cores where it multiplies.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cuda_report  # noqa: E402
from benchmarks.kernel_specimens import SPECIMENS, Specimen  # noqa: E402

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
    bytes: float  # read and written, each tensor once, for each element of the map
    problem: str | None = None


@contextmanager
def intercepted_launches(target: str = "sm_90"):
    """Within: nothing is launched; yields the list of (kernel, arguments, keywords) that would have been."""
    launches = []
    original = jit.JITFunction.run
    tiles = importlib.import_module("bti_fast.kernels.tiles")
    for_amd, tiles.for_amd = tiles.for_amd, lambda: target == "gfx942"

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    jit.JITFunction.run = run
    try:
        yield launches
    finally:
        jit.JITFunction.run = original
        tiles.for_amd = for_amd


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


def traffic(kernel, args: tuple) -> tuple[int, int]:
    """(bytes of all tensors that this launch reads or writes, elements of the map that it works on)."""
    named = zip(kernel.arg_names, args, strict=False)  # the constants come by keyword
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    main = tensors.get("x", next(iter(tensors.values())))
    return total, main.numel()


def report(
    operators: list[str] | None = None,
    targets: list[str] | None = None,
    specimens: str = "",
    kernels: str = "",
) -> list[Row]:
    """Compile what the specimens of `operators` launch, for `targets`; by default everything.

    Names match the regular expressions `specimens` and `kernels`.
    """
    rows = []
    for operator in operators or SPECIMENS:
        for specimen in SPECIMENS[operator]():
            if not re.search(specimens, specimen.name):
                continue
            for target in targets or TARGETS:
                with intercepted_launches(target) as launches:
                    specimen.call()
                for kernel, args, kwargs in launches:
                    if re.search(kernels, kernel.__name__):
                        rows.append(_row(specimen, kernel, args, kwargs, target))
    return rows


def cuda_rows(target: str, specimens: str = "", kernels: str = "") -> list[Row]:
    """Compile cross_attention for a target; nothing for AMD's. `specimens` picks dtypes, `kernels` sweeps."""
    rows = []
    for dtype in cuda_report.DTYPES:
        if not target.startswith("sm_") or not re.search(specimens, dtype):
            continue
        size = 4 if dtype == "float32" else 2
        for made in cuda_report.kernels(dtype, target):
            # The one variant that needs more than sm_80 has is not launched there.
            unused = made.shared > SHARED_LIMIT[target] and target == "sm_80"
            if unused or not re.search(kernels, made.sweep):
                continue
            problem = None
            if made.spills:
                problem = "spills registers"
            elif made.shared > SHARED_LIMIT[target]:
                problem = f"needs {made.shared} bytes of shared memory, the chip has {SHARED_LIMIT[target]}"
            elif made.class_tokens and not made.tensor_cores:
                problem = "no tensor cores"
            elif made.class_tokens and not made.wide_loads:
                problem = "no 16-byte loads"
            moved = {"forward": 3, "backward": 6}.get(made.sweep, 0)  # tensors like q, read or written
            share = occupancy(target, made.warps, made.registers, made.shared)
            rows.append(
                Row(
                    "cross_attention",
                    f"{dtype} {made.variant}".strip(),
                    made.sweep,
                    target,
                    made.registers,
                    made.spills,
                    made.shared,
                    made.wide_loads,
                    made.tensor_cores,
                    share,
                    moved * size,
                    problem,
                )
            )
    return rows


def _row(specimen: Specimen, kernel, args, kwargs, target: str) -> Row:
    compiled = compile_launch(kernel, args, kwargs, TARGETS[target])
    if "cubin" in compiled.asm:
        registers, spills, wide, cores = _nvidia_usage(compiled.asm["cubin"])
    else:
        registers, spills, wide, cores = _amd_usage(compiled.asm["amdgcn"])
    shared = compiled.metadata.shared
    reads_map = "X_ALIGN" in kwargs or specimen.operator == "entropy_uncertainty"
    problem = None
    if spills:
        problem = "spills registers"
    elif shared > SHARED_LIMIT[target]:
        problem = f"needs {shared} bytes of shared memory, the chip has {SHARED_LIMIT[target]}"
    elif specimen.wide_loads and reads_map and not wide:
        problem = "no 16-byte loads"
    elif "PRECISION" in kwargs and not cores:
        problem = "no tensor cores"
    moved, elements = traffic(kernel, args)
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
        moved / elements,
        problem,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--operator", action="append", choices=[*SPECIMENS, "cross_attention"])
    parser.add_argument("--specimen", default="", help="regular expression that names of specimens match")
    parser.add_argument("--kernel", default="", help="regular expression that names of kernels match")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    chosen = parser.parse_args(arguments)
    operators = chosen.operator or [*SPECIMENS, "cross_attention"]
    rows = []
    if triton_ones := [name for name in operators if name in SPECIMENS]:
        rows += report(triton_ones, chosen.target, chosen.specimen, chosen.kernel)
    if "cross_attention" in operators:
        if cuda_report.nvcc():
            for target in chosen.target or TARGETS:
                rows += cuda_rows(target, chosen.specimen, chosen.kernel)
        else:
            print("cross_attention: not compiled, there is no nvcc (PATH, /usr/local/cuda, CUDACXX)")
    header = f"{'operator':20} {'specimen':40} {'kernel':16} {'target':7}"
    print(f"{header} {'reg':>4} {'spill':>5} {'shared':>7} {'16B':>4} {'mma':>4} {'occ':>4} {'B/elem':>6}")
    for r in rows:
        numbers = f"{r.registers:4} {r.spills:5} {r.shared:7} {r.wide_loads:4} {r.tensor_cores:4}"
        bounds = f"{r.occupancy:4.0%} {r.bytes:6.2f}"
        name = f"{r.operator:20} {r.specimen:40} {r.kernel:16} {r.target:7}"
        print(f"{name} {numbers} {bounds}  {r.problem or ''}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 1 if any(r.problem for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
