"""Builds the package: metadata in pyproject.toml, what is compiled in _build_backend/native_build.py."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build_backend"))

import native_build  # noqa: E402

STAND_INS = (("bti_fast", "kernels"), ("bti_fast", "benchmarks"))
BUILDING = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"} & set(sys.argv)
plan = native_build.make_plan()
if BUILDING:
    native_build.announce(plan)


def package_folder(command) -> Path:
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    return ROOT / "bti_fast" if in_place else Path(command.build_lib).resolve() / "bti_fast"


class BuildPython(build_py):
    """The Python files, the record of the build, and no stand-ins for the real kernels and benchmarks."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] not in STAND_INS]

    def run(self):
        super().run()
        native_build.clear(package_folder(self))
        native_build.write_record(plan, package_folder(self))


class BuildNative(build_ext):
    """Hands everything to CMake."""

    def run(self):
        native_build.build(plan, package_folder(self))

    def get_outputs(self):
        return []


setup(
    packages=[*find_packages(include=["bti_fast", "bti_fast.*"]), "bti_fast.kernels", "bti_fast.benchmarks"],
    package_dir={"bti_fast": "bti_fast", "bti_fast.kernels": "kernels", "bti_fast.benchmarks": "benchmarks"},
    ext_modules=[Extension("bti_fast._native", sources=[])] if plan.native else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
