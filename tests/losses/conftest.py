"""The recorded numbers of the published losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> dict[str, Tensor]:
    path = shared_dir / "golden" / "losses.npz"
    if not path.is_file():
        pytest.skip(f"no recorded losses at {path}")
    return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
