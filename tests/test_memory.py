"""Freed memory is reused: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")

MEGABYTES = 96
COUNT_FAULTS = f"""
import resource, torch
from bti_fast.memory import keep_freed_memory
kept = KEEP and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({MEGABYTES} * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # small remainders of aligned blocks pin a few of the first ones
    faults()
print(kept, faults())
"""


def _second_tensor(keep: bool, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS.replace("KEEP", str(keep))],
        env=clean | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_second_tensor_costs_no_fresh_pages():
    assert _second_tensor(False)[1] > 40  # every page, or every huge page
    kept, faults = _second_tensor(True)
    assert kept == "True"
    assert faults < 40


def test_settings_of_the_environment_win():
    assert _second_tensor(True, MALLOC_ARENA_MAX="2")[0] == "False"
