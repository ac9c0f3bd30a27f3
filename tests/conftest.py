"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Several test processes share the cores: threads that wait must not spin. Read when torch is first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Without a GPU the Triton kernels run in Triton's interpreter, as each file decides when it is imported.
# Interpreted they would take CUDA tensors too, and tests on a GPU would never run what was compiled.
if os.environ.get("BTI_FAST_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with recorded numbers and images: BTI_FAST_SHARED, else beside the repository."""
    path = Path(os.environ.get("BTI_FAST_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}")
    return path
