"""What happens on disk and on screen at the end of each epoch, as Lightning callbacks."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bti_fast.engine import collective, run_folder
from bti_fast.engine.config import TrainConfig
from bti_fast.engine.files import write_csv
from bti_fast.engine.lightning_import import lightning
from bti_fast.engine.lightning_module import Stage
from bti_fast.engine.state import save_state

# What an epoch line shows, in this order.
SHOWN = ("train_loss", "val_loss", "val_iou", "val_accuracy")


class RunLog:
    """The history of a run and every file that follows from it; one for both stages.

    Each process keeps the history, the first one alone (`writes`) the files.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        metadata: dict[str, Any],
        console: Console,
        *,
        writes: bool = True,
    ) -> None:
        self.folder, self.config, self.metadata, self.console = folder, config, metadata, console
        self.writes = writes
        self.images, self.seconds = 0, 0.0  # trained on by all processes in stage 1, since this start
        self.history: list[dict[str, Any]] = []
        self.best = ""
        self.kept: set[str] = set()
        self._writer: Any = None

    def start(self, history: list[dict[str, Any]], best: str, kept: set[str]) -> None:
        """Takes up a run after `history`; whatever a killed process wrote beyond it is put right."""
        self.history, self.best, self.kept = list(history), best, set(kept)
        if not self.writes:
            return
        if best:
            run_folder.publish(self.folder, best, self.kept)
        if self.history:
            write_csv(self.folder / run_folder.METRICS, self.history)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(self.history))
        except Exception as cause:  # an optional package of another installation may be broken in any way
            self.console.print(f"no TensorBoard log: {cause}", markup=False, highlight=False)

    def save(self, stage: int, epoch: int, model: Any, optimizer: dict | None, **more: Any) -> None:
        """Writes the resume state: `epoch` epochs of `stage` are done."""
        if not self.writes:
            return
        save_state(
            self.folder,
            {
                "stage": stage,
                "epoch": epoch,
                "finished": False,
                "model": {} if model is None else model.state_dict(),
                "optimizer": optimizer,
                "counters": None,
                "history": self.history,
                "best": self.best,
                "kept": sorted(self.kept),
                "threads": torch.get_num_threads(),
                "processes": collective.world(),
                **more,
            },
        )

    def say(self, text: str) -> None:
        """Prints a line as it is, in the process that writes."""
        if self.writes:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def write_logs(self) -> None:
        """Brings metrics.csv and TensorBoard up to the last epoch of the history."""
        write_csv(self.folder / run_folder.METRICS, self.history)
        if self._writer is not None:
            row = self.history[-1]
            for name, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"stage{row['stage']}/{name}", value, len(self.history) - 1)
            self._writer.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class EpochRecorder(lightning.Callback):
    """At the end of an epoch: counters, best weights, resume state, logs, one line on screen.

    The order makes a kill at any moment harmless: the state names the best weights, so they are written
    before it, and everything written after it is derived from it again on resuming.
    """

    def __init__(self, run: RunLog, limit: int) -> None:
        self.run, self.limit = run, limit
        self._began = self._trained = 0.0

    def on_train_epoch_start(self, trainer: Any, module: Stage) -> None:
        self._began = time.perf_counter()

    def on_validation_start(self, trainer: Any, module: Stage) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._trained = time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Any, module: Stage) -> None:
        run, config, epoch = self.run, self.run.config, module.current_epoch
        seconds = time.perf_counter() - self._began
        run.history.append(
            {"stage": module.number, "epoch": epoch + 1, "seconds": round(seconds, 3), **module.record}
        )
        images = len(trainer.train_dataloader.dataset)
        if module.number == 1:
            run.images, run.seconds = run.images + images, run.seconds + self._trained
            best = module.counters.update(
                epoch,
                module.record["val_score"],
                min_progress=config.min_progress,
                plateau_factor=config.plateau_factor,
                plateau_patience=config.plateau_patience,
                plateau_cooldown=config.plateau_cooldown,
            )
            stop = module.counters.stalled >= config.patience
        else:
            best = module.counters.update(epoch, module.record["val_score"], min_progress=0.0)
            stop = module.counters.stalled >= config.gate_patience
        if best:
            run.best = f"stage{module.number}-epoch{epoch + 1:04d}.safetensors"
        if run.writes:
            self._write(trainer, module, best, stop)
            line = f"{self._line(epoch, module, seconds)}  {images / self._trained:.1f} images/s"
            run.say(line + ("  best so far" if best else ""))
        trainer.should_stop = stop

    def _write(self, trainer: Any, module: Stage, best: bool, stop: bool) -> None:
        run, epoch = self.run, module.current_epoch
        if best:
            metadata = {**run.metadata, "stage": module.number, "epoch": epoch + 1}
            run_folder.save_weights(run.folder / run_folder.CHECKPOINTS / run.best, module.model, metadata)
        run.save(
            module.number,
            epoch + 1,
            module.model,
            trainer.optimizers[0].state_dict(),
            counters=module.counters.state_dict(),
            stopped=stop,
            precision=trainer.precision_plugin.state_dict(),
        )
        if best:
            run_folder.publish(run.folder, run.best, run.kept)
        run.write_logs()

    def _line(self, epoch: int, module: Stage, seconds: float) -> str:
        values = "  ".join(
            f"{name.replace('_', ' ')} {module.record[name]:.4f}" for name in SHOWN if name in module.record
        )
        return f"stage {module.number}  epoch {epoch + 1}/{self.limit}  {values}  {seconds:.1f} s"


class BatchBar(lightning.Callback):
    """A bar over the batches of each epoch, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def on_train_start(self, trainer: Any, module: Stage) -> None:
        self._progress.start()

    def on_train_epoch_start(self, trainer: Any, module: Stage) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        name = f"stage {module.number}, epoch {module.current_epoch + 1}"
        self._task = self._progress.add_task(name, total=trainer.num_training_batches)

    def on_train_batch_end(self, *unused: Any) -> None:
        self._progress.advance(self._task)

    def on_train_end(self, trainer: Any, module: Stage) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Any, module: Stage, exception: BaseException) -> None:
        self._progress.stop()


class InterruptNote(lightning.Callback):
    """Remembers a Ctrl-C, which Lightning turns into SystemExit."""

    seen = False

    def on_exception(self, trainer: Any, module: Stage, exception: BaseException) -> None:
        self.seen = isinstance(exception, KeyboardInterrupt)


class PlainTermination(lightning.Callback):
    """Has SIGTERM, by which torchrun ends the others where a process is gone, end this one at once.

    That is harmless at any moment; Lightning's handler would first tell the others, and wait for them.
    """

    def __init__(self, run: RunLog) -> None:
        self.run = run

    def on_train_start(self, trainer: Any, module: Stage) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._end)

    def _end(self, *unused: Any) -> None:
        if self.run.writes:
            why = "ended by SIGTERM, as launchers do where another process was killed or failed"
            os.write(2, f"bti-fast: {why}; go on with: bti-fast train --resume {self.run.folder}\n".encode())
        os._exit(128 + signal.SIGTERM)
