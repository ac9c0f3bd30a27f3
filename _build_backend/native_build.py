"""What can be compiled here, and the CMake run that does it; used by setup.py and by the PEP 517 backend.

Environment variables:
  BTI_FAST_FORCE_BUILD=1  no compiler, no torch or no CUDA (where asked for) is an error
  BTI_FAST_BUILD=0        pure-Python install, nothing compiled
  BTI_FAST_CUDA=1 | 0     compile the CUDA library whatever torch is installed | never
  BTI_FAST_TORCH=DIR      the folder of the torch package to compile against
  TORCH_CUDA_ARCH_LIST    as in PyTorch, default "8.0 9.0 10.0+PTX"
  MAX_JOBS                compile jobs, default by cores and free memory
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import site
import stat
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_MINIMUM = (2, 10)
# Peak memory of one compiler: nvcc compiles the same file once per architecture.
GIB_PER_CXX_JOB, GIB_PER_CUDA_JOB = 1.0, 3.0


class BuildError(RuntimeError):
    """A build that BTI_FAST_FORCE_BUILD or BTI_FAST_CUDA asked for cannot be done."""


@dataclass(frozen=True)
class Plan:
    """What will be compiled; a `*_reason` says why something will not be."""

    native: bool
    native_reason: str | None
    cuda: bool
    cuda_reason: str | None
    torch_dir: str | None
    torch_version: str | None
    torch_cuda: str | None


def _flag(name: str) -> bool | None:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise BuildError(f"{name} is {value!r}; it must be 1, 0 or unset")


def _site_folders(prefix: str) -> list[Path]:
    return [*Path(prefix).glob("lib/python3*/site-packages"), Path(prefix, "Lib", "site-packages")]


def _torch_candidates():
    """Folders that may hold torch, the environment that is installed into first."""
    if explicit := os.environ.get("BTI_FAST_TORCH"):
        yield Path(explicit)
        return
    if (spec := importlib.util.find_spec("torch")) and spec.origin:
        yield Path(spec.origin).parent
    # pip isolates by hiding these two folders from sys.path; the interpreter is still the environment's.
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(key), "torch")
    # `python -m build` and uv isolate with a venv of their own: try the active one, and who started us.
    active = (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"))
    for prefix in filter(None, (*active, _parent_prefix(), sys.base_prefix)):
        yield from (folder / "torch" for folder in _site_folders(prefix))
    yield Path(site.getusersitepackages(), "torch")


def _parent_prefix() -> str | None:
    """Prefix of the Python that started this build, where the system can say (Linux)."""
    process = Path(f"/proc/{os.getppid()}")
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
        started_in = os.readlink(process / "cwd")  # a relative command is relative to that
    except (OSError, UnicodeDecodeError):
        return None
    found = Path(started_in, command) if "/" in command else shutil.which(command)  # bare: from PATH
    return str(Path(found).parent.parent) if found else None


def find_torch() -> tuple[Path, str, str | None] | None:
    """(folder, version, CUDA version or None) of the environment's torch, read without importing it."""
    for folder in _torch_candidates():
        version_file = folder / "version.py"
        if not version_file.is_file():
            continue
        text = version_file.read_text(encoding="utf-8", errors="replace")
        version = re.search(r"__version__\s*=\s*'([^']+)'", text)
        cuda = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.M)
        if version:
            return folder, version[1], cuda[1] if cuda else None
    return None


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)


