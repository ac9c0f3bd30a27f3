"""What the build decides to compile, and what it says where it cannot."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

OURS = ("BTI_FAST_BUILD", "BTI_FAST_CUDA", "BTI_FAST_FORCE_BUILD", "BTI_FAST_TORCH")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (*OURS, "CXX", "CUDACXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def fake_torch(folder: Path, version: str, cuda: str | None = None, headers: bool = True) -> Path:
    torch = folder / "torch"
    torch.mkdir()
    annotation = "cuda: Optional[str] = " + (f"'{cuda}'" if cuda else "None")
    (torch / "version.py").write_text(f"__version__ = '{version}'\n{annotation}\n")
    if headers:
        stable = torch / "include/torch/csrc/stable"
        stable.mkdir(parents=True)
        (stable / "library.h").write_text("")
    return torch


@pytest.mark.parametrize(
    "version, headers, reason",
    [
        ("2.9.1", True, "is older than 2.10"),
        ("2.10.0", False, "without its C++ headers"),
        ("2.10.0+cu128", True, None),
        ("3.0.0a0", True, None),
    ],
)
def test_torch_is_judged_by_its_folder(native_build, monkeypatch, tmp_path, version, headers, reason):
    monkeypatch.setenv("BTI_FAST_TORCH", str(fake_torch(tmp_path, version, headers=headers)))
    monkeypatch.setenv("CXX", sys.executable)  # any program: nothing is compiled here
    plan = native_build.make_plan()
    assert plan.torch_version == version
    assert plan.native == (reason is None)
    if reason:
        assert reason in plan.native_reason


def test_no_torch(native_build, monkeypatch, tmp_path):
    monkeypatch.setenv("BTI_FAST_TORCH", str(tmp_path / "nowhere"))
    assert "no torch in this environment" in native_build.make_plan().native_reason
    assert native_build.missing_tools() == []
    monkeypatch.setenv("BTI_FAST_FORCE_BUILD", "1")
    with pytest.raises(native_build.BuildError, match="BTI_FAST_FORCE_BUILD=1, .* no torch"):
        native_build.make_plan()


def test_no_compiler(native_build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    plan = native_build.make_plan()
    assert not plan.native and not plan.cuda
    assert plan.native_reason == "no C++ compiler found (CXX=no-such-compiler)"


def test_cuda_follows_torch_and_the_variable(native_build, monkeypatch, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    cpu = fake_torch(tmp_path / "cpu", "2.11.0+cpu")
    gpu = fake_torch(tmp_path / "gpu", "2.11.0+cu130", cuda="13.0")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("CUDACXX", sys.executable)
    monkeypatch.setenv("BTI_FAST_TORCH", str(cpu))
    assert "built without CUDA" in native_build.make_plan().cuda_reason
    monkeypatch.setenv("BTI_FAST_CUDA", "1")
    assert native_build.make_plan().cuda
    monkeypatch.setenv("BTI_FAST_TORCH", str(gpu))
    monkeypatch.delenv("BTI_FAST_CUDA")
    plan = native_build.make_plan()
    assert plan.cuda and plan.torch_cuda == "13.0"
    monkeypatch.setenv("BTI_FAST_CUDA", "0")
    assert native_build.make_plan().cuda_reason == "BTI_FAST_CUDA=0"
    monkeypatch.setenv("BTI_FAST_CUDA", "1")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(native_build.BuildError, match="BTI_FAST_CUDA=1, .* no nvcc found"):
        native_build.make_plan()


def test_bad_values_are_named(native_build, monkeypatch):
    monkeypatch.setenv("BTI_FAST_CUDA", "maybe")
    with pytest.raises(native_build.BuildError, match="BTI_FAST_CUDA is 'maybe'; it must be 1, 0 or unset"):
        native_build.make_plan()
    monkeypatch.setenv("MAX_JOBS", "-2")
    with pytest.raises(native_build.BuildError, match="MAX_JOBS is '-2'"):
        native_build.compile_jobs(cuda=False)


def test_jobs_follow_memory(native_build, monkeypatch):
    monkeypatch.setattr(native_build.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    cases = [(0.2, False, 1), (4.5, False, 4), (100.0, False, 16), (7.0, True, 2), (None, True, 16)]
    for gib, cuda, jobs in cases:
        monkeypatch.setattr(native_build, "_free_gib", lambda gib=gib: gib)
        assert native_build.compile_jobs(cuda) == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native_build.compile_jobs(cuda=True) == 3


def test_an_isolated_interpreter_finds_this_torch(native_build):
    installed = Path(sysconfig.get_path("purelib"), "torch")
    if not installed.is_dir():
        pytest.skip("torch lies elsewhere than in purelib")
    # -S hides site-packages as pip's isolated builds do.
    code = "import native_build; print(native_build.find_torch()[0])"
    folder = Path(native_build.__file__).parent
    command = [sys.executable, "-S", "-c", code]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert Path(out.stdout.strip()) == installed, out.stderr
