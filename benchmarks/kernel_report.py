"""Compile the GPU kernels ahead of time, without a GPU, and report what the compilers made of them.

    python benchmarks/kernel_report.py [--json FILE] [--markdown FILE] [--operator NAME] [--specimen REGEX]
                                       [--target sm_90] [--jobs 2]

cross_attention is CUDA C++ and needs nvcc; its specimens are dtypes with numbers of channels. What a specimen
gave is kept in build/kernel-report until its sources or its compiler change: a report that was stopped goes
on where it was. Exit status 1 where a kernel spills, exceeds the chip's shared memory, lacks the 16-byte
loads that its specimen promises, or tensor cores where it multiplies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_report, kernel_table  # noqa: E402
from benchmarks.kernel_compile import (  # noqa: E402
    SHARED_LIMIT,
    TARGETS,
    Row,
    intercepted_launches,
    occupancy,
    row_of,
)
from benchmarks.kernel_specimens import SPECIMENS  # noqa: E402

KEPT = ROOT / "build" / "kernel-report"
CUDA = "cross_attention"
CHANNELS = (16, 32, 64, 128)


class Task(NamedTuple):
    """What one process compiles at a time."""

    operator: str
    specimen: str
    target: str


def tasks(operators: Iterable[str], targets: Iterable[str], specimens: str = "") -> list[Task]:
    """Every specimen of the operators, for every target, whose name matches the regular expression."""
    made = []
    for operator in operators:
        if operator == CUDA:
            names = [f"{dtype} d={channels}" for dtype in cuda_report.DTYPES for channels in CHANNELS]
        else:
            names = [specimen.name for specimen in SPECIMENS[operator]()]
        for name in names:
            if re.search(specimens, name):
                made += [Task(operator, name, t) for t in targets if operator != CUDA or t.startswith("sm_")]
    return made


def compiled(task: Task) -> list[Row]:
    """The rows of a task: those kept, or else compiled now and kept."""
    file = KEPT / digest(task.operator == CUDA) / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', ' '.join(task))}.json"
    if file.is_file():
        return [Row(**row) for row in json.loads(file.read_text())]
    rows = cuda_rows(task) if task.operator == CUDA else triton_rows(task)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(row) for row in rows]))
    part.replace(file)
    return rows


@cache
def digest(cuda: bool) -> str:
    """Of the sources and the compiler that the rows depend on."""
    if cuda:
        sources = [*ROOT.glob("csrc/cuda/*.*"), *ROOT.glob("csrc/common/*.h"), Path(cuda_report.__file__)]
        version = subprocess.run([cuda_report.nvcc(), "--version"], capture_output=True, text=True).stdout
    else:
        sources, version = [*ROOT.glob("kernels/*.py")], triton.__version__
    sources += [ROOT / "benchmarks" / f"kernel_{name}.py" for name in ("compile", "report", "specimens")]
    read = b"".join(path.read_bytes() for path in sorted(sources))
    return hashlib.sha256(read + version.encode()).hexdigest()[:16]


def triton_rows(task: Task) -> list[Row]:
    """Compiles what a specimen launches, each kernel and shape once."""
    specimen = next(one for one in SPECIMENS[task.operator]() if one.name == task.specimen)
    with intercepted_launches(task.target) as launches:
        specimen.call()
    rows = [row_of(specimen, *launch, task.target) for launch in launches]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def cuda_rows(task: Task) -> list[Row]:
    """Compiles cross_attention for a dtype and number of channels."""
    dtype, channels = task.specimen.split(" d=")
    rows = []
    for made in cuda_report.kernels(dtype, task.target, (int(channels),)):
        # The one variant that needs more than sm_80 has is not launched there.
        if made.shared > SHARED_LIMIT[task.target] and task.target == "sm_80":
            continue
        problem = None
        if made.spills:
            problem = "spills registers"
        elif made.shared > SHARED_LIMIT[task.target]:
            problem = f"needs {made.shared} bytes of shared memory, the chip has {SHARED_LIMIT[task.target]}"
        elif made.class_tokens and not made.tensor_cores:
            problem = "no tensor cores"
        elif made.class_tokens and not made.wide_loads:
            problem = "no 16-byte loads"
        tensors = {"forward": 3, "backward": 6}.get(made.sweep)  # like q, read or written
        rows.append(
            Row(
                CUDA,
                f"{dtype} {made.variant}".strip(),
                made.sweep,
                task.target,
                made.registers,
                made.spills,
                made.shared,
                made.wide_loads,
                made.tensor_cores,
                occupancy(task.target, made.warps, made.registers, made.shared),
                tensors and tensors * (4 if dtype == "float32" else 2),
                problem,
            )
        )
    return rows


def report(chosen: list[Task], jobs: int = 1) -> list[Row]:
    """The rows of all tasks, in their order; says which one is done, as compiling takes minutes."""
    rows: list[Row] = []
    # Processes of their own also give back what a compiler held.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=20) as pool:
        for i, (task, found) in enumerate(zip(chosen, pool.imap(compiled, chosen), strict=True), 1):
            rows += [row for row in found if row not in rows]
            print(f"[{i}/{len(chosen)}] {', '.join(task)}", file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--markdown", type=Path, help="write them as a table, with versions, to this file")
    parser.add_argument("--operator", action="append", choices=[*SPECIMENS, CUDA])
    parser.add_argument("--specimen", default="", help="regular expression that names of specimens match")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="processes (2), 0.7 GB each")
    chosen = parser.parse_args(arguments)
    operators = chosen.operator or [*SPECIMENS, CUDA]
    if CUDA in operators and not cuda_report.nvcc():
        print(f"{CUDA}: not compiled, there is no nvcc (PATH, /usr/local/cuda, CUDACXX)")
        operators = [name for name in operators if name != CUDA]
    rows = report(tasks(operators, chosen.target or TARGETS, chosen.specimen), chosen.jobs)
    print(kernel_table.text(rows))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if chosen.markdown:
        absent = [name for name in (*SPECIMENS, CUDA) if name not in operators]
        chosen.markdown.write_text(kernel_table.markdown(rows, absent))
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
