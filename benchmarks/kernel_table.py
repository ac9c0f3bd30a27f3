"""The rows of the kernel report as text, and as the Markdown page of benchmarks/results."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import triton

from benchmarks import cuda_report
from benchmarks.kernel_compile import TARGETS, Row, ptxas_version

ROOT = Path(__file__).resolve().parents[1]


def text(rows: list[Row]) -> str:
    """One line a row."""
    header = f"{'operator':20} {'specimen':40} {'kernel':16} {'target':7}"
    lines = [f"{header} {'reg':>4} {'spill':>5} {'shared':>7} {'16B':>4} {'mma':>4} {'occ':>4} {'B/elem':>6}"]
    for r in rows:
        numbers = f"{r.registers:4} {r.spills:5} {r.shared:7} {r.wide_loads:4} {r.tensor_cores:4}"
        bounds = f"{r.occupancy:4.0%} {'' if r.bytes is None else format(r.bytes, '.2f'):>6}"
        name = f"{r.operator:20} {r.specimen:40} {r.kernel:16} {r.target:7}"
        lines.append(f"{name} {numbers} {bounds}  {r.problem or ''}".rstrip())
    return "\n".join(lines)


def markdown(rows: list[Row], absent: Sequence[str] = ()) -> str:
    """A page: versions, what numbers mean, problems, and a table an operator, the targets side by side.

    absent: the operators that this run left out.
    """
    wrong = [r for r in rows if r.problem]
    spilled = sum(r.spills > 0 for r in rows)
    parts = [
        "# Kernels as compiled\n",
        f"Written by `make kernel-report` on {date.today()}: read from machine code, nothing was measured.",
        f"{versions()}. {len(rows)} kernels: {spilled} spill registers, {len(wrong)} with a problem.\n",
        "A cell holds registers a thread / bytes of shared memory a block / the share of a chip's warps that",
        "these let it hold. B: bytes read and written, each tensor once, for each element of the map.\n",
        *([f"Not compiled in this run: {', '.join(absent)}.\n"] if absent else []),
        *(f"- {r.operator}, {r.specimen}, {r.kernel}, {r.target}: {r.problem}" for r in wrong),
    ]
    for operator in dict.fromkeys(r.operator for r in rows):
        mine = [r for r in rows if r.operator == operator]
        targets = [target for target in TARGETS if any(r.target == target for r in mine)]
        head = ["specimen", "kernel", *targets, "B"]
        parts += [f"\n## {operator}\n", _line(head), _line(["---"] * len(head))]
        for name in dict.fromkeys((r.specimen, r.kernel) for r in mine):
            of = {}
            for r in mine:
                if (r.specimen, r.kernel) == name:
                    of.setdefault(r.target, []).append(f"{r.registers} / {r.shared} / {r.occupancy:.0%}")
            moved = next((r.bytes for r in mine if (r.specimen, r.kernel) == name), None)
            cells = ["<br>".join(of.get(target, ["not launched"])) for target in targets]
            parts.append(_line([*name, *cells, "" if moved is None else f"{moved:.2f}"]))
    return "\n".join(parts) + "\n"


def versions() -> str:
    """Commit and compilers."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    made = [f"Commit {commit.stdout.strip() or 'unknown'}", f"Triton {triton.__version__}"]
    made.append(f"its ptxas {ptxas_version()}")
    if nvcc := cuda_report.nvcc():
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        made.append(f"nvcc {re.search(r'V([0-9.]+)', said)[1]}")
    return ", ".join([*made, f"Python {platform.python_version()}"])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
