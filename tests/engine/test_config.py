"""Settings: what is accepted, and the line that names what is not."""

from __future__ import annotations

import dataclasses

import pytest

from bti_fast.engine.config import TrainConfig, resumed_config
from bti_fast.engine.options import from_dict
from bti_fast.engine.run_config import EvaluateConfig, PredictConfig
from bti_fast.errors import UserError


def test_defaults_are_the_paper_recipe() -> None:
    config = TrainConfig(data=".").checked()
    assert (config.size, config.encoder, config.interaction, config.batch_size) == (
        224,
        "efficientnet-b4",
        "proxy",
        8,
    )
    assert (config.learning_rate, config.lr_floor, config.clip_norm) == (3e-4, 0.03, 1.0)
    assert (config.plateau_factor, config.plateau_patience, config.plateau_cooldown) == (0.55, 7, 2)
    assert (config.patience, config.min_progress, config.gate_epochs, config.gate_patience) == (
        22,
        0.004,
        15,
        5,
    )
    assert (config.boundary, config.loss_weights, config.gate_targets) == ("soft", "moving", "rank")
    assert not config.truncated_iou and not config.double_rescale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "no data: give the folder"),
        ({"size": 100}, "--size 100: must be a multiple of 32, such as 96"),
        ({"batch_size": 1}, "--batch-size 1: must lie between 2 and 4096"),
        ({"batch_size": 2.5}, "--batch-size 2.5: must be a whole number"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must lie between"),
        ({"augment": 1}, "--augment 1: must be true or false"),
        ({"epochs": None}, "--epochs: has no value; give one or leave it out"),
        ({"encoder": 5}, "--encoder 5: must be text"),
        ({"devices": 1.5}, "--devices 1.5: must be a whole number"),
        (
            {"interaction": "some"},
            "--interaction some: must be one of encoder-sharing, none, fixed, proxy, entropy, attention",
        ),
        ({"channels": 2}, "--channels 2: must be one of 1, 3"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "both together must be below 1"),
        ({"val_fraction": 0.0}, "validation needs cases"),
        ({"groups": "/nowhere/patients.csv"}, "--groups /nowhere/patients.csv: no such file"),
        ({"encoder_weights": "/nowhere/b4.bin"}, "--encoder-weights /nowhere/b4.bin: no such file"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        TrainConfig(**{"data": ".", **changes}).checked()
    assert "\n" not in str(caught.value)


def test_evaluate_and_predict_need_their_inputs() -> None:
    with pytest.raises(UserError, match="no model"):
        EvaluateConfig().checked()
    with pytest.raises(UserError, match="no images"):
        PredictConfig(model="m", out="o").checked()
    with pytest.raises(UserError, match="no output folder"):
        PredictConfig(model="m", images=("a",)).checked()
    with pytest.raises(UserError, match="--threshold 1.5: must lie between 0 and 1"):
        PredictConfig(model="m", images=("a",), out="o", threshold=1.5).checked()


def test_from_dict_names_the_unknown_setting() -> None:
    assert from_dict(TrainConfig, {"size": 64}, "run.yaml").size == 64
    with pytest.raises(UserError, match="run.yaml: unknown setting 'sise'"):
        from_dict(TrainConfig, {"sise": 64}, "run.yaml")


def test_resumed_config_takes_runtime_settings_only() -> None:
    stored = TrainConfig(data="d", size=64, threads=1)
    asked = TrainConfig(data="d", size=64, threads=2, device="cpu", out="run")
    merged = resumed_config(asked, stored, "run")
    assert merged == dataclasses.replace(stored, threads=2, device="cpu", out="run")
    assert resumed_config(TrainConfig(), stored, "run") == stored  # a setting left alone is not a wish
    with pytest.raises(UserError, match="run: was started with --size 64, not 96"):
        resumed_config(TrainConfig(size=96), stored, "run")
