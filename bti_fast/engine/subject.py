"""A trained network with the data and the division into splits that it is judged on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bti_fast import metrics
from bti_fast.data import Case, DatasetIndex, read_dataset, read_image
from bti_fast.engine import run_folder
from bti_fast.engine.device import choose_device, prepare_cpu
from bti_fast.engine.files import output_folder
from bti_fast.engine.inference import (
    MASK_THRESHOLD,
    Prediction,
    class_names,
    for_images,
    predict_images,
)
from bti_fast.engine.loaders import read_split
from bti_fast.engine.run_config import RunConfig
from bti_fast.engine.truth import true_mask
from bti_fast.errors import UserError

OVERLAP = ("iou", "dice", "sensitivity", "hd95")


@dataclass(frozen=True)
class Subject:
    """What a command on a trained network works with; splits is empty where the run's own is not used."""

    weights: Path
    run: Path | None
    model: Any
    names: tuple[str, ...]
    index: DatasetIndex
    splits: dict[str, list[Case]]
    device: torch.device

    def cases(self, split: str) -> Sequence[Case]:
        """The cases of a split, or of "all"; UserError where there are none."""
        if split == "all":
            return self.index.cases
        if self.splits:
            cases: Sequence[Case] = self.splits[split]
            why = "the run was trained with a split of that size"
        else:
            cases = [case for case in self.index.cases if case.split == split]
            why = (
                f"{self.weights} does not say what it was trained on, the data declare no such split; "
                "give --split all"
            )
        if not cases:
            raise UserError(f"{self.index.root}: no {split} cases ({why})")
        return cases

    def label(self, case: Case) -> int | None:
        """The index of a case's class, None where it is not known; UserError for a class of other data."""
        if case.label is None:
            return None
        if case.label not in self.names:
            raise UserError(
                f"{case.image}: class {case.label!r} is unknown to {self.weights}, "
                f"which has {', '.join(self.names)}"
            )
        return self.names.index(case.label)

    def images(self, cases: Sequence[Case]) -> Iterator[tuple[str, np.ndarray]]:
        """(id, image) pairs as predict_images takes them."""
        for case in cases:
            yield case.id, read_image(case.image, self.model.config["in_channels"])

    def rows(self, cases: Sequence[Case], batch_size: int) -> list[dict[str, Any]]:
        """One metrics.CaseRow a case, from one pass of the network."""
        labels = [self.label(case) for case in cases]
        model = for_images(self.model, len(cases), self.device)
        found = predict_images(model, self.images(cases), batch_size=batch_size, device=self.device)
        return [case_row(*known) for known in zip(cases, labels, found, strict=True)]


def open_subject(
    config: RunConfig,
    command: str,
    marker: str,
    encoder: torch.nn.Module | None = None,
    console: Console | None = None,
    *,
    stores: bool = False,
) -> tuple[Subject, Path]:
    """The network and data that config names, and the output folder, by default RUN/command.

    UserError for bad input, before anything is computed: a folder that already holds marker or cannot be
    written, or weights that cannot where the command stores something with them.
    """
    console = console or Console(stderr=True)
    config = config.checked()
    weights, run = run_folder.find_model(config.model)
    if config.out is None and run is None:
        raise UserError(f"{weights}: lies in no run folder, so say where the results go with --out DIR")
    if config.data is None and run is None:
        raise UserError(f"{weights}: lies in no run folder, so name the images with --data PATH")
    target = Path(config.out) if config.out is not None else run / command
    folder = output_folder(target, marker=marker, overwrite=config.overwrite)
    if stores:
        output_folder(weights.parent)
    device = choose_device(config.device)
    prepare_cpu(config.threads)
    model = run_folder.load_model(weights, encoder)
    index = _read(config, run, console)
    own = run is not None and getattr(config, "split", None) != "all"
    splits = read_split(run, index) if own else {}
    return Subject(weights, run, model, tuple(class_names(model)), index, splits, device), folder


def _read(config: RunConfig, run: Path | None, console: Console) -> DatasetIndex:
    if config.data is not None:
        index = read_dataset(config.data, config.layout)
    else:
        stored = run_folder.read_config(run)
        if not Path(stored.data).exists():
            raise UserError(
                f"{stored.data}: the run's data are not there any more; name them with --data PATH"
            )
        index = read_dataset(stored.data, stored.layout)
    for line in index.warnings():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return index


def case_row(case: Case, label: int | None, prediction: Prediction) -> dict[str, Any]:
    """One case as metrics.CaseRow: overlap at the image's own size, class probabilities, failure signals."""
    truth = true_mask(case, prediction.mask_prob.shape)
    overlap: Mapping[str, float | None] = dict.fromkeys(OVERLAP)
    if truth is not None:
        overlap = metrics.case_metrics(prediction.mask_prob > MASK_THRESHOLD, truth)
    return {
        "id": case.id,
        **overlap,
        "label": label,
        "class_prob": prediction.class_prob,
        "failure_signals": prediction.failure_signals(),
    }
