"""Cases that lack a mask, a class or both: what they add to gradients, means, draws and metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bti_fast import losses
from bti_fast.data import CaseDataset, read_dataset
from bti_fast.engine.inference import predict_images
from bti_fast.engine.lightning_module import GateStage, TaskStage
from bti_fast.engine.loaders import ordered_loader
from bti_fast.engine.run_folder import load_model
from bti_fast.engine.schedule import Counters
from bti_fast.engine.subject import case_row
from bti_fast.engine.train import build_model
from bti_fast.metrics import is_failure, summarise
from tests.engine.tiny import TinyEncoder, tiny_config, tiny_train


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def part_of(batch: dict, chosen: torch.Tensor) -> dict:
    return {key: value[chosen] if torch.is_tensor(value) else value for key, value in batch.items()}


@pytest.mark.parametrize("interaction", ["proxy", "entropy"])
def test_a_mixed_batch_trains_as_its_parts_do(partial: Path, tmp_path: Path, interaction: str) -> None:
    """Gradients of the batch are those of the mask loss on the cases with masks alone plus those of the class
    loss on the cases with classes alone: float64, BatchNorm's statistics held."""
    index = read_dataset(partial)
    config = tiny_config(partial, tmp_path, interaction=interaction)
    model = build_model(config, index.classes, TinyEncoder()).double().eval()
    batch = next(iter(ordered_loader(CaseDataset(index.cases[:8], index.classes, 32), 8, 0)))
    batch["image"] = batch["image"].double()
    has_mask, has_label = batch["has_mask"], batch["has_label"]
    kinds = set(zip(has_mask.tolist(), has_label.tolist(), strict=True))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}

    stage = TaskStage(model, config, Counters())
    w_seg, w_cls = losses.loss_weights(0)
    seg, cls, auxiliary = stage._losses(model(batch["image"]), batch)
    mixed = gradients(model, w_seg * seg + w_cls * cls + auxiliary)

    masks, labels = part_of(batch, has_mask), part_of(batch, has_label)
    out = model(masks["image"])
    alone = w_seg * losses.segmentation_loss(out.seg_logits, masks["mask"])
    alone = alone + losses.auxiliary_loss(out.aux_seg_logits, (), masks["mask"], masks["label"])
    first = gradients(model, alone)
    out = model(labels["image"])
    alone = w_cls * losses.classification_loss(out.cls_logits, labels["label"])
    alone = alone + losses.auxiliary_loss((), out.aux_cls_logits, labels["mask"], labels["label"])
    second = gradients(model, alone)

    assert len(mixed) > 100 and mixed.keys() == first.keys() | second.keys()
    for name, value in mixed.items():
        truth = sum(part[name] for part in (first, second) if name in part)
        torch.testing.assert_close(value, truth, atol=1e-9, rtol=1e-7, msg=name)


def test_gates_of_a_mixed_batch_train_as_their_parts_do(partial: Path, tmp_path: Path) -> None:
    index = read_dataset(partial)
    config = tiny_config(partial, tmp_path)
    model = build_model(config, index.classes, TinyEncoder()).double().eval()
    batch = next(iter(ordered_loader(CaseDataset(index.cases[:8], index.classes, 32), 8, 0)))
    batch["image"] = batch["image"].double()
    stage = GateStage(model, config, Counters())
    stage.configure_optimizers()
    mixed = gradients(model, sum(stage._losses(batch)))
    masks, labels = part_of(batch, batch["has_mask"]), part_of(batch, batch["has_label"])
    first = gradients(model, stage._losses(masks)[0])
    second = gradients(model, stage._losses(labels)[1])
    assert 0 < len(mixed) < 40
    for name, value in mixed.items():
        torch.testing.assert_close(value, first[name] + second[name], atol=1e-10, rtol=1e-7, msg=name)


def test_validation_means_are_over_the_cases_that_have_the_truth(partial: Path, tmp_path: Path) -> None:
    """However the cases fall into batches, a batch without any mask included."""
    index = read_dataset(partial)
    config = tiny_config(partial, tmp_path)
    model = build_model(config, index.classes, TinyEncoder()).eval()
    data = CaseDataset(sorted(index.cases, key=lambda case: case.mask_known), index.classes, 32)
    found = []
    for size in (2, 18):
        stage = TaskStage(model, config, Counters())
        with torch.no_grad():
            for number, batch in enumerate(ordered_loader(data, size, 0)):
                stage.validation_step(batch, number)
        found.append(stage.means())
    assert set(found[0]) == {"val_seg_loss", "val_cls_loss", "val_iou", "val_accuracy"}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-5), name


def test_a_partly_labelled_set_trains_and_is_judged(partial: Path, tmp_path: Path) -> None:
    said = tiny_train(partial, tmp_path / "run", epochs=1, gate_epochs=1, sampling="balanced")
    assert "with neither mask nor class are left out" in said
    index = read_dataset(partial)
    model = load_model(tmp_path / "run" / "model.safetensors", TinyEncoder())
    images = ((case.id, torch.rand(3, 40, 40).numpy()) for case in index.cases[:8])
    rows = [
        case_row(case, None if case.label is None else model.classes.index(case.label), found)
        for case, found in zip(index.cases, predict_images(model, images), strict=False)
    ]
    summary = summarise(rows, model.classes)
    masks = sum(case.mask_known for case in index.cases[:8])
    labels = sum(case.label is not None for case in index.cases[:8])
    assert summary["mask"]["iou"]["count"] == masks and summary["mask"]["iou"]["left_out"] == 8 - masks
    assert summary["class"]["accuracy"]["count"] == labels
    assert (
        [is_failure(row) is None for row in rows].count(True) == summary["failure"]["rate"]["left_out"] == 1
    )
