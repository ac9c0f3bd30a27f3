"""What the two stages train, and the numbers that choose the best epoch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bti_fast.data import CaseDataset, read_dataset
from bti_fast.engine.lightning_module import TaskStage, balanced_class_weights, mask_iou, selection_score
from bti_fast.engine.run_folder import load_model
from bti_fast.engine.schedule import Counters
from bti_fast.engine.train import build_model, class_names
from bti_fast.errors import UserError
from bti_fast.losses import class_balanced_weights
from tests.engine.tiny import TinyEncoder, tiny_config, tiny_train


def test_stage_two_moves_the_gates_and_nothing_else(finished_run: Path) -> None:
    """BatchNorm's running statistics included: they are buffers of the file."""
    first, second = sorted((finished_run / "checkpoints").iterdir())
    before, after = load_file(first), load_file(second)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    model = load_model(first, TinyEncoder())
    gates = {id(parameter) for parameter in model.gate_parameters()}
    expected = {name for name, parameter in model.named_parameters() if id(parameter) in gates}
    assert moved == expected and len(expected) > 0


def test_stage_two_is_skipped_without_gates(phantoms: Path, tmp_path: Path) -> None:
    tiny_train(phantoms, tmp_path / "run", interaction="fixed", epochs=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "stage1-epoch0001.safetensors"
    ]


@pytest.mark.parametrize("interaction", ["none", "entropy", "attention"])
def test_every_interaction_trains(phantoms: Path, tmp_path: Path, interaction: str) -> None:
    tiny_train(phantoms, tmp_path / "run", interaction=interaction, epochs=1, gate_epochs=1)
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_options_against_imbalance(phantoms: Path, tmp_path: Path) -> None:
    """Each option changes what is learned; the balanced loss weighs equal classes alike."""
    runs = {
        "plain": {},
        "sampling": {"sampling": "balanced"},
        "loss": {"class_loss": "balanced", "class_beta": 0.9},
    }
    for name, changes in runs.items():
        tiny_train(phantoms, tmp_path / name, interaction="none", epochs=1, **changes)
    plain, sampling, loss = (load_file(tmp_path / name / "model.safetensors") for name in runs)
    assert not torch.equal(plain["cls_out.weight"], sampling["cls_out.weight"])
    torch.testing.assert_close(plain["cls_out.weight"], loss["cls_out.weight"], atol=1e-5, rtol=1e-4)

    index = read_dataset(phantoms)
    few = [case for case in index.cases if case.label != "benign"]
    few.append(next(case for case in index.cases if case.label == "benign"))
    weights = balanced_class_weights(CaseDataset(few, index.classes, 32), 0.9)
    counts = torch.tensor([sum(case.label == name for case in few) for name in index.classes])
    torch.testing.assert_close(weights, class_balanced_weights(counts.tolist(), 0.9))
    assert weights.argmax() == counts.argmin()


def test_mask_iou_by_hand() -> None:
    predicted = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    truth = predicted.clone()
    predicted[0, 0, :2], truth[0, 0, 1:3] = True, True  # rows 0-1 against 1-2: 4 / 12
    truth[1, 0, 0, 0] = True  # missed
    predicted[2, 0, 0, 0] = True  # invented
    assert mask_iou(predicted, truth).tolist() == pytest.approx([1 / 3, 0.0, 0.0, 1.0])


def test_selection_score() -> None:
    assert selection_score(0.5, 0.9) == pytest.approx(0.62)
    assert selection_score(None, 0.9) == 0.9
    assert selection_score(0.5, None) == 0.5
    with pytest.raises(UserError, match="neither masks nor classes"):
        selection_score(None, None)


def test_truncated_iou_ignores_the_mask(phantoms: Path, tmp_path: Path) -> None:
    """Keras' MeanIoU(2) on sigmoid outputs sees only zeros: half the background's share, whatever is
    predicted."""
    stage = TaskStage(torch.nn.Identity(), tiny_config(phantoms, tmp_path, truncated_iou=True), Counters())
    truth = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    truth[..., :1, :] = True
    for prob in (0.01, 0.99):
        stage._overlap = [0.0] * 4
        stage._add_truncated(torch.full((1, 1, 4, 4), prob), truth)
        assert stage._overlap == [12.0, 16.0, 0.0, 4.0]  # 12 of 16 background, 0 of 4 lesion


def test_double_rescale_is_kept_with_the_weights(phantoms: Path, tmp_path: Path) -> None:
    plain, twice = (
        build_model(tiny_config(phantoms, tmp_path, double_rescale=on), ("a", "b"), TinyEncoder()).eval()
        for on in (False, True)
    )
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(twice(image).seg_logits, plain(image / 255).seg_logits, atol=1e-5)
        assert not torch.allclose(twice(image).seg_logits, plain(image).seg_logits, atol=1e-5)


def test_class_names_fill_up_to_two() -> None:
    assert class_names(("a", "b", "c")) == ("a", "b", "c")
    assert class_names(()) == ("unused 1", "unused 2")
    assert class_names(("a",)) == ("a", "unused 1")


def test_divergence_is_named(phantoms: Path, tmp_path: Path) -> None:
    class Broken(TinyEncoder):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [value * math.nan for value in super().forward(x)]

    with pytest.raises(
        UserError, match="training diverged in stage 1, epoch 1: .* is nan; try a lower --learning-rate"
    ):
        tiny_train(phantoms, tmp_path / "run", encoder=Broken())
    assert not (tmp_path / "run" / "model.safetensors").exists()
