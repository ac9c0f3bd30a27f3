"""Compile the Triton kernels ahead of time, without a GPU, and report what the compilers made of them.

    python benchmarks/kernel_report.py [--json FILE] [--operator NAME] [--specimen REGEX] [--target sm_90]

The launchers run on meta tensors with the launch itself intercepted, so what is compiled is exactly what they
would launch. Exit status 1 where a kernel spills, exceeds the chip's shared memory, or lacks the 16-byte
loads that its specimen promises.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most shared memory that one block can have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True)
class Specimen:
    """One call of a launcher, on meta tensors; `wide_loads`: its fp32 loads must be of 16 bytes."""

    operator: str
    name: str
    call: Callable[[], object]
    wide_loads: bool = False


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
    problem: str | None = None


def _meta(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)


def entropy_uncertainty_specimens() -> list[Specimen]:
    kernels = importlib.import_module("bti_fast.kernels.entropy_uncertainty")

    def pair(name: str, logits, wide: bool = False) -> list[Specimen]:
        u = torch.empty(logits.shape[:1] + logits.shape[2:], device="meta")
        forward, backward = kernels.entropy_uncertainty, kernels.entropy_uncertainty_backward
        return [
            Specimen("entropy_uncertainty", f"forward {name}", lambda: forward(logits), wide),
            Specimen("entropy_uncertainty", f"backward {name}", lambda: backward(u, logits), wide),
        ]

    last = torch.channels_last
    return [
        *pair("K=1 fp32", _meta(8, 1, 224, 224), wide=True),
        *pair("K=4 fp32", _meta(8, 4, 224, 224), wide=True),
        *pair("K=4 bf16", _meta(8, 4, 224, 224, dtype=torch.bfloat16)),
        *pair("K=4 fp32 channels_last", _meta(8, 4, 224, 224, memory_format=last)),
        *pair("K=19 fp16 odd size", _meta(3, 19, 7, 5, dtype=torch.float16)),
        *pair("K=2 fp32 beyond 2^31", _meta(2100, 2, 1024, 1024), wide=True),
    ]


SPECIMENS: dict[str, Callable[[], list[Specimen]]] = {"entropy_uncertainty": entropy_uncertainty_specimens}


@contextmanager
def _intercepted_launches():
    """Within: nothing is launched; yields the list of (kernel, arguments, keywords) that would have been."""
    launches = []
    original = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    jit.JITFunction.run = run
    try:
        yield launches
    finally:
        jit.JITFunction.run = original


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


def _nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, spill instructions, 16-byte global loads) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    if usage.returncode or sass.returncode:
        raise RuntimeError(f"cuobjdump or nvdisasm failed: {(usage.stderr + sass.stderr).strip()}")
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass.stdout))
    wide = len(re.findall(r"\bLDG\.E\S*\.128\b", sass.stdout))
    return int(registers[1]), spills, wide


def _amd_usage(text: str) -> tuple[int, int, int]:
    """(vector registers, spilled registers, 16-byte global loads) of AMD assembly."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), spills, len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))


def report(
    operators: list[str] | None = None, targets: list[str] | None = None, specimens: str = ""
) -> list[Row]:
    """Compile the specimens of `operators` whose names match the regular expression `specimens`.

    By default: every specimen of every operator, for every target.
    """
    rows = []
    for operator in operators or SPECIMENS:
        for specimen in SPECIMENS[operator]():
            if not re.search(specimens, specimen.name):
                continue
            with _intercepted_launches() as launches:
                specimen.call()
            for target in targets or TARGETS:
                for kernel, args, kwargs in launches:
                    rows.append(_row(specimen, kernel, args, kwargs, target))
    return rows


def _row(specimen: Specimen, kernel, args, kwargs, target: str) -> Row:
    compiled = compile_launch(kernel, args, kwargs, TARGETS[target])
    nvidia = "cubin" in compiled.asm
    registers, spills, wide = (
        _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    )
    shared = compiled.metadata.shared
    problem = None
    if spills:
        problem = "spills registers"
    elif shared > SHARED_LIMIT[target]:
        problem = f"needs {shared} bytes of shared memory, the chip has {SHARED_LIMIT[target]}"
    elif specimen.wide_loads and not wide:
        problem = "no 16-byte loads"
    name = kernel.__name__
    return Row(specimen.operator, specimen.name, name, target, registers, spills, shared, wide, problem)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--operator", action="append", choices=list(SPECIMENS))
    parser.add_argument("--specimen", default="", help="regular expression that names of specimens match")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    chosen = parser.parse_args(arguments)
    rows = report(chosen.operator, chosen.target, chosen.specimen)
    header = f"{'operator':20} {'specimen':34} {'kernel':16} {'target':7}"
    print(f"{header} {'reg':>4} {'spill':>5} {'shared':>7} {'16B':>4}")
    for r in rows:
        numbers = f"{r.registers:4} {r.spills:5} {r.shared:7} {r.wide_loads:4}"
        print(f"{r.operator:20} {r.specimen:34} {r.kernel:16} {r.target:7} {numbers}  {r.problem or ''}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 1 if any(r.problem for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
