"""Typed settings of a training and of an ablation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bti_fast.engine.options import check_ranges, flag, option
from bti_fast.errors import UserError

Interaction = Literal["encoder-sharing", "none", "fixed", "proxy", "entropy", "attention"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights of a training run. The defaults are the paper's recipe."""

    data: str | None = option(
        None,
        "Folder with the images: BUSI, HAM10000, BRISC 2025 as released, or any with a manifest.csv.",
        "Data",
    )
    out: str | None = option(
        None, "Folder of this run: weights, logs, report. Must not hold another run.", "Data"
    )
    layout: str = option(
        "auto", "Data layout: busi, ham10000, brisc2025, manifest, pack, or auto to look for itself.", "Data"
    )
    split: Literal["grouped", "official", "random"] = option(
        "grouped",
        "How cases are divided: grouped keeps near-duplicates and patients together, the others may leak.",
        "Data",
    )
    groups: str | None = option(
        None,
        "CSV file with the columns image and group (patient, say): a group never crosses splits.",
        "Data",
    )
    val_fraction: float = option(
        0.15, "Share of the cases for validation, 0 to 1.", "Data", low=0.0, high=0.9
    )
    test_fraction: float = option(
        0.15, "Share of the cases held back for evaluate, 0 to 1.", "Data", low=0.0, high=0.9
    )
    split_seed: int = option(
        0, "Which random division; keep it to compare models on the same test cases.", "Data"
    )
    size: int = option(
        224,
        "Side of the square that images are brought to, in pixels, a multiple of 32.",
        "Data",
        low=32,
        high=2048,
    )
    channels: Literal[1, 3] = option(
        3, "Image channels: 1 grey, 3 colour (grey images are repeated).", "Data"
    )
    augment: bool = option(True, "Random flips and rotations up to 15 degrees while training.", "Data")

    encoder: str = option(
        "efficientnet-b4", "Encoder, efficientnet-b0 (small, fast) to efficientnet-b7.", "Model"
    )
    encoder_weights: str | None = option(
        None, "File with encoder weights to start from; none starts at random.", "Model"
    )
    interaction: Interaction = option(
        "proxy",
        "How the two decoders help each other: none, fixed, proxy (the paper), entropy or attention; "
        "encoder-sharing has one decoder, for the mask alone.",
        "Model",
    )
    dropout: float = option(
        0.3, "Share of features dropped while training, 0 to 1.", "Model", low=0.0, high=0.95
    )

    epochs: int = option(
        150, "Stage 1 (whole network): most passes over the training images.", "Training", low=1, high=100000
    )
    batch_size: int = option(
        8,
        "Images per step in each process, at least 2; lower it if memory runs out.",
        "Training",
        low=2,
        high=4096,
    )
    learning_rate: float = option(3e-4, "Adam's step size at the start.", "Training", low=1e-8, high=1.0)
    lr_floor: float = option(
        0.03, "The step size falls along a cosine to this share of its start.", "Training", low=0.0, high=1.0
    )
    plateau_factor: float = option(
        0.55, "The step size is multiplied by this when validation stalls.", "Training", low=0.01, high=1.0
    )
    plateau_patience: int = option(
        7, "Epochs without progress before that happens.", "Training", low=1, high=100000
    )
    plateau_cooldown: int = option(
        2, "Epochs to wait after it before counting again.", "Training", low=0, high=100000
    )
    bn_momentum: float = option(
        0.01,
        "Weight of the newest batch in BatchNorm's running statistics; raise it for runs of few steps.",
        "Training",
        low=1e-4,
        high=1.0,
    )
    clip_norm: float = option(
        1.0, "Gradients longer than this are shortened to it.", "Training", low=1e-6, high=1e6
    )
    patience: int = option(
        22, "Stop stage 1 after this many epochs without progress.", "Training", low=1, high=100000
    )
    min_progress: float = option(
        0.004,
        "Progress means this much more of 0.7 IoU + 0.3 accuracy on the validation cases.",
        "Training",
        low=0.0,
        high=1.0,
    )
    gate_epochs: int = option(
        15, "Stage 2 (gates only): most passes; 0 leaves stage 2 out.", "Training", low=0, high=100000
    )
    gate_patience: int = option(
        5,
        "Stop stage 2 after this many epochs without a lower validation loss.",
        "Training",
        low=1,
        high=100000,
    )
    gate_learning_rate: float = option(3e-4, "Adam's step size in stage 2.", "Training", low=1e-8, high=1.0)
    seed: int = option(
        0,
        "Fixes initial weights, order of images, augmentation and dropout.",
        "Training",
        low=0,
        high=2**31 - 1,
    )

    sampling: Literal["shuffled", "balanced"] = option(
        "shuffled",
        "Training order: balanced draws every class equally often (with repeats), for rare classes.",
        "Imbalance",
    )
    class_loss: Literal["focal", "balanced"] = option(
        "focal",
        "Class loss: balanced also weighs each class by its inverse effective number of cases.",
        "Imbalance",
    )
    class_beta: float = option(
        0.999,
        "For --class-loss balanced: 0 weighs all classes alike, close to 1 by one over their cases.",
        "Imbalance",
        low=0.0,
        high=0.999999,
    )

    boundary: Literal["soft", "hard"] = option(
        "soft",
        "Boundary loss: hard thresholds the mask as the published code does and so trains nothing.",
        "Parity",
    )
    loss_weights: Literal["moving", "constant"] = option(
        "moving",
        "Mask/class loss weights: constant keeps 0.82/0.18 as the published code in effect does.",
        "Parity",
    )
    gate_targets: Literal["rank", "minmax"] = option(
        "rank", "Scaling of the gate targets in a batch: minmax is the published code's.", "Parity"
    )
    truncated_iou: bool = option(
        False,
        "Validate with the published code's IoU, which cuts mask probabilities to 0 and so ignores the mask.",
        "Parity",
    )
    double_rescale: bool = option(
        False, "Divide images by 255 once more than needed, as the published loaders do.", "Parity"
    )

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where to compute; auto takes a GPU if there is one.", "Machine"
    )
    devices: int | None = option(
        None,
        "Processes on this machine, one a GPU; on a CPU they divide the cores. Default: torchrun's number, "
        "else 1.",
        "Machine",
        low=1,
        high=1024,
    )
    num_nodes: int | None = option(
        None,
        "Machines that train together; each needs MASTER_ADDR, MASTER_PORT and its NODE_RANK, or torchrun.",
        "Machine",
        low=1,
        high=4096,
    )
    strategy: Literal["auto", "ddp"] = option(
        "auto", "How several processes share the work: data parallel (ddp) is the one way.", "Machine"
    )
    precision: Literal["32", "bf16", "16"] = option(
        "32", "Bits of the arithmetic; bf16 and 16 are for GPUs.", "Machine"
    )
    activation_checkpointing: bool = option(
        False,
        "Compute activations again in the backward pass instead of keeping them: less memory, longer steps, "
        "same results.",
        "Machine",
    )
    threads: int = option(
        0, "CPU threads, 0 for torch's choice. Same bits need the same number.", "Machine", low=0, high=1024
    )
    workers: int = option(
        0, "Extra processes that read images, 0 reads in the main one.", "Machine", low=0, high=256
    )
    cache_mb: int = option(
        1024,
        "Memory for decoded images, in MB; the processes of a machine share it.",
        "Machine",
        low=0,
        high=1 << 20,
    )

    RUNTIME = (
        *("out", "device", "devices", "num_nodes", "strategy", "activation_checkpointing"),
        *("threads", "workers", "cache_mb"),
    )

    def checked(self) -> TrainConfig:
        """Returns self, or raises UserError with one line naming the first wrong setting."""
        check_ranges(self)
        if self.data is None:
            raise UserError("no data: give the folder with the images as --data PATH")
        if self.size % 32:
            raise UserError(
                f"--size {self.size}: must be a multiple of 32, such as {max(32, self.size // 32 * 32)}"
            )
        if self.val_fraction <= 0 or self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                f"--val-fraction {self.val_fraction}, --test-fraction {self.test_fraction}: validation needs "
                "cases, and both together must be below 1 so that training cases remain"
            )
        if self.groups is not None and not Path(self.groups).is_file():
            raise UserError(f"--groups {self.groups}: no such file")
        if self.encoder_weights is not None and not Path(self.encoder_weights).is_file():
            raise UserError(f"--encoder-weights {self.encoder_weights}: no such file")
        return self

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares of train, validation and test."""
        return (1.0 - self.val_fraction - self.test_fraction, self.val_fraction, self.test_fraction)


@dataclass(frozen=True)
class AblateConfig(TrainConfig):
    """Which interactions to compare, over how many seeds; all else as in training, the same for every cell.

    `interaction` is not used; `seed` is the first of the seeds.
    """

    rows: tuple[str, ...] = option(
        get_args(Interaction), "Interactions to compare; all if none is named.", "Ablation"
    )
    seeds: int = option(3, "Runs of each, with seeds that follow on each other.", "Ablation", low=1, high=100)

    def checked(self) -> AblateConfig:
        """Returns self, or raises UserError with one line naming the first wrong setting."""
        super().checked()
        if self.out is None:
            raise UserError("no output folder: give --out DIR, where every run and the table go")
        if self.test_fraction <= 0:
            raise UserError("--test-fraction 0: an ablation needs test cases to compare on")
        known = get_args(Interaction)
        for row in self.rows:
            if row not in known or self.rows.count(row) > 1:
                why = "named twice" if row in known else f"must be one of {', '.join(known)}"
                raise UserError(f"row {row}: {why}")
        if not self.rows:
            raise UserError(f"no rows: name some of {', '.join(known)}")
        return self


def resumed_config(asked: TrainConfig, stored: TrainConfig, source: str) -> TrainConfig:
    """The stored settings with the asked runtime settings; UserError where another asked one differs.

    A setting left at its default counts as not asked for.
    """
    defaults = TrainConfig()
    taken: dict[str, Any] = {}
    for item in dataclasses.fields(TrainConfig):
        new, old = getattr(asked, item.name), getattr(stored, item.name)
        if new == getattr(defaults, item.name) or new == old:
            continue
        if item.name not in TrainConfig.RUNTIME:
            raise UserError(f"{source}: was started with {flag(item.name)} {old}, not {new}; leave it out")
        taken[item.name] = new
    return dataclasses.replace(stored, **taken)
