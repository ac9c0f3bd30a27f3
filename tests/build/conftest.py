"""The build scripts as a module, and a copy of the source tree to build in."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def native_build():
    """The module _build_backend/native_build.py; skips where tests run without the source tree."""
    file = ROOT / "_build_backend" / "native_build.py"
    if not file.is_file():
        pytest.skip("no source tree")
    spec = importlib.util.spec_from_file_location("native_build", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["native_build"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source_tree(tmp_path, native_build):
    """A copy of what a source distribution is made from, with no build in it."""
    tree = tmp_path / "source"
    tree.mkdir()
    left_out = shutil.ignore_patterns("__pycache__", ".*", "_native*.so", "lib", "*.egg-info", "results")
    for name in ("_build_backend", "csrc", "kernels", "benchmarks", "bti_fast"):
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree)
        else:
            (tree / name).write_text("")
    return tree
