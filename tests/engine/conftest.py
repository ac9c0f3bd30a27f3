"""Phantoms and one tiny finished run, made once for all engine tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen phantoms of 40 x 40 pixels, six of each class."""
    from bti_fast.data import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "data", 18, size=40, seed=3)


@pytest.fixture(scope="session")
def finished_run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run through both stages without interruption. Not to be written to."""
    from tests.engine.tiny import tiny_train

    out = tmp_path_factory.mktemp("runs") / "whole"
    tiny_train(phantoms, out)
    return out
