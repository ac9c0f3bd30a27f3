"""Loading the compiled libraries: every cause of failure is kept and told."""

import json
import shutil

import pytest
import torch

from bti_fast import _library


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in the place of bti_fast/lib, with nothing loaded yet."""
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(_library, "_outcome", {})
    return tmp_path


def test_a_corrupt_library_gives_a_reason(folder):
    _library.path("cpu").write_bytes(b"\x7fELF no more")
    reason = _library.load("cpu")
    assert "libbti_fast_cpu" in reason and "does not load: OSError" in reason and "\n" not in reason
    assert _library.load("cpu") == reason


def test_a_truncated_library_gives_a_reason(folder, tmp_path_factory):
    real = _library.Path(_library.__file__).parent / "lib" / _library.path("cpu").name
    if not real.is_file():
        pytest.skip("no compiled CPU library")
    _library.path("cpu").write_bytes(real.read_bytes()[:5000])
    assert "does not load" in _library.load("cpu")


def test_a_library_of_another_abi_gives_a_reason(folder):
    # A shared library that is there and sound, but needs one that is not: what an ABI break looks like.
    real = _library.Path(_library.__file__).parent / "lib" / _library.path("cpu").name
    if not real.is_file():
        pytest.skip("no compiled CPU library")
    shutil.copy(real, folder)  # without libbti_fast_isa beside it
    data = _library.path("cpu").read_bytes().replace(b"libbti_fast_isa.so", b"libbti_fast_isx.so")
    _library.path("cpu").write_bytes(data)
    assert "libbti_fast_isx.so" in _library.load("cpu")


@pytest.mark.parametrize(
    "record, expected",
    [
        (None, "not installed with pip"),
        ({"native_reason": "no C++ compiler found (c++)", "cuda_reason": "x"}, "no C++ compiler found"),
        ({"native_reason": None, "cuda_reason": "x"}, "is gone"),
    ],
)
def test_a_missing_library_says_why(folder, record, expected):
    if record is not None:
        (folder / "build.json").write_text(json.dumps(record))
    assert expected in _library.load("cpu")


def test_a_missing_cuda_library_says_why(folder):
    (folder / "build.json").write_text(json.dumps({"native_reason": None, "cuda_reason": "no nvcc found"}))
    assert "no nvcc found" in _library.load("cuda")


def test_a_broken_record_is_no_crash(folder):
    (folder / "build.json").write_text("{")
    assert _library.build_record() == {} and "not installed with pip" in _library.load("cpu")


def test_operators_run_without_the_library(folder):
    from bti_fast import ops
    from bti_fast.errors import BackendUnavailable
    from bti_fast.ops import OPERATORS

    logits = torch.tensor([[0.0, 0.0], [1e4, -1e4]])
    assert ops.entropy_uncertainty(logits).tolist() == [1.0, 0.0]
    assert "not installed with pip" in OPERATORS["entropy_uncertainty"].explain(logits)["cpu"]
    with pytest.raises(BackendUnavailable, match="not installed with pip"), ops.backend("cpu"):
        ops.entropy_uncertainty(logits)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="must be one of cpu, cuda; got 'tpu'"):
        _library.load("tpu")
