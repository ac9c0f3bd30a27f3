"""The two training stages as Lightning modules: losses, optimisers and validation scores, no files."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bti_fast import losses
from bti_fast.data import CaseDataset
from bti_fast.engine import collective
from bti_fast.engine.config import TrainConfig
from bti_fast.engine.lightning_import import lightning
from bti_fast.engine.loaders import count_classes, start_epoch
from bti_fast.engine.schedule import Counters, cosine_share
from bti_fast.errors import UserError
from bti_fast.losses.gates import SCALINGS
from bti_fast.models import BTINet

ADAM_BETAS = (0.91, 0.999)
IOU_SHARE, ACCURACY_SHARE = 0.7, 0.3
RANK_STRIDE = 10**15  # far more than any seed of one process


class Stage(lightning.LightningModule):
    """What both stages share: seeding by epoch, running means, a record of each epoch in `self.record`."""

    number = 0

    def __init__(self, model: BTINet, config: TrainConfig, counters: Counters) -> None:
        super().__init__()
        self.model, self.config, self.counters = model, config, counters
        self.optimizer_state: dict[str, Any] | None = None
        self.record: dict[str, float] = {}
        self._sums: dict[str, list[Tensor | int]] = {}

    def on_train_epoch_start(self) -> None:
        epoch = self.current_epoch
        # Every epoch starts from a generator of its own, so a resumed run needs no stored generator state.
        seed = self.config.seed * 1_000_003 + self.number * 100_003 + epoch
        # Of its own in each process, too: else all would drop the same features.
        torch.manual_seed((seed + collective.rank() * RANK_STRIDE) % 2**63)
        start_epoch(self.trainer.train_dataloader, epoch)
        self._sums.clear()

    def add(self, name: str, value: Tensor, count: int | Tensor) -> None:
        """Adds count samples of mean value to the running mean of name, without waiting for the device."""
        total = self._sums.setdefault(name, [torch.zeros((), dtype=torch.float64, device=value.device), 0])
        total[0] = total[0] + value.detach().double() * count
        total[1] = total[1] + count

    def means(self) -> dict[str, float]:
        """The running means so far, over all processes; a name without samples is left out."""
        own = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        joint = collective.added_up(own)
        return {name: total / count for name, (total, count) in joint.items() if count}

    def shares(self, batch: dict[str, Any]) -> tuple[float | Tensor, float | Tensor, int | Tensor]:
        """Factors of the mask and the class loss, and the count of the training loss, of this process's part
        of a joint batch.

        DDP averages gradients over the processes; with these factors the average is the gradient of means
        over the samples of the joint batch that have the truth, however these are spread.
        """
        if collective.world() == 1:
            return 1.0, 1.0, len(batch["id"])
        has_mask, has_label = batch["has_mask"], batch["has_label"]
        own = torch.stack((has_mask.sum(), has_label.sum(), torch.full_like(has_mask.sum(), len(has_mask))))
        joint = collective.joint_sum(own)
        seg, cls, _ = (own * collective.world() / joint.clamp(min=1)).unbind()
        # The losses of the processes average to the joint one, so each counts for as many samples.
        return seg, cls, joint[2] / collective.world()

    def finish_epoch(self, extra: dict[str, float]) -> None:
        """Builds the epoch's record; UserError where a loss is not a number."""
        self.record = {**self.means(), **extra}
        bad = [name for name, value in self.record.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"training diverged in stage {self.number}, epoch {self.current_epoch + 1}: {bad[0]} is "
                f"{self.record[bad[0]]}; try a lower --learning-rate (now {self.config.learning_rate})"
            )

    def _adam(self, parameters: list[torch.nn.Parameter], learning_rate: float) -> torch.optim.Adam:
        # One pass over the parameters; in mixed precision Lightning refuses to clip with it.
        fused = self.config.precision == "32"
        optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=ADAM_BETAS, fused=fused)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def _set_learning_rate(self, value: float) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = value


