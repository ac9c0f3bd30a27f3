"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The Triton kernels run in Triton's interpreter here; the choice is read when a kernel file is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with recorded numbers and images: BTI_FAST_SHARED, else beside the repository."""
    path = Path(os.environ.get("BTI_FAST_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}")
    return path
