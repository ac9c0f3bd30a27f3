"""Where the Triton kernels are interpreted: in tests on CPU tensors, and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("device", "interpreted"), (("cpu", "1"), ("cuda", "None")))
def test_a_gpu_runs_the_compiled_kernels(device, interpreted):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.update(BTI_FAST_TEST_DEVICE=device, PYTHONPATH=str(ROOT))
    code = "import os, tests.conftest; print(os.environ.get('TRITON_INTERPRET'))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == interpreted, run.stderr