class TaskStage(Stage):
    """Stage 1: the whole network on the mask and class losses (SPEC §6)."""

    number = 1

    def __init__(self, model: BTINet, config: TrainConfig, counters: Counters) -> None:
        super().__init__(model, config, counters)
        self.class_weights: Tensor | None = None  # (L,), of the class-balanced loss
        self._overlap = [
            0.0,
            0.0,
            0.0,
            0.0,
        ]  # for the published IoU: intersection and union, background then lesion

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._adam(list(self.model.parameters()), self.config.learning_rate)

    def on_train_start(self) -> None:
        if self.config.class_loss == "balanced":
            data = self.trainer.train_dataloader.dataset
            weights = balanced_class_weights(data, self.config.class_beta)
            self.class_weights = None if weights is None else weights.to(self.device)

    def loss_weights(self) -> tuple[float, float]:
        """Weights of the mask and the class loss in this epoch."""
        return losses.loss_weights(0 if self.config.loss_weights == "constant" else self.current_epoch)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.train()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        progress = (self.current_epoch + batch_idx / self.trainer.num_training_batches) / self.config.epochs
        share = cosine_share(progress, self.config.lr_floor) * self.counters.factor
        self._set_learning_rate(self.config.learning_rate * share)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        seg_share, cls_share, count = self.shares(batch)
        out = self.model(batch["image"])
        seg, cls, auxiliary = self._losses(out, batch, (seg_share, cls_share))
        w_seg, w_cls = self.loss_weights()
        total = w_seg * (seg * seg_share) + w_cls * (cls * cls_share) + auxiliary
        self.add("train_loss", total, count)
        self.add("train_seg_loss", seg, batch["has_mask"].sum())
        self.add("train_cls_loss", cls, batch["has_label"].sum())
        return total

    def _losses(
        self, out: Any, batch: dict[str, Any], shares: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask and class loss, and the auxiliary one with the shares of `shares()` in it."""
        mask, label, has_mask, has_label = (batch[key] for key in ("mask", "label", "has_mask", "has_label"))
        boundary = self.config.boundary
        seg = losses.segmentation_loss(out.seg_logits, mask, has_mask, boundary=boundary)
        weights = self.class_weights
        cls = losses.classification_loss(out.cls_logits, label, has_label, class_weights=weights)
        auxiliary = losses.auxiliary_loss(
            out.aux_seg_logits,
            out.aux_cls_logits,
            mask,
            label,
            has_mask,
            has_label,
            boundary=boundary,
            task_weights=shares,
            class_weights=weights,
        )
        return seg, cls, auxiliary

    def on_validation_epoch_start(self) -> None:
        self._overlap = [0.0, 0.0, 0.0, 0.0]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not batch["id"]:
            return
        out = self.model(batch["image"])
        seg, cls, _ = self._losses(out, batch)
        has_mask, has_label = batch["has_mask"], batch["has_label"]
        self.add("val_seg_loss", seg, has_mask.sum())
        self.add("val_cls_loss", cls, has_label.sum())
        if bool(has_mask.any()):
            logits, truth = out.seg_logits[has_mask].float(), batch["mask"][has_mask] > 0.5
            self.add("val_iou", mask_iou(logits > 0, truth).mean(), len(truth))
            if self.config.truncated_iou:
                self._add_truncated(logits.sigmoid(), truth)
        if bool(has_label.any()):
            right = out.cls_logits[has_label].argmax(1) == batch["label"][has_label]
            self.add("val_accuracy", right.double().mean(), len(right))

    def _add_truncated(self, prob: Tensor, truth: Tensor) -> None:
        """Counts as Keras' MeanIoU(2) does on sigmoid outputs: cast to int, only p = 1 stays 1."""
        for value in (0, 1):
            predicted, true = prob.int() == value, truth.int() == value
            self._overlap[2 * value] += float((predicted & true).sum())
            self._overlap[2 * value + 1] += float((predicted | true).sum())

    def on_validation_epoch_end(self) -> None:
        means = self.means()
        iou, accuracy = means.get("val_iou"), means.get("val_accuracy")
        if self.config.truncated_iou and iou is not None:
            pairs = zip(
                ("background", "lesion"),
                zip(self._overlap[::2], self._overlap[1::2], strict=True),
                strict=True,
            )
            shares = [i / u for i, u in collective.added_up(dict(pairs)).values() if u]
            iou = sum(shares) / len(shares)
        score = selection_score(iou, accuracy)
        weights = dict(zip(("val_seg_loss", "val_cls_loss"), self.loss_weights(), strict=True))
        # From the means, not batch by batch: a batch without masks says nothing of the mask loss.
        loss = sum(weight * means.get(name, 0.0) for name, weight in weights.items())
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.finish_epoch(
            {
                "val_loss": loss,
                "val_score": score,
                "learning_rate": rate,
                "weight_seg": self.loss_weights()[0],
            }
        )


class GateStage(Stage):
    """Stage 2: the gates alone against difficulty targets; the rest is frozen, BatchNorm and dropout too.

    The network stays in evaluation mode, so the gates are trained on the features that they will see in use.
    """

    number = 2

    def __init__(self, model: BTINet, config: TrainConfig, counters: Counters) -> None:
        super().__init__(model, config, counters)
        # Here, before DDP looks which gradients it has to average.
        self.model.requires_grad_(False)
        for parameter in self.model.gate_parameters():
            parameter.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._adam(list(self.model.gate_parameters()), self.config.gate_learning_rate)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.eval()

    def _losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = self.model(batch["image"])
        return losses.gate_losses(
            out.gates,
            out.seg_logits,
            batch["mask"],
            out.cls_logits,
            batch["has_mask"],
            batch["has_label"],
            scaling=self._scaled,
        )

    def _scaled(self, difficulty: Tensor, has: Tensor) -> Tensor:
        """Difficulties scaled within the joint batch of all processes."""
        scale = SCALINGS[self.config.gate_targets]
        joint, own = collective.gathered(difficulty)
        return scale(joint, collective.gathered(has)[0])[own]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        seg_share, cls_share, count = self.shares(batch)
        seg, cls = self._losses(batch)
        total = seg * seg_share + cls * cls_share
        self.add("train_loss", total, count)
        return total

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not batch["id"]:
            for _ in range(2):  # the other processes ask for the difficulties of both tasks
                self._scaled(
                    torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.bool, device=self.device)
                )
            return
        seg, cls = self._losses(batch)
        self.add("val_w_seg_loss", seg, batch["has_mask"].sum())
        self.add("val_w_cls_loss", cls, batch["has_label"].sum())

    def on_validation_epoch_end(self) -> None:
        means = self.means()
        loss = sum(means.get(name, 0.0) for name in ("val_w_seg_loss", "val_w_cls_loss"))
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.finish_epoch({"val_loss": loss, "val_score": -loss, "learning_rate": rate})


def balanced_class_weights(data: CaseDataset, beta: float) -> Tensor | None:
    """losses.class_balanced_weights of a training set, or None where no case of it has a class."""
    counts = count_classes(data.cases, data.classes).values()
    return losses.class_balanced_weights(list(counts), beta) if any(counts) else None


def mask_iou(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU of boolean masks (B, K, H, W) -> (B,) over all K planes; 1 where both are empty (SPEC §7)."""
    overlap = (predicted & truth).flatten(1).sum(1).double()
    union = (predicted | truth).flatten(1).sum(1).double()
    return torch.where(union > 0, overlap / union.clamp(min=1), torch.ones_like(union))


def selection_score(iou: float | None, accuracy: float | None) -> float:
    """0.7 IoU + 0.3 accuracy (SPEC §6); where the cases lack masks or classes, the one that is there.

    UserError where they lack both.
    """
    if iou is None and accuracy is None:
        raise UserError(
            "the validation cases have neither masks nor classes: nothing to choose the best epoch by"
        )
    if iou is None or accuracy is None:
        return accuracy if iou is None else iou
    return IOU_SHARE * iou + ACCURACY_SHARE * accuracy
