"""How many processes a training has, and which of them this one is."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bti_fast.errors import UserError


@dataclass(frozen=True)
class Place:
    """A process among `world` processes, `local_world` of them on this machine; ranks count from 0."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def environment(self) -> dict[str, str]:
        """The variables by which torch and Lightning know the place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "NODE_RANK": str(self.rank // self.local_world),
        }


def given_place(
    devices: int | None, num_nodes: int | None, environment: Mapping[str, str] = os.environ
) -> Place | None:
    """The place that torchrun, or a launcher like it, gave this process; None where there is no launcher.

    UserError where devices or num_nodes, if given, say otherwise.
    """
    if "LOCAL_RANK" not in environment or "RANK" not in environment:
        return None
    rank, world, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world = int(environment.get("LOCAL_WORLD_SIZE", world))
    for name, asked, found in (
        ("--devices", devices, local_world),
        ("--num-nodes", num_nodes, world // local_world),
    ):
        if asked is not None and asked != found:
            raise UserError(
                f"{name} {asked}: the launcher (torchrun) started {world} processes, {local_world} on this "
                f"machine, which makes it {found}; leave {name} out"
            )
    return Place(rank, world, local_rank, local_world)


def places_to_start(
    devices: int | None, num_nodes: int | None, environment: Mapping[str, str] = os.environ
) -> list[Place]:
    """The places of the processes that this command has to start on this machine.

    UserError where there are several machines and the variables that Lightning takes from each of them
    (MASTER_ADDR, MASTER_PORT, NODE_RANK) are missing or wrong.
    """
    devices, nodes = devices or 1, num_nodes or 1
    node = 0
    if nodes > 1:
        missing = [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not environment.get(n)]
        if missing:
            raise UserError(
                f"--num-nodes {nodes}: {missing[0]} is not set; every machine needs MASTER_ADDR, "
                "MASTER_PORT and its own NODE_RANK, or start the command with torchrun"
            )
        if not environment["NODE_RANK"].isdigit() or int(environment["NODE_RANK"]) >= nodes:
            raise UserError(f"NODE_RANK {environment['NODE_RANK']}: must lie between 0 and {nodes - 1}")
        node = int(environment["NODE_RANK"])
    return [Place(node * devices + i, nodes * devices, i, devices) for i in range(devices)]


def check_devices(count: int, device: torch.device) -> None:
    """UserError where `count` processes of this machine have fewer GPUs (on a CPU: cores)."""
    if device.type == "cuda":
        found, what = torch.cuda.device_count(), "GPU"
    else:
        found, what = cpu_cores(), "CPU core"
    if count > found:
        raise UserError(f"--devices {count}: this machine has {found} {what}{'s' if found != 1 else ''}")


def cpu_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
