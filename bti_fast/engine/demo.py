"""The main job from end to end on synthetic images, or on a folder of real ones."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from bti_fast.data import make_phantoms
from bti_fast.engine.config import TrainConfig
from bti_fast.engine.evaluate import evaluate
from bti_fast.engine.files import output_folder
from bti_fast.engine.loaders import read_split
from bti_fast.engine.predict import predict
from bti_fast.engine.run_config import EvaluateConfig, PredictConfig
from bti_fast.engine.run_folder import CONFIG, REPORT, read_config
from bti_fast.engine.train import train
from bti_fast.errors import UserError

PHANTOMS, SIZE, EPOCHS, GATE_EPOCHS = 150, 96, 8, 2


def demo(
    out: str | Path,
    *,
    data: str | None = None,
    epochs: int = EPOCHS,
    size: int = SIZE,
    threads: int = 0,
    console: Console | None = None,
) -> Path:
    """Phantoms (or data), a small BTI-Net through both stages, evaluation, prediction of the test cases.

    Writes out/phantoms, out/run and out/predictions and says where pictures and reports lie. UserError for
    bad input, such as an out that already holds a demo.
    """
    console = console or Console(stderr=True)
    began = time.monotonic()
    if (Path(out) / "run" / CONFIG).exists():
        raise UserError(f"{out}: holds a demo already; remove it or choose another --out")
    out = output_folder(out)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    config = TrainConfig(
        data=str(out / "phantoms") if data is None else data,
        out=str(out / "run"),
        encoder="efficientnet-b0",
        size=size,
        epochs=epochs,
        gate_epochs=GATE_EPOCHS,
        learning_rate=1e-3,
        bn_momentum=0.1,  # a demo has too few steps for the paper's 0.01
        threads=threads,
    ).checked()
    if data is None:
        say(f"making {PHANTOMS} synthetic ultrasound-like images in {config.data}")
        make_phantoms(config.data, PHANTOMS, size=160, seed=0)
    run = train(config, console=console)
    result = evaluate(EvaluateConfig(model=str(run), threads=threads), console=console)
    from bti_fast.data import read_dataset

    config = read_config(run)
    cases = read_split(run, read_dataset(config.data, config.layout, verify=False))["test"]
    found = predict(
        PredictConfig(
            model=str(run),
            images=tuple(str(case.image) for case in cases),
            out=str(out / "predictions"),
            threads=threads,
        ),
        console=console,
    )
    say(f"done in {(time.monotonic() - began) / 60:.1f} min")
    say(f"pictures:          {found.folder / 'overlays'}")
    say(f"table:             {found.folder / 'predictions.csv'}")
    say(f"training report:   {run / REPORT}")
    say(f"evaluation report: {result.folder / REPORT}")
    return out
