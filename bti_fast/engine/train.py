"""Both training stages of a run, from its configuration to its report, resumable after any interruption."""

from __future__ import annotations

import dataclasses
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

import bti_fast
from bti_fast.data import Case, CaseDataset, LeakWarning, read_dataset, split_cases
from bti_fast.engine import run_folder
from bti_fast.engine.config import TrainConfig, resumed_config
from bti_fast.engine.device import choose_device, set_threads
from bti_fast.engine.lightning_import import MixedPrecision, lightning
from bti_fast.engine.lightning_module import GateStage, Stage, TaskStage
from bti_fast.engine.loaders import (
    count_classes,
    ordered_loader,
    read_split,
    start_epoch,
    training_loader,
    write_split,
)
from bti_fast.engine.recorder import BatchBar, EpochRecorder, InterruptNote, RunLog
from bti_fast.engine.schedule import Counters
from bti_fast.engine.state import NAME as STATE
from bti_fast.engine.state import first_line, load_state, save_state
from bti_fast.errors import UserError
from bti_fast.models import BTINet

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    encoder: torch.nn.Module | None = None,
    console: Console | None = None,
) -> Path:
    """Trains both stages and returns the run folder: model.safetensors, metrics.csv, report.html and more.

    With resume, the run in config.out goes on after its last finished epoch, with its own settings; on a CPU
    with the same number of threads its weights then equal those of an uninterrupted run bit for bit.
    UserError for bad input. KeyboardInterrupt passes through and loses at most the running epoch. encoder, a
    module of five feature maps as BTINet takes it, stands in for config.encoder.
    """
    console = console or Console(stderr=True)
    if config.out is None:
        raise UserError("no run folder: give --out DIR, where weights, logs and the report go")
    if resume:
        folder = run_folder.open_run(config.out)
        if config.data is not None:
            config = dataclasses.replace(config, data=_absolute(config.data))
        config = resumed_config(config, run_folder.read_config(folder), str(folder)).checked()
        state = load_state(folder) if (folder / STATE).exists() else None
    else:
        config = dataclasses.replace(config.checked(), data=_absolute(config.data))
        state = None
        folder = run_folder.new_run(config.out)
    if state is not None and state["finished"] and (folder / run_folder.REPORT).exists():
        _say(console, f"{folder}: this run is finished; nothing to resume")
        return folder
    device = choose_device(config.device)
    set_threads(config.threads or (state["threads"] if state else 0))

    index = read_dataset(config.data, config.layout, groups=None if resume else config.groups)
    for problem in index.problems:
        _say(console, f"warning: {problem.message}")
    names = class_names(index.classes)
    model = build_model(config, names, encoder)
    if resume:
        splits = read_split(folder, index)
    else:
        with warnings.catch_warnings(record=True) as leaks:
            warnings.simplefilter("always", LeakWarning)
            splits = split_cases(index, config.split, config.fractions, config.split_seed)
        for leak in leaks:
            _say(console, f"warning: {leak.message}")
        _check_splits(splits, config)
        write_split(folder, splits)
        run_folder.write_config(folder, config)  # last: its presence is what makes the folder a run
    sizes = (len(splits[name]) for name in ("train", "val", "test"))
    _say(console, "{} training, {} validation, {} test cases".format(*sizes))
    useful = {name: [case for case in splits[name] if _has_truth(case)] for name in ("train", "val")}
    for name, cases in useful.items():
        if len(cases) < len(splits[name]):
            count = len(splits[name]) - len(cases)
            _say(console, f"warning: {count} {name} cases with neither mask nor class are left out")

    metadata = {"data": index.root.name, "mask_threshold": 0.5, "version": bti_fast.__version__}
    log = RunLog(folder, config, metadata, console)
    cache = config.cache_mb << 20
    data = CaseDataset(
        useful["train"],
        names,
        config.size,
        config.channels,
        augment=config.augment,
        seed=config.seed,
        cache_bytes=cache,
    )
    val = CaseDataset(useful["val"], names, config.size, config.channels, cache_bytes=cache)
    loaders = (
        training_loader(
            data,
            config.batch_size,
            config.seed,
            config.workers,
            balanced=config.sampling == "balanced",
        ),
        ordered_loader(val, config.batch_size, config.workers),
    )
    try:
        if state is not None and state["finished"]:  # killed while writing the report
            log.start(state["history"], state["best"], set(state["kept"]))
        else:
            _run_stages(config, device, log, model, loaders, state)
    finally:
        log.close()
    model.load_state_dict(_weights(log))
    _finish(folder, config, log, splits, model, device)
    return folder


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