def find_nvcc() -> str | None:
    if explicit := os.environ.get("CUDACXX"):
        return shutil.which(explicit)
    if path := shutil.which("nvcc"):
        return path
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (path := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return path
    return None


def _native_obstacle(torch) -> str | None:
    if _flag("BTI_FAST_BUILD") is False:
        return "BTI_FAST_BUILD=0"
    if torch is None:
        return f"no torch in this environment (looked from {sys.prefix})"
    folder, version, _ = torch
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_MINIMUM:
        return f"torch {version} in {folder.parent} is older than 2.10"
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        return f"torch {version} in {folder.parent} comes without its C++ headers"
    if find_compiler() is None:
        named = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++, clang++"
        return f"no C++ compiler found ({named})"
    return None


def _cuda_obstacle(torch) -> str | None:
    wanted = _flag("BTI_FAST_CUDA")
    if wanted is False:
        return "BTI_FAST_CUDA=0"
    if find_nvcc() is None:
        return "no nvcc found (PATH, CUDA_HOME, /usr/local/cuda)"
    if wanted is None and torch[2] is None:
        return f"torch {torch[1]} is built without CUDA (BTI_FAST_CUDA=1 compiles it all the same)"
    return None


def make_plan() -> Plan:
    """Decide what to compile; raises BuildError where the user insisted on something impossible."""
    torch = find_torch()
    native_reason = _native_obstacle(torch)
    cuda_reason = native_reason or _cuda_obstacle(torch)
    forced = _flag("BTI_FAST_FORCE_BUILD")
    if native_reason and forced:
        raise BuildError(f"BTI_FAST_FORCE_BUILD=1, but nothing can be compiled: {native_reason}")
    if cuda_reason and _flag("BTI_FAST_CUDA") and (forced or not native_reason):
        raise BuildError(f"BTI_FAST_CUDA=1, but the CUDA library cannot be compiled: {cuda_reason}")
    folder, version, cuda = torch or (None, None, None)
    return Plan(
        native=native_reason is None,
        native_reason=native_reason,
        cuda=cuda_reason is None,
        cuda_reason=cuda_reason,
        torch_dir=str(folder) if folder else None,
        torch_version=version,
        torch_cuda=cuda,
    )


def missing_tools() -> list[str]:
    """Requirements of an isolated build beyond setuptools: none where nothing will be compiled."""
    if not make_plan().native:
        return []
    tools = ["pybind11>=2.12"]
    if shutil.which("ninja") is None:
        tools.append("ninja")
    if shutil.which("cmake") is None:
        tools.append("cmake>=3.24")
    return tools


def compile_jobs(cuda: bool) -> int:
    """MAX_JOBS, or as many as cores and free memory carry."""
    if explicit := os.environ.get("MAX_JOBS"):
        if not explicit.isdigit() or int(explicit) < 1:
            raise BuildError(f"MAX_JOBS is {explicit!r}; it must be a positive whole number")
        return int(explicit)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = _free_gib()
    if free is None:
        return cores
    return max(1, min(cores, int(free / (GIB_PER_CUDA_JOB if cuda else GIB_PER_CXX_JOB))))


def _free_gib() -> float | None:
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    free = int(found[1]) / 2**20 if found else None
    try:  # a container's limit may be far below the machine's memory
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            left = (int(limit) - used) / 2**30
            free = left if free is None else min(free, left)
    except (OSError, ValueError):
        pass
    return free


def shout(message: str) -> None:
    """One line that is seen even though pip keeps a build's output to itself."""
    line = f"\n*** bti_fast: {message} ***\n"
    print(line, file=sys.stderr, flush=True)
    # pip shows what a build prints only with -v, so the line also goes where pip's messages go: a terminal
    # or a pipe (a plain file has one writer's position, and pip would overwrite the line).
    theirs = f"/proc/{os.getppid()}/fd/2"
    try:
        kind = os.stat(theirs).st_mode
        if os.path.samefile("/proc/self/fd/2", theirs) or not (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)):
            return
        with open(theirs, "w") as parent:
            parent.write(line)
    except OSError:
        pass


def announce(plan: Plan) -> None:
    """Say what is left out and why."""
    if not plan.native:
        shout(f"PURE-PYTHON INSTALL, no compiled operators: {plan.native_reason}")
    elif not plan.cuda and plan.torch_cuda:
        shout(f"no CUDA C++ operators: {plan.cuda_reason}")


def clear(package: Path) -> None:
    """Remove what an earlier build left in the package: a library left out now must not live on."""
    for file in [*package.glob("_native*"), *package.glob("lib/*bti_fast_*")]:
        file.unlink()


def write_record(plan: Plan, package: Path) -> None:
    """Leave in the package what was built and why the rest was not, for `bti-fast doctor`."""
    record = asdict(plan)
    record.pop("torch_dir")
    (package / "lib").mkdir(parents=True, exist_ok=True)
    (package / "lib" / "build.json").write_text(json.dumps(record, indent=1) + "\n")


def _pybind11_dir() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


def build(plan: Plan, package: Path) -> None:
    """Compile into `package` (the folder bti_fast/ that is being installed): _native and lib/*.so."""
    cmake = shutil.which("cmake")
    ninja = shutil.which("ninja")
    for name, tool in (("cmake", cmake), ("ninja", ninja)):
        if tool is None:
            raise BuildError(f"{name} not found: pip install {name}, or install without --no-build-isolation")
    try:
        pybind11_dir = _pybind11_dir()
    except ImportError as cause:
        message = "pybind11 not found: pip install pybind11, or install without --no-build-isolation"
        raise BuildError(message) from cause
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    # Tool paths of an isolated build change every time; objects stay good.
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DBTI_FAST_TORCH={plan.torch_dir}",
        "-DBTI_FAST_PYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_dir}",
        f"-DBTI_FAST_CUDA={'ON' if plan.cuda else 'OFF'}",
    ]  # fmt: skip
    if plan.cuda:
        configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
    jobs = compile_jobs(plan.cuda)
    compiling = [cmake, "--build", str(folder), "--parallel", str(jobs)]
    for command in (configure, compiling, [cmake, "--install", str(folder), "--prefix", str(package)]):
        status = subprocess.run(command).returncode
        if status:
            raise BuildError(
                f"{' '.join(command[:3])} failed (status {status}, its messages are above); "
                "BTI_FAST_BUILD=0 installs without compiled operators"
            )
