"""A training run from its configuration to its report, in as many processes as asked for, resumable after any
interruption."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bti_fast
from bti_fast.data import Case, CaseDataset, DatasetIndex, LeakWarning, read_dataset, split_cases
from bti_fast.engine import collective, run_folder
from bti_fast.engine.config import TrainConfig, resumed_config
from bti_fast.engine.device import choose_device, prepare_cpu
from bti_fast.engine.fit import best_weights, run_stages
from bti_fast.engine.launch import EndedError, launch
from bti_fast.engine.loaders import count_classes, ordered_loader, read_split, training_loader, write_split
from bti_fast.engine.place import Place, check_devices, free_port, given_place, places_to_start
from bti_fast.engine.recorder import RunLog
from bti_fast.engine.state import NAME as STATE
from bti_fast.engine.state import first_line, load_state
from bti_fast.errors import UserError
from bti_fast.models import BTINet
from bti_fast.nn.synchronised import synchronise


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    encoder: torch.nn.Module | None = None,
    console: Console | None = None,
) -> Path:
    """Trains both stages and returns the run folder: model.safetensors, metrics.csv, report.html and more.

    With resume, the run in config.out goes on after its last finished epoch, with its own settings; on a CPU
    with the same number of threads and processes its weights then equal those of an uninterrupted run bit for
    bit. UserError for bad input. KeyboardInterrupt passes through and loses at most the running epoch.
    encoder, a module of five feature maps as BTINet takes it, stands in for config.encoder.

    With config.devices (and num_nodes) this process starts the others and watches over them: a program that
    calls it needs the usual `if __name__ == "__main__"`, and encoder must be picklable. Under torchrun, every
    process that it started calls this function.
    """
    if config.out is None:
        raise UserError("no run folder: give --out DIR, where weights, logs and the report go")
    devices, num_nodes = config.devices, config.num_nodes
    if resume:
        folder = run_folder.find_run(config.out)
        if config.data is not None:
            config = dataclasses.replace(config, data=_absolute(config.data))
        config = resumed_config(config, run_folder.read_config(folder), str(folder)).checked()
    else:
        config = dataclasses.replace(config.checked(), data=_absolute(config.data))
    place = given_place(devices, num_nodes)
    places = [place] if place is not None else places_to_start(config.devices, config.num_nodes)
    check_devices(places[0].local_world, choose_device(config.device))
    try:
        if place is not None or places[0].world == 1:
            _train_here(config, resume, encoder, places[0], console)
        else:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            if config.num_nodes not in (None, 1):
                address = {name: os.environ[name] for name in address}
            launch(places, address, _train_here, (config, resume, encoder), console)
    except (EndedError, collective.LostProcessError) as ended:
        if not (Path(config.out) / run_folder.CONFIG).exists():
            raise
        raise type(ended)(f"{ended}; go on with: bti-fast train --resume {config.out}") from ended
    return Path(config.out)


def _train_here(
    config: TrainConfig,
    resume: bool,
    encoder: torch.nn.Module | None,
    place: Place,
    console: Console | None = None,
) -> None:
    """This process's part of a training; config is settled."""
    console = (console or Console(stderr=True)) if place.main else Console(quiet=True)
    device = choose_device(config.device, place.local_rank if place.world > 1 else None)
    with collective.group(place, device):
        with collective.said_by_main():
            folder = collective.from_main(lambda: _opened(config, resume))
            state = load_state(folder) if resume and (folder / STATE).exists() else None
            if state is not None and state["finished"] and (folder / run_folder.REPORT).exists():
                _say(console, f"{folder}: this run is finished; nothing to resume")
                return
            prepare_cpu(config.threads or (state["threads"] if state else 0), place.local_world)
            if place.world > 1:
                size = config.batch_size
                _say(console, f"{place.world} processes, {size} images each and {place.world * size} a step")
            index = collective.from_main(lambda: _index(config, resume, console))
            names = class_names(index.classes)
            model = build_model(config, names, encoder)
            splits = collective.from_main(
                lambda: (
                    read_split(folder, index) if resume else _divided(config, folder, index, place, console)
                )
            )
            data, val = _data_sets(config, splits, names, place, console)
        loaders = (
            training_loader(
                data,
                config.batch_size,
                config.seed,
                config.workers,
                balanced=config.sampling == "balanced",
                rank=place.rank,
                world=place.world,
            ),
            ordered_loader(val, config.batch_size, config.workers, rank=place.rank, world=place.world),
        )
        if place.world > 1:
            synchronise(model, device)
        metadata = {"data": index.root.name, "mask_threshold": 0.5, "version": bti_fast.__version__}
        log = RunLog(folder, config, metadata, console, writes=place.main)
        with collective.said_by_each():
            try:
                if state is not None and state["finished"]:  # killed while writing the report
                    log.start(state["history"], state["best"], set(state["kept"]))
                else:
                    run_stages(config, place, device, log, model, loaders, state)
            finally:
                log.close()
    if place.main:
        model.load_state_dict(best_weights(log))
        _finish(folder, config, log, splits, model, device, place)