def _run_stages(
    config: TrainConfig,
    device: torch.device,
    log: RunLog,
    model: BTINet,
    loaders: tuple[Any, Any],
    state: dict[str, Any] | None,
) -> None:
    """Stage 1, then stage 2 from its best weights; `state` says where a resumed run goes on."""
    if state is not None:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as cause:
            raise UserError(
                f"{log.folder / STATE}: weights of another configuration ({first_line(cause)})"
            ) from cause
        log.start(state["history"], state["best"], set(state["kept"]))
        done = f"stage {state['stage']}, epoch {state['epoch']}"
        _say(log.console, f"resuming {log.folder} after {done}")
    else:
        log.start([], "", set())
    if state is None or state["stage"] == 1:
        _fit(TaskStage, config.epochs, config, device, log, model, loaders, state)
        state = None
        if _has_gates(model) and config.gate_epochs:
            log.kept = {log.best}
            model.load_state_dict(_weights(log))
            log.save(2, 0, model, None)
    if _has_gates(model) and config.gate_epochs:
        _fit(GateStage, config.gate_epochs, config, device, log, model, loaders, state)
    save_state(
        log.folder,
        {
            "stage": log.history[-1]["stage"],
            "epoch": log.history[-1]["epoch"],
            "finished": True,
            "model": {},
            "optimizer": None,
            "counters": None,
            "history": log.history,
            "best": log.best,
            "kept": sorted(log.kept),
            "threads": torch.get_num_threads(),
        },
    )


def _weights(log: RunLog) -> dict[str, torch.Tensor]:
    return load_file(log.folder / run_folder.CHECKPOINTS / log.best)


def _has_gates(model: BTINet) -> bool:
    return next(iter(model.gate_parameters()), None) is not None


def _fit(
    stage_class: type[Stage],
    epochs: int,
    config: TrainConfig,
    device: torch.device,
    log: RunLog,
    model: BTINet,
    loaders: tuple[Any, Any],
    state: dict[str, Any] | None,
) -> None:
    """Runs one stage, from its start or from where `state` left it."""
    going_on = state is not None and state["epoch"] > 0
    if going_on and state["stopped"]:
        return
    counters = Counters(**state["counters"]) if going_on else Counters()
    stage = stage_class(model, config, counters)
    note = InterruptNote()
    callbacks = [EpochRecorder(log, epochs), note]
    if log.console.is_terminal:
        callbacks.append(BatchBar(log.console))
    deterministic = torch.are_deterministic_algorithms_enabled()
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # Advice on worker counts, evaluation mode and logging intervals; all of it is chosen here on purpose.
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            **_arithmetic(config.precision, device),
            max_epochs=epochs,
            gradient_clip_val=config.clip_norm,
            gradient_clip_algorithm="norm",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            deterministic="warn" if device.type == "cuda" else False,
            callbacks=callbacks,
            default_root_dir=str(log.folder),
        )
        if going_on:
            stage.optimizer_state = state["optimizer"]
            trainer.precision_plugin.load_state_dict(state["precision"])
            progress = trainer.fit_loop.epoch_progress.current
            progress.ready = progress.started = progress.processed = progress.completed = state["epoch"]
        # Worker processes read ahead before the first epoch's hook runs.
        start_epoch(loaders[0], state["epoch"] if going_on else 0)
        try:
            trainer.fit(stage, *loaders)
        except SystemExit:
            if note.seen:
                raise KeyboardInterrupt from None
            raise
        finally:
            torch.use_deterministic_algorithms(deterministic)
            signal.signal(signal.SIGINT, handler)


def _arithmetic(precision: str, device: torch.device) -> dict[str, Any]:
    """The trainer's arguments for a precision; the losses stay in fp32 by themselves."""
    if precision == "16" and device.type == "cpu":
        # By its name Lightning would quietly take bf16 instead.
        return {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    return {"precision": PRECISIONS[precision]}


def _check_splits(splits: dict[str, list[Any]], config: TrainConfig) -> None:
    """UserError where training or validation would have nothing to work on."""
    if not splits["val"]:
        raise UserError(f"{config.data}: no validation cases; raise --val-fraction or add images")
    for name in ("train", "val"):
        if splits[name] and not any(map(_has_truth, splits[name])):
            raise UserError(
                f"{config.data}: none of the {name} cases has a mask or a class, nothing to learn from"
            )
    count = sum(map(_has_truth, splits["train"]))
    if count < 2:
        raise UserError(f"{config.data}: only {count} training cases; training needs at least 2")


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
) -> None:
    from bti_fast.engine.train_report import write_train_report

    counts = {name: count_classes(cases, model.classes) for name, cases in splits.items()}
    write_train_report(folder, config, log.history, log.best, counts, splits["val"], model, device)
    _say(log.console, f"best weights: {log.best.removesuffix('.safetensors')} -> {folder / run_folder.MODEL}")
    _say(log.console, f"report: {folder / run_folder.REPORT}")


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
