"""Stand-in for the package `bti_fast.kernels` in a source checkout (kernels in `<repo>/kernels`).

An installed wheel holds the real package `bti_fast/kernels/`, which Python prefers to this file (and this
file is left out of it).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "kernels")]