def _opened(config: TrainConfig, resume: bool) -> Path:
    """The run folder: new, or swept of what a killed process left behind."""
    return run_folder.open_run(config.out) if resume else run_folder.new_run(config.out)


def _index(config: TrainConfig, resume: bool, console: Console) -> DatasetIndex:
    index = read_dataset(config.data, config.layout, groups=None if resume else config.groups)
    for line in index.warnings():
        _say(console, line)
    return index


def _divided(
    config: TrainConfig, folder: Path, index: DatasetIndex, place: Place, console: Console
) -> dict[str, list[Case]]:
    """The division of a new run, which it keeps on file from here on."""
    with warnings.catch_warnings(record=True) as leaks:
        warnings.simplefilter("always", LeakWarning)
        splits = split_cases(index, config.split, config.fractions, config.split_seed)
    for leak in leaks:
        _say(console, f"warning: {leak.message}")
    _check_splits(splits, config, place)
    write_split(folder, splits)
    run_folder.write_config(folder, config)  # last: its presence is what makes the folder a run
    return splits


def _data_sets(
    config: TrainConfig,
    splits: dict[str, list[Case]],
    names: tuple[str, ...],
    place: Place,
    console: Console,
) -> tuple[CaseDataset, CaseDataset]:
    """Training and validation cases that have a truth; the caches of all stay below --cache-mb together."""
    sizes = (len(splits[name]) for name in ("train", "val", "test"))
    _say(console, "{} training, {} validation, {} test cases".format(*sizes))
    useful = {name: [case for case in splits[name] if _has_truth(case)] for name in ("train", "val")}
    for name, cases in useful.items():
        if len(cases) < len(splits[name]):
            count = len(splits[name]) - len(cases)
            _say(console, f"warning: {count} {name} cases with neither mask nor class are left out")
    cache = (config.cache_mb << 20) // place.local_world
    shape = config.size, config.channels
    data = CaseDataset(
        useful["train"], names, *shape, augment=config.augment, seed=config.seed, cache_bytes=cache
    )
    return data, CaseDataset(useful["val"], names, *shape, cache_bytes=cache - data.cache_bytes)


def build_model(
    config: TrainConfig, names: tuple[str, ...], encoder: torch.nn.Module | None = None
) -> BTINet:
    """The untrained network; its weights depend on the seed alone. UserError for a bad encoder."""
    torch.manual_seed(config.seed)
    try:
        model = BTINet(
            config.encoder if encoder is None else encoder,
            interaction=config.interaction,
            seg_classes=1,
            cls_classes=len(names),
            classes=names,
            in_channels=config.channels,
            image_size=config.size,
            dropout=config.dropout,
            encoder_weights=config.encoder_weights,
        )
    except ValueError as cause:
        raise UserError(f"--encoder {config.encoder}: {first_line(cause)}") from cause
    model.activation_checkpointing = config.activation_checkpointing
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = config.bn_momentum
    if config.double_rescale:  # (x / 255 - mean) / std, kept with the weights, so that prediction does it too
        model.image_mean.mul_(255)
        model.image_std.mul_(255)
    return model


def class_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the network's classes: those of the data, filled up to the two that a classifier needs."""
    return (*classes, *(f"unused {i + 1}" for i in range(2 - len(classes))))


def _check_splits(splits: dict[str, list[Any]], config: TrainConfig, place: Place) -> None:
    """UserError where training or validation would have nothing to work on."""
    if not splits["val"]:
        raise UserError(f"{config.data}: no validation cases; raise --val-fraction or add images")
    for name in ("train", "val"):
        if splits[name] and not any(map(_has_truth, splits[name])):
            raise UserError(
                f"{config.data}: none of the {name} cases has a mask or a class, nothing to learn from"
            )
    count, needed = sum(map(_has_truth, splits["train"])), max(2, place.world)
    if count < needed:
        why = f" in {place.world} processes" if place.world > 1 else ""
        raise UserError(f"{config.data}: only {count} training cases; training{why} needs at least {needed}")


def _has_truth(case: Case) -> bool:
    """Whether anything can be learned from a case; one without mask and class only costs time."""
    return case.mask_known or case.label is not None


def _finish(
    folder: Path,
    config: TrainConfig,
    log: RunLog,
    splits: dict[str, list[Any]],
    model: BTINet,
    device: torch.device,
    place: Place,
) -> None:
    from bti_fast.engine.train_report import write_train_report

    counts = {name: count_classes(cases, model.classes) for name, cases in splits.items()}
    write_train_report(folder, config, log.history, log.best, counts, splits["val"], model, device)
    if log.seconds:
        many = f"{place.world} processes" if place.world > 1 else "1 process"
        _say(
            log.console,
            f"images per second: {log.images / log.seconds:.1f} in {many} (stage 1, without validation)",
        )
    _say(log.console, f"best weights: {log.best.removesuffix('.safetensors')} -> {folder / run_folder.MODEL}")
    _say(log.console, f"report: {folder / run_folder.REPORT}")


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
