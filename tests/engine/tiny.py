"""The smallest network and run that still have every part, for tests that train. Run as a script, it trains
once.

python -m tests.engine.tiny DATA RUN [--resume] [--kill-at N]
"""

from __future__ import annotations

import argparse
import io
import os
import signal
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from bti_fast.engine import TrainConfig, train

CHANNELS = (8, 8, 8, 16, 16)


class TinyEncoder(nn.Module):
    """Five strided convolutions with BatchNorm. At its `kill_at`-th training batch it kills its process, the
    one of that rank where there are several."""

    channels = CHANNELS

    def __init__(self, kill_at: int = 0, failure: BaseException | None = None, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        torch.manual_seed(7)
        inputs = (3, *CHANNELS[:-1])
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip(inputs, CHANNELS, strict=True)
        )
        self.kill_at, self.failure, self.calls = kill_at, failure, 0

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.kill_at and int(os.environ.get("RANK", 0)) == self.rank:
                if self.failure is not None:
                    raise self.failure
                os.kill(os.getpid(), signal.SIGKILL)
        maps = []
        for step in self.steps:
            x = step(x)
            maps.append(x)
        return maps


def tiny_config(data: Path, out: Path, **changes: object) -> TrainConfig:
    """Two epochs of stage 1 and two of stage 2, on one thread."""
    defaults = {"epochs": 2, "gate_epochs": 2, "size": 32, "batch_size": 4, "threads": 1, "device": "cpu"}
    return TrainConfig(data=str(data), out=str(out), **{**defaults, **changes})


def tiny_train(
    data: Path, out: Path, *, resume: bool = False, encoder: nn.Module | None = None, **changes
) -> str:
    """Trains a tiny run and returns what it printed."""
    console = Console(file=io.StringIO(), width=200)
    config = tiny_config(data, out, **changes)
    train(config, resume=resume, encoder=encoder or TinyEncoder(), console=console)
    return console.file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int, default=0)
    options = parser.parse_args()
    tiny_train(options.data, options.out, resume=options.resume, encoder=TinyEncoder(options.kill_at))
