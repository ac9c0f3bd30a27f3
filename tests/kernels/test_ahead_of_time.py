"""The kernels compiled for real chips, without one: no spills, shared memory within limits, 16-byte loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_every_target_compiles_without_spills(tmp_path):
    rows_file = tmp_path / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    specimens = "K=1 fp32$|beyond"
    run = subprocess.run(
        [sys.executable, "benchmarks/kernel_report.py", "--json", rows_file, "--specimen", specimens],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(rows_file.read_text())
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel"}
    assert all(row["spills"] == 0 and row["problem"] is None for row in rows)
    assert all(0 < row["registers"] <= 128 for row in rows)
    assert all(row["wide_loads"] >= 1 for row in rows if "fp32" in row["specimen"])
