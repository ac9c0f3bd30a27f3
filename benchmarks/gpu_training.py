"""BTI-Net trained on a GPU from packed data sets, and the ablation: what `make gpu` does with real images.

A pack is one file (`bti-fast data pack DATA packs/NAME.zip`), so that data travel to a machine with a GPU as
they are. Runs lie under `runs/gpu`; a step that its time limit ended goes on when it is called again.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKS, RUNS = ROOT / "packs", ROOT / "runs" / "gpu"
# Both stages at the published size. Epochs of each data set for which ten minutes should be enough.
EPOCHS = {"busi": 40, "ham10000": 20, "brisc2025": 12}
PUBLISHED = {
    "encoder": "efficientnet-b4",
    "size": 224,
    "batch_size": 32,
    "gate_epochs": 3,
    "precision": "bf16",
    "workers": 8,
    "device": "cuda",
}
ABLATION = {
    **PUBLISHED,
    "encoder": "efficientnet-b0",
    "size": 128,
    "epochs": 10,
    "seeds": 3,
}


def pack(name: str) -> Path:
    """The packed data set of that name; FileNotFoundError says how to make it."""
    path = PACKS / f"{name}.zip"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; bti-fast data pack DATA {path} makes it")
    return path


def trained(
    data: Path, out: Path, *, encoder: torch.nn.Module | None = None, **settings: Any
) -> dict[str, Any]:
    """Trains both stages (or goes on, or takes what is finished) and evaluates on the test cases.

    Figures of SPEC 7 on the test split, and images per second of the fastest epoch of stage 1, reading and
    validation included.
    """
    from bti_fast.engine import EvaluateConfig, TrainConfig, evaluate, train

    started = time.monotonic()
    resume = (out / "config.yaml").exists()
    train(TrainConfig(data=str(data), out=str(out), **settings), resume=resume, encoder=encoder)
    seconds = time.monotonic() - started
    evaluate(
        EvaluateConfig(
            model=str(out), out=str(out / "evaluate-gpu"), overwrite=True, device=settings["device"]
        ),
        encoder=encoder,
    )
    found = json.loads((out / "evaluate-gpu" / "metrics.json").read_text(encoding="utf-8"))
    with open(out / "split.csv", newline="", encoding="utf-8") as file:
        images = sum(row["split"] == "train" for row in csv.DictReader(file))
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        epochs = [float(row["seconds"]) for row in csv.DictReader(file) if row["stage"] == "1"]
    return {
        "settings": {name: value for name, value in settings.items() if name != "device"},
        "resumed": resume,
        "train_seconds": round(seconds, 1),
        "train_images": images,
        "images_per_second": round(images / min(epochs), 1),
        "summary": found["summary"],
    }


def data_set(name: str) -> dict[str, Any]:
    """One data set at 224 px with B4 and bf16 arithmetic, both stages."""
    return trained(pack(name), RUNS / name, epochs=EPOCHS[name], **PUBLISHED)


def ablation() -> dict[str, Any]:
    """The interactions on BUSI over three seeds, with a small encoder; the whole of ablation.json."""
    from bti_fast.engine import AblateConfig, ablate

    out = RUNS / "ablation"
    ablate(AblateConfig(data=str(pack("busi")), out=str(out), **ABLATION))
    return json.loads((out / "ablation.json").read_text(encoding="utf-8"))
