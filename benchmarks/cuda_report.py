"""What nvcc made of the CUDA kernels of cross_attention: registers, spills, tensor cores; needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ESCAPED_COMMA = r"\,"  # else nvcc takes what follows for a macro of its own
DTYPES = ("float16", "bfloat16", "float32")
TENSOR_CORES = re.compile(r"\bHMMA\w*")
KERNEL = re.compile(
    r"cross_(?P<sweep>forward|backward)_kernelIN.*?ShapeI\w*?Li(?P<channels>\d+)ELb(?P<maps>[01])E(?P<rest>(?:Li\d+E)+)"
    r"EELi(?P<shared>\d+)E"
)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its sweep and variant, and what ptxas and its machine code say."""

    sweep: str  # forward, backward, or either one's combine
    variant: str
    warps: int
    class_tokens: int  # that stay in shared memory at a time; 0: no such thing
    shared: int  # bytes, with the most class tokens
    registers: int
    spills: int  # bytes
    wide_loads: int
    tensor_cores: int


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return (
        os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with Triton, or None."""
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(path) if path and path.is_file() else None


def kernels(dtype: str, target: str, channels: tuple[int, ...] = (16, 32, 64, 128)) -> list[Kernel]:
    """Compiles cross_attention's kernels of a dtype for a target such as "sm_90" and reads the result.

    Raises RuntimeError with the compiler's messages where it fails.
    """
    usage, sass = compiled(
        f"cross_attention_{dtype}.cu",
        target,
        f"-DBTI_FAST_CHANNELS={ESCAPED_COMMA.join(map(str, channels))}",
    )
    return [_kernel(name, found, sass[name]) for name, found in usage.items()]


def compiled(source: str, target: str, *options: str) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(registers, spilled bytes) and the machine code of every kernel of a file in csrc/cuda, by name.

    Raises RuntimeError with the compiler's messages where it fails.
    """
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            nvcc(), "-std=c++17", "-O3", "-DNDEBUG", f"-arch={target}", "-cubin", "-Xptxas", "-v",
            "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *options,
            f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include"),
            str(ROOT / "csrc" / "cuda" / source), "-o", str(cubin),
        ]  # fmt: skip
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{' '.join(command)}: {built.stderr.strip()}")
        code = subprocess.run(
            [disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True
        )
    return dict(_usage(built.stderr)), dict(_functions(code.stdout))


def _usage(messages: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (registers, spilled bytes)) of every kernel out of ptxas's messages."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        messages,
        re.S,
    )
    for name, stores, loads, registers in found:
        yield name, (int(registers), int(stores) + int(loads))


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\w+)$", sass, flags=re.M)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _kernel(name: str, usage: tuple[int, int], code: str) -> Kernel:
    wide = len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128\b", code))
    numbers = (*usage, wide, len(TENSOR_CORES.findall(code)))
    match = KERNEL.search(name)
    if not match:
        sweep = re.search(r"cross_(\w+?)_kernel", name)[1].replace("_", " ")
        return Kernel(sweep, "", 8, 0, 0, *numbers)
    rest = [int(n) for n in re.findall(r"Li(\d+)E", match["rest"])]
    if match["sweep"] == "forward":
        warps, class_tokens = rest[0], 16 * rest[0] * rest[1]
    else:
        class_tokens, warps = rest[:2]
    order = "maps" if match["maps"] == "1" else "tokens"
    variant = f"d={match['channels']} {order}, {class_tokens} class tokens"
    return Kernel(match["sweep"], variant, warps, class_tokens, int(match["shared"]), *numbers)
