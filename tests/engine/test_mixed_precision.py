"""bf16 and fp16 on the batches that break arithmetic: nothing becomes NaN, and losses are in fp32.

BTI_FAST_NAN_STEPS=1000 python -m pytest --timeout 0 tests/engine/test_mixed_precision.py is the long version.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bti_fast import losses
from bti_fast.engine.lightning_module import GateStage, TaskStage
from bti_fast.engine.scaling import FlooredGradScaler
from bti_fast.engine.schedule import Counters
from bti_fast.engine.state import load_state
from bti_fast.engine.train import build_model
from tests.engine.tiny import TinyEncoder, tiny_config, tiny_train

STEPS = int(os.environ.get("BTI_FAST_NAN_STEPS", "3"))
SIZE, BATCH = 32, 4
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


def adversarial(step: int) -> dict[str, Tensor]:
    """Batch `step` of an endless sequence: constant, black, white, noisy and one-pixel images, each with
    empty, full, one-pixel and missing masks, and classes that are missing, all alike or at random."""
    generator = torch.Generator().manual_seed(step)
    kinds = (
        torch.zeros(3, SIZE, SIZE),
        torch.ones(3, SIZE, SIZE),
        torch.full((3, SIZE, SIZE), 0.37),
        torch.rand(3, SIZE, SIZE, generator=generator),
        torch.nn.functional.pad(torch.ones(3, 1, 1), (5, SIZE - 6, 9, SIZE - 10)),
        (torch.rand(3, SIZE, SIZE, generator=generator) > 0.5).float(),
    )
    masks = (
        torch.zeros(1, SIZE, SIZE),
        torch.ones(1, SIZE, SIZE),
        torch.nn.functional.pad(torch.ones(1, 1, 1), (5, SIZE - 6, 9, SIZE - 10)),
        (torch.rand(1, SIZE, SIZE, generator=generator) > 0.5).float(),
    )
    images, truths = [], []
    for position in range(BATCH):
        # Some batches are of one kind throughout: BatchNorm then sees no variance at all.
        number = step // 2 if step % 3 == 0 else step + position
        images.append(kinds[number % len(kinds)])
        truths.append(masks[(step // 3 if step % 4 == 0 else step + position) % len(masks)])
    return {
        "image": torch.stack(images),
        "mask": torch.stack(truths),
        "label": torch.zeros(BATCH, dtype=torch.long)
        if step % 5 == 0
        else torch.randint(0, 3, (BATCH,), generator=generator),
        "has_mask": torch.rand(BATCH, generator=generator) > (1.0 if step % 7 == 0 else 0.2),
        "has_label": torch.rand(BATCH, generator=generator) > (1.0 if step % 11 == 5 else 0.2),
    }


@pytest.mark.parametrize("interaction", ["proxy", "entropy", "attention"])
@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_no_nan_on_adversarial_batches(tmp_path: Path, precision: str, interaction: str) -> None:
    """As Lightning does it: autocast around the step, fp16 with scaling, gradients clipped to norm 1."""
    config = tiny_config(tmp_path, tmp_path, interaction=interaction, precision=precision)
    model = build_model(config, ("a", "b", "c"), TinyEncoder())
    skipped = 0
    for stage_class in (TaskStage, GateStage):
        stage = stage_class(model, config, Counters())
        optimizer = stage.configure_optimizers()
        trained = [p for p in model.parameters() if p.requires_grad]
        scaler = FlooredGradScaler("cpu", enabled=precision == "16")
        model.train(stage_class is TaskStage)
        for step in range(STEPS):
            batch = adversarial(step)
            with torch.autocast("cpu", dtype=DTYPES[precision]):
                if stage_class is TaskStage:
                    parts = stage._losses(model(batch["image"]), batch)
                else:
                    parts = stage._losses(batch)
            assert all(part.dtype == torch.float32 for part in parts)
            assert all(bool(torch.isfinite(part)) for part in parts), (step, parts)
            scaler.scale(sum(parts)).backward()
            scaler.unscale_(optimizer)
            if scaler.is_enabled():
                # Without variance in a batch the gradients themselves are beyond fp16.
                skipped += step % 3 != 0 and any(
                    not bool(torch.isfinite(p.grad).all()) for p in trained if p.grad is not None
                )
            else:
                assert all(bool(torch.isfinite(p.grad).all()) for p in trained if p.grad is not None), step
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    # The scaler starts at 65536 and halves until fp16 holds the gradients: a few steps, not most of them.
    assert skipped <= max(6, STEPS // 50)


def test_the_scale_of_the_loss_has_a_floor() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = FlooredGradScaler("cpu")
    for value in [torch.inf] * 200 + [1.0]:
        optimizer.zero_grad()
        scaler.scale(weight * value).sum().backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1 and weight.item() == 0.5  # the one step that was not left out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_logits_are_those_of_their_fp32_values(dtype: torch.dtype) -> None:
    batch = adversarial(1)
    generator = torch.Generator().manual_seed(0)
    seg = (8 * torch.randn(BATCH, 1, SIZE, SIZE, generator=generator)).to(dtype)
    cls = (8 * torch.randn(BATCH, 3, generator=generator)).to(dtype)
    gates = [torch.rand(BATCH, 2, generator=generator).to(dtype)]

    def all_losses(seg: Tensor, cls: Tensor, gates: list[Tensor]) -> list[Tensor]:
        mask, label, has_mask, has_label = (batch[k] for k in ("mask", "label", "has_mask", "has_label"))
        return [
            losses.segmentation_loss(seg, mask, has_mask),
            losses.classification_loss(cls, label, has_label),
            losses.auxiliary_loss([seg], [cls], mask, label, has_mask, has_label),
            losses.gate_loss(gates, seg, mask, cls, label, has_mask, has_label),
        ]

    truth = all_losses(seg.float(), cls.float(), [gate.float() for gate in gates])
    with torch.autocast("cpu", dtype=dtype):
        found = all_losses(seg, cls, gates)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_a_run_with_scaled_gradients_trains_and_resumes(phantoms: Path, tmp_path: Path) -> None:
    changes = {"precision": "16", "epochs": 2, "gate_epochs": 1}
    tiny_train(phantoms, tmp_path / "whole", **changes)
    state = load_state(tmp_path / "whole")
    assert state["finished"]
    with pytest.raises(KeyboardInterrupt):
        tiny_train(phantoms, tmp_path / "run", encoder=TinyEncoder(4, KeyboardInterrupt()), **changes)
    assert load_state(tmp_path / "run")["precision"]["scale"] > 0
    tiny_train(phantoms, tmp_path / "run", resume=True, **changes)
    whole, run = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(bool(torch.isfinite(value).all()) for value in whole.values())
    assert all(torch.equal(value, run[name]) for name, value in whole.items())
