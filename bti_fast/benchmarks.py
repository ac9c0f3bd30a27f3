"""Stand-in for the package `bti_fast.benchmarks` in a source checkout, as `kernels.py` is for the kernels."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "benchmarks")]
