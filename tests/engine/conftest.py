"""Phantoms and one tiny finished run, made once for all engine tests."""

from __future__ import annotations

from pathlib import Path

import pytest

# Whether an image keeps its mask and its class.
ROWS = (
    (True, True),
    (True, False),
    (False, True),
    (True, True),
    (True, False),
    (False, True),
    (False, False),
    (True, True),
)


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


@pytest.fixture(scope="session")
def partial(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest over the phantoms in which each image has the truth that ROWS gives it, again and again."""
    from bti_fast.data import read_dataset

    folder = tmp_path_factory.mktemp("partial")
    lines = ["image,mask,class"]
    for position, case in enumerate(read_dataset(phantoms).cases):
        mask, label = ROWS[position % len(ROWS)]
        value = ";".join(map(str, case.masks)) or "empty"
        lines.append(f"{case.image},{value if mask else ''},{case.label if label else ''}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder
