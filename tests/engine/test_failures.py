"""Calibration and failure signals on a real run: what is stored, used by predict, and refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bti_fast.data import read_dataset, read_image
from bti_fast.engine import CalibrateConfig, FailuresConfig, PredictConfig, calibrate, failures, predict
from bti_fast.engine.inference import active_dropout, network_input, predict_images, sample_images
from bti_fast.engine.loaders import read_split
from bti_fast.engine.run_folder import load_model
from bti_fast.engine.sampling import sampled_signals
from bti_fast.errors import UserError
from bti_fast.metrics import fit_temperature
from tests.engine.tiny import TinyEncoder, tiny_train


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def run_failures(run: Path, **more: object):
    screen = console()
    config = FailuresConfig(model=str(run), threads=1, **{"passes": 3, "overwrite": True, **more})
    return failures(config, encoder=TinyEncoder(), console=screen), screen.file.getvalue()


def run_predict(run: Path, out: Path, cases) -> list[dict]:
    images = tuple(str(case.image) for case in cases)
    config = PredictConfig(model=str(run), images=images, out=str(out), threads=1)
    predict(config, encoder=TinyEncoder(), console=console())
    return json.loads((out / "predictions.json").read_text())["images"]


def test_temperatures_are_fitted_stored_and_used(run: Path, phantoms: Path) -> None:
    before = load_model(run / "model.safetensors", TinyEncoder())
    cases = read_split(run, read_dataset(phantoms))["val"]
    images = [(case.id, read_image(case.image, 3)) for case in cases]
    plain = list(predict_images(before, images))
    found = calibrate(CalibrateConfig(model=str(run), threads=1), encoder=TinyEncoder(), console=console())

    logits = np.log([one.class_prob for one in plain])
    labels = np.array([before.classes.index(case.label) for case in cases])
    assert found.temperature["class"] == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
    after = load_model(run / "model.safetensors", TinyEncoder())
    assert after.metadata == {**before.metadata, "temperature": found.temperature}
    tensors = before.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in after.state_dict().items())
    for old, new in zip(plain, predict_images(after, images), strict=True):
        scaled = torch.log(torch.tensor(old.class_prob)) / found.temperature["class"]
        assert new.class_prob == pytest.approx(scaled.softmax(0).tolist(), abs=1e-5)
        assert new.class_prob.index(max(new.class_prob)) == old.class_prob.index(max(old.class_prob))
        assert new.gates == old.gates and new.mask_prob.max() != old.mask_prob.max()
    for heads in found.found.values():
        assert set(heads) == {"class", "mask"}
    for head in found.found["val"].values():
        assert head["after"]["nll"] <= head["before"]["nll"] + 1e-9
    stored = json.loads((run / "calibration" / "calibration.json").read_text())
    assert stored["temperature"] == found.temperature and set(stored["splits"]) == {"val", "test"}
    assert len(list((run / "calibration" / "figures").glob("*.png"))) == 8
    with pytest.raises(UserError, match="already holds calibration.json"):
        calibrate(CalibrateConfig(model=str(run), threads=1), encoder=TinyEncoder(), console=console())


def test_every_signal_is_compared_and_the_threshold_is_used(
    run: Path, finished_run: Path, phantoms: Path, tmp_path: Path
) -> None:
    found, said = run_failures(run, ensemble=(str(finished_run),), target_rate=0.34)
    single = {"w_seg", "w_cls", "alignment", "complexity", "confidence", "mask_entropy", "class_entropy"}
    sampled = {"mask_entropy", "class_entropy", "class_information", "mask_disagreement", "failure_score"}
    assert set(found.signals) == single | {"max_softmax", "failure_score"} | {
        f"{prefix}_{name}" for prefix in ("mc_dropout", "ensemble") for name in sampled
    }
    assert {name: signal["passes"] for name, signal in found.signals.items()} == {
        name: 3 if name.startswith("mc_") else 2 if name.startswith("ensemble_") else 1
        for name in found.signals
    }
    one, many = (found.signals[name]["milliseconds"] for name in ("w_seg", "mc_dropout_class_entropy"))
    assert 0 < one < many
    with open(run / "failures" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # The second network of the ensemble is the first: its signals are those of one pass.
    for row in rows:
        assert float(row["ensemble_class_entropy"]) == pytest.approx(float(row["class_entropy"]), abs=1e-5)
        assert float(row["ensemble_class_information"]) == pytest.approx(0, abs=1e-9)
        assert float(row["ensemble_failure_score"]) == pytest.approx(float(row["failure_score"]), abs=1e-6)
        assert float(row["max_softmax"]) < 2 / 3 + 1e-9
    assert (run / "failures" / "figures" / "risk_coverage.png").stat().st_size > 5000
    assert "95 % interval" in (run / "failures" / "report.html").read_text() and "AUROC" in said

    stored = load_model(run / "model.safetensors", TinyEncoder()).metadata["referral"]
    assert stored == found.referral and stored["signal"] == "failure_score"
    splits = read_split(run, read_dataset(phantoms))
    records = run_predict(run, tmp_path / "p", splits["test"])
    scores = [record["failure_score"] for record in records]
    threshold = stored["threshold"]
    expected = [threshold is None or score > threshold for score in scores]
    assert [record["refer"] for record in records] == expected
    assert "refer" not in run_predict(finished_run, tmp_path / "q", splits["test"])[0]


def test_a_threshold_does_not_outlive_the_confidences_it_was_chosen_for(run: Path) -> None:
    run_failures(run, passes=0, target_rate=0.9)
    screen = console()
    calibrate(CalibrateConfig(model=str(run), threads=1), encoder=TinyEncoder(), console=screen)
    assert "run failures again" in screen.file.getvalue()
    assert "referral" not in load_model(run / "model.safetensors", TinyEncoder()).metadata


def test_dropout_is_on_for_its_passes_alone(finished_run: Path) -> None:
    model = load_model(finished_run / "model.safetensors", TinyEncoder())
    image = [("a", np.random.default_rng(0).random((3, 40, 40), dtype=np.float32))]
    plain = [next(predict_images(model, image)).class_prob for _ in range(2)]
    torch.manual_seed(0)
    dropped = [one.class_prob for one in next(sample_images(model, image, 2))]
    assert plain[0] == plain[1] and plain[0] not in dropped and dropped[0] != dropped[1]
    assert next(predict_images(model, image)).class_prob == plain[0]
    with active_dropout(model):
        on = {name for name, module in model.named_modules() if module.training}
    assert on and all(isinstance(model.get_submodule(name), torch.nn.Dropout) for name in on)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dropping_encoder", [False, True])
def test_passes_share_the_encoder_unless_it_drops_too(finished_run: Path, dropping_encoder: bool) -> None:
    model = load_model(finished_run / "model.safetensors", TinyEncoder())
    if dropping_encoder:
        model.encoder.steps[1].append(torch.nn.Dropout(0.5))
    encoded = []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    images = [(str(n), np.random.default_rng(n).random((3, 40, 40), dtype=np.float32)) for n in range(3)]
    torch.manual_seed(0)
    drawn = list(sample_images(model, images, 4, batch_size=3))
    assert len(encoded) == (4 if dropping_encoder else 1)
    assert [[one.id for one in passes] for passes in drawn] == [[name] * 4 for name, _ in images]
    torch.manual_seed(0)
    with active_dropout(model), torch.inference_mode():
        inputs = network_input(model, [image for _, image in images])
        whole = [model(inputs).cls_logits.double().softmax(1).tolist() for _ in range(4)]
    for number, passes in enumerate(drawn):
        assert [one.class_prob for one in passes] == [each[number] for each in whole]


def test_sampled_signals_by_hand() -> None:
    masks = [np.array([[0.9, 0.1]]), np.array([[0.7, 0.7]])]
    found = sampled_signals("x", masks, [[1.0, 0.0], [0.0, 1.0]])
    entropy = lambda p: -(p * np.log2(p) + (1 - p) * np.log2(1 - p))  # noqa: E731
    assert found["x_mask_entropy"] == pytest.approx((entropy(0.8) + entropy(0.4)) / 2)
    assert found["x_class_entropy"] == pytest.approx(1) and found["x_class_information"] == pytest.approx(1)
    # Masks {0} and {0, 1} against the mean's {0}: Dice 1 and 2/3.
    assert found["x_mask_disagreement"] == pytest.approx(1 - (1 + 2 / 3) / 2)
    # Soft Dice of the mean with its own mask 2 · 0.8 / (1.2 + 1), times the class probability 0.5.
    assert found["x_failure_score"] == pytest.approx(1 - 0.5 * 1.6 / 2.2)


def test_what_does_not_fit_is_named(run: Path, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--signal doubt: this network has alignment, "):
        run_failures(run, signal="doubt", passes=0)
    index = read_dataset(phantoms)
    lines = [f"{case.image},{'b' if case.label == 'normal' else 'a'}" for case in index.cases]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "manifest.csv").write_text("\n".join(["image,class", *lines]) + "\n")
    tiny_train(tmp_path / "two", tmp_path / "other", epochs=1, gate_epochs=0)
    with pytest.raises(UserError, match="knows the classes a, b; an ensemble needs those of"):
        run_failures(run, ensemble=(str(tmp_path / "other"),))
    found, _ = run_failures(tmp_path / "other", passes=0)  # no masks: judged by the class alone
    tested = read_split(tmp_path / "other", read_dataset(tmp_path / "two"))["test"]
    assert found.signals["class_entropy"]["count"] == len(tested) > 0


def test_weights_that_cannot_be_written_are_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.NamedTemporaryFile

    def refused_in_the_run(*, dir: Path, **more: object):  # root may write everywhere
        if Path(dir) == run:
            raise PermissionError(13, "Permission denied")
        return make(dir=dir, **more)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused_in_the_run)
    for config, command in ((CalibrateConfig, calibrate), (FailuresConfig, failures)):
        with pytest.raises(UserError, match=r"run: output folder cannot be written \(Permission denied\)"):
            command(config(model=str(run), out=str(tmp_path / "out"), data="not looked at"))
