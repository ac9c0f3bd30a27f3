"""The two stages of a training, run by Lightning in one process or in several."""

from __future__ import annotations

import signal
import warnings
from typing import Any

import torch
from safetensors.torch import load_file

from bti_fast.engine import collective, run_folder
from bti_fast.engine.config import TrainConfig
from bti_fast.engine.lightning_import import DDPStrategy, MixedPrecision, lightning
from bti_fast.engine.lightning_module import GateStage, Stage, TaskStage
from bti_fast.engine.loaders import start_epoch
from bti_fast.engine.place import Place
from bti_fast.engine.recorder import BatchBar, EpochRecorder, InterruptNote, PlainTermination, RunLog
from bti_fast.engine.scaling import FlooredGradScaler
from bti_fast.engine.schedule import Counters
from bti_fast.engine.state import NAME as STATE
from bti_fast.engine.state import first_line
from bti_fast.errors import UserError
from bti_fast.models import BTINet

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}  # "16" has a plugin of its own


def run_stages(
    config: TrainConfig,
    place: Place,
    device: torch.device,
    log: RunLog,
    model: BTINet,
    loaders: tuple[Any, Any],
    state: dict[str, Any] | None,
) -> None:
    """Stage 1, then stage 2 from its best weights; `state` says where a resumed run goes on.

    Every process of a group calls it.
    """
    if state is not None:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as cause:
            raise UserError(
                f"{log.folder / STATE}: weights of another configuration ({first_line(cause)})"
            ) from cause
        log.start(state["history"], state["best"], set(state["kept"]))
        done = f"stage {state['stage']}, epoch {state['epoch']}"
        log.say(f"resuming {log.folder} after {done}")
        before = state.get("processes", 1)
        if before != place.world:
            log.say(
                f"warning: trained by {before} process{'es' if before > 1 else ''} so far, now by "
                f"{place.world}: batches differ, so the weights will not be those of an uninterrupted run"
            )
    else:
        log.start([], "", set())
    if state is None or state["stage"] == 1:
        _fit(TaskStage, config.epochs, config, place, device, log, model, loaders, state)
        state = None
        if _has_gates(model) and config.gate_epochs:
            log.kept = {log.best}
            collective.wait_for_all()  # until the first process has written them
            model.load_state_dict(best_weights(log))
            log.save(2, 0, model, None)
    if _has_gates(model) and config.gate_epochs:
        _fit(GateStage, config.gate_epochs, config, place, device, log, model, loaders, state)
    last = log.history[-1]
    log.save(last["stage"], last["epoch"], None, None, finished=True)


def best_weights(log: RunLog) -> dict[str, torch.Tensor]:
    """The weights of the best epoch so far."""
    return load_file(log.folder / run_folder.CHECKPOINTS / log.best)


def _has_gates(model: BTINet) -> bool:
    return next(iter(model.gate_parameters()), None) is not None


def _fit(
    stage_class: type[Stage],
    epochs: int,
    config: TrainConfig,
    place: Place,
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
    if place.world > 1:
        callbacks.append(PlainTermination(log))
    if log.writes and log.console.is_terminal:
        callbacks.append(BatchBar(log.console))
    deterministic = torch.are_deterministic_algorithms_enabled()
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # Advice on worker counts, evaluation mode and logging intervals; all of it is chosen here on purpose.
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        # Weights of 1x1 convolutions have two layouts at once; DDP copies their gradients.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            **_processes(place, model),
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


def _processes(place: Place, model: BTINet) -> dict[str, Any]:
    """The trainer's arguments for a number of processes."""
    if place.world == 1:
        return {"devices": 1}
    # An encoder of somebody else's may hold parameters that it does not use; ours use all of theirs. Buffers
    # are the same everywhere as it is.
    strategy = DDPStrategy(
        find_unused_parameters=model.config["encoder"] is None,
        broadcast_buffers=False,
        timeout=collective.PATIENCE,
    )
    return {
        "devices": place.local_world,
        "num_nodes": place.world // place.local_world,
        "strategy": strategy,
    }


def _arithmetic(precision: str, device: torch.device) -> dict[str, Any]:
    """The trainer's arguments for a precision; the losses stay in fp32 by themselves."""
    if precision == "16":
        # On a CPU Lightning would quietly take bf16, were it given the name instead.
        scaler = FlooredGradScaler(device.type)
        return {"plugins": [MixedPrecision("16-mixed", device.type, scaler)]}
    return {"precision": PRECISIONS[precision]}
