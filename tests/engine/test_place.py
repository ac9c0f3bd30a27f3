"""Which process of how many this one is: launchers' variables, and what contradicts them."""

from __future__ import annotations

import pytest
import torch

from bti_fast.engine.place import Place, check_devices, cpu_cores, given_place, places_to_start
from bti_fast.errors import UserError

# What torchrun gives the fourth process of two machines with two processes each.
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
NODES = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}


def test_the_launchers_place() -> None:
    assert given_place(None, None, {}) is None
    assert given_place(None, None, TORCHRUN) == Place(3, 4, 1, 2) == given_place(2, 2, TORCHRUN)
    assert Place(0, 4, 0, 2).main and not Place(3, 4, 1, 2).main
    assert Place(3, 4, 1, 2).environment() == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
    }


def test_places_that_a_command_starts_itself() -> None:
    assert places_to_start(None, None, {}) == places_to_start(1, 1, {}) == [Place()]
    assert places_to_start(2, None, {}) == [Place(0, 2, 0, 2), Place(1, 2, 1, 2)]
    assert places_to_start(2, 2, NODES) == [Place(2, 4, 0, 2), Place(3, 4, 1, 2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: given_place(4, None, TORCHRUN),
            "--devices 4: the launcher .* makes it 2; leave --devices out",
        ),
        (
            lambda: given_place(None, 1, TORCHRUN),
            "--num-nodes 1: the launcher .* makes it 2; leave --num-nodes",
        ),
        (lambda: places_to_start(1, 2, {}), "--num-nodes 2: MASTER_ADDR is not set"),
        (lambda: places_to_start(1, 2, {**NODES, "NODE_RANK": "2"}), "NODE_RANK 2: must lie between 0 and 1"),
        (
            lambda: check_devices(10**6, torch.device("cpu")),
            "--devices 1000000: this machine has .* CPU core",
        ),
    ],
)
def test_contradictions_are_one_line(call, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_as_many_processes_as_cores_are_allowed() -> None:
    check_devices(cpu_cores(), torch.device("cpu"))
