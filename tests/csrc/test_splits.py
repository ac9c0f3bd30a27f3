"""How the CUDA kernels of cross_attention cut the dense tokens: against a simulated GPU."""

from __future__ import annotations

import ctypes
import heapq
import subprocess
from ctypes import byref, c_int64

import pytest

from tests.csrc.emulated import ROOT, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
OVERHEAD, MOST = 3, 256  # as csrc/cuda/cross_attention_launch.cuh has them


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """(groups, n, tile, slots) -> (number of splits, tokens of each)."""
    file = tmp_path_factory.mktemp("splits") / "splits.so"
    source = ROOT / "tests" / "csrc" / "splits.cpp"
    command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(file)).choose_splits

    def choose(groups, n, tile, slots):
        count, tokens = c_int64(), c_int64()
        values = map(c_int64, (groups, n, tile, slots, OVERHEAD, MOST))
        function(*values, byref(count), byref(tokens))
        return count.value, tokens.value

    return choose


def makespan(groups: int, tiles: int, per_split: int, slots: int) -> int:
    """When the last block ends if every slot takes the next block as soon as it is free; a tile takes 1."""
    free = [0] * slots
    for _ in range(groups):
        for _ in range(0, tiles, per_split):  # the last one may have fewer tiles, and takes a slot as long
            heapq.heappush(free, heapq.heappop(free) + per_split + OVERHEAD)
    return max(free)


CASES = [
    (groups, n, tile, slots)
    for groups in (1, 3, 64, 500)
    for n in (1, 63, 64, 65, 3136, 12544)
    for tile, slots in ((64, 132), (128, 264), (16, 7))
]


@pytest.mark.parametrize(("groups", "n", "tile", "slots"), CASES)
def test_no_other_cut_ends_sooner(choose, groups, n, tile, slots):
    count, tokens = choose(groups, n, tile, slots)
    tiles = -(-n // tile)
    assert tokens % tile == 0 and 1 <= count <= MOST
    assert (count - 1) * tokens < n <= count * tokens  # every token in one split, none of them empty
    sizes = {-(-tiles // wanted) for wanted in range(1, min(tiles, MOST) + 1)}
    if groups * tiles > 20000:  # the simulation of every cut would take seconds
        sizes = {1, 2, 5, 20, tiles} & sizes
    best = min(makespan(groups, tiles, size, slots) for size in sizes)
    assert makespan(groups, tiles, tokens // tile, slots) <= best


def test_by_hand(choose):
    # One head of 12544 tokens, 196 tiles, on 132 slots: 98 blocks of two tiles run at once and take 2 + 3;
    # 196 of one tile need two rounds of 1 + 3.
    assert choose(1, 12544, 64, 132) == (98, 128)
    # As many heads as slots: no cut, as every split starts anew.
    assert choose(132, 12544, 64, 132) == (1, 12544)
    # 66 heads: each in two.
    assert choose(66, 12544, 64, 132) == (2, 6272)
    assert choose(5, 0, 64, 132) == (1, 64)


def test_depends_on_nothing_else(choose):
    assert len({choose(7, 3136, 64, 132) for _ in range(3)}) == 1


def test_volumes_keep_their_partial_sums_small(choose):
    """96^3 tokens: at most 256 partial results of every class token."""
    count, tokens = choose(1, 96**3, 64, 132 * 3)
    assert count <= MOST and count * tokens >= 96**3
