"""Typed settings of the commands on a trained network: evaluate, calibrate, failures and predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bti_fast.engine.options import check_ranges, option
from bti_fast.errors import UserError


@dataclass(frozen=True)
class RunConfig:
    """What every command on a trained network asks: which network, on which data, where the results go."""

    model: str | None = option(None, "Run folder of bti-fast train, or a model.safetensors.", "Input")
    data: str | None = option(
        None, "Folder with the images; by default the one the run was trained on.", "Input"
    )
    layout: str = option(
        "auto", "Data layout: busi, ham10000, brisc2025, manifest, pack, or auto to look for itself.", "Input"
    )
    out: str | None = option(
        None, "Folder for the results; by default one in the run folder, named after the command.", "Output"
    )
    overwrite: bool = option(False, "Replace results that are already there.", "Output")
    batch_size: int = option(8, "Images per step.", "Machine", low=1, high=4096)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where to compute; auto takes a GPU if there is one.", "Machine"
    )
    threads: int = option(0, "CPU threads, 0 for torch's choice.", "Machine", low=0, high=1024)

    def checked(self) -> Any:
        """Returns self, or raises UserError with one line naming the first wrong setting."""
        check_ranges(self)
        if self.model is None:
            raise UserError("no model: give a run folder or a model.safetensors")
        if self.data is None and self.layout != "auto":
            raise UserError(f"--layout {self.layout}: is that of --data, which is missing")
        return self


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """What to evaluate, on which cases, and where the results go."""

    split: Literal["train", "val", "test", "all"] = option(
        "test",
        "Which cases: the run's own division is used again. all for data the model never saw.",
        "Input",
    )
    worst: int = option(6, "How many of the worst cases to draw.", "Output", low=0, high=100)


@dataclass(frozen=True)
class CalibrateConfig(RunConfig):
    """Which network gets temperatures, fitted on the validation cases and judged on the test cases."""


@dataclass(frozen=True)
class FailuresConfig(RunConfig):
    """Which failure signals to compare, and how often the cases that are not referred may fail."""

    ensemble: tuple[str, ...] = option(
        (), "More runs of the same classes (other seeds): a deep ensemble to compare with.", "Input"
    )
    passes: int = option(
        20, "Passes of MC-dropout to compare with; 0 leaves it out.", "Signals", low=0, high=1000
    )
    seed: int = option(0, "Fixes what MC-dropout drops.", "Signals", low=0, high=2**31 - 1)
    signal: str = option(
        "failure_score", "Signal by which predict refers cases to a human; one from a single pass.", "Signals"
    )
    target_rate: float = option(
        0.05,
        "Failure rate aimed at among the cases that are not referred; sets the threshold on validation.",
        "Signals",
        low=0.0,
        high=0.99,
    )


@dataclass(frozen=True)
class PredictConfig:
    """Which model, which images, and where masks, overlays and the table go."""

    model: str | None = option(None, "Run folder of bti-fast train, or a model.safetensors.", "Input")
    images: tuple[str, ...] = option((), "Image files, folders (with their subfolders) or patterns.", "Input")
    out: str | None = option(
        None, "Folder for masks, overlays, predictions.csv and predictions.json.", "Output"
    )
    overwrite: bool = option(False, "Replace predictions that are already there.", "Output")
    threshold: float = option(
        0.5,
        "A pixel with a higher lesion probability than this is in the mask, 0 to 1.",
        "Output",
        low=0.0,
        high=1.0,
    )
    attention: bool = option(
        False,
        "Also draw where each class token looks, for networks of --interaction attention.",
        "Output",
    )
    batch_size: int = option(8, "Images per step.", "Machine", low=1, high=4096)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where to compute; auto takes a GPU if there is one.", "Machine"
    )
    threads: int = option(0, "CPU threads, 0 for torch's choice.", "Machine", low=0, high=1024)

    def checked(self) -> PredictConfig:
        """Returns self, or raises UserError with one line naming the first wrong setting."""
        check_ranges(self)
        if self.model is None:
            raise UserError("no model: give a run folder or a model.safetensors")
        if not self.images:
            raise UserError("no images: name at least one image file, folder or pattern")
        if self.out is None:
            raise UserError("no output folder: give --out DIR")
        return self
