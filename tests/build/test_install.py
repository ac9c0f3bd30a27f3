"""Source distribution, and the pure-Python wheel that a machine without a compiler gets."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import bti_fast

setuptools = pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")

ROOT = Path(__file__).resolve().parents[2]


def pip_wheel(tree, out, **variables):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, tree]
    return subprocess.run(
        [str(part) for part in command], env={**os.environ, **variables}, capture_output=True, text=True
    )


def test_metadata():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[><=\[; ]", item)[0] for item in project["project"]["dependencies"]}
    assert names == {"torch", "numpy", "jsonargparse", "pyyaml"}  # operators and command line
    assert project["project"]["scripts"] == {"bti-fast": "bti_fast.cli:main"}
    assert not any("torch" in item for item in project["build-system"]["requires"])


def test_source_distribution_holds_what_a_build_needs(source_tree, tmp_path):
    code = "import bti_fast_build; bti_fast_build.build_sdist('out')"
    environment = {**os.environ, "PYTHONPATH": "_build_backend"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=source_tree, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (archive,) = (source_tree / "out").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "kernels", "benchmarks", "_build_backend", "bti_fast"):
        here = {str(f.relative_to(source_tree)) for f in (source_tree / folder).rglob("*.*") if f.is_file()}
        assert {f for f in here if "__pycache__" not in f} <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_without_a_compiler_the_install_is_pure_python_and_loud(source_tree, tmp_path):
    result = pip_wheel(source_tree, tmp_path / "out", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    loud = [line for line in result.stderr.splitlines() if "PURE-PYTHON INSTALL" in line]
    if sys.platform == "linux":
        assert len(loud) == 1 and "no C++ compiler found (CXX=no-such-compiler)" in loud[0]
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name == f"bti_fast-{bti_fast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"bti_fast/kernels/entropy_uncertainty.py", "bti_fast/benchmarks/kernel_report.py"} <= set(names)
    assert not {"bti_fast/kernels.py", "bti_fast/benchmarks.py"} & set(names)  # stand-ins for a checkout
    assert not [name for name in names if name.endswith(".so")]
    code = """
import torch, bti_fast.kernels, bti_fast.ops as ops, bti_fast._library as library
print(bti_fast.kernels.__file__)
print(ops.entropy_uncertainty(torch.zeros(1, 2)).item())
print(library.load("cpu"))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    origin, value, reason = out.stdout.splitlines()
    assert Path(origin) == tmp_path / "site/bti_fast/kernels/__init__.py"
    assert value == "1.0"
    assert "no C++ compiler found (CXX=no-such-compiler)" in reason


def test_a_forced_build_without_a_compiler_fails(source_tree, tmp_path):
    result = pip_wheel(source_tree, tmp_path / "out", CXX="no-such-compiler", BTI_FAST_FORCE_BUILD="1")
    assert result.returncode != 0
    assert "BTI_FAST_FORCE_BUILD=1, but nothing can be compiled: no C++ compiler found" in result.stderr
