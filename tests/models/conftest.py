"""The published model, read once for all tests of the converter."""

from __future__ import annotations

import pytest

from bti_fast.models.keras_file import KerasFile


@pytest.fixture(scope="session")
def official_path(shared_dir):
    return shared_dir / "golden" / "full" / "official.keras"


@pytest.fixture(scope="session")
def official_file(official_path) -> KerasFile:
    pytest.importorskip("h5py")
    return KerasFile(official_path)
