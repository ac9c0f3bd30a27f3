"""Prediction: sizes, names, good and bad files together, and the failure score."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bti_fast.data import read_image
from bti_fast.engine import PredictConfig, inference, predict
from bti_fast.engine.inference import failure_score, predict_images
from bti_fast.engine.pictures import PREDICTED, TRUE, outline, overlay
from bti_fast.engine.predict import find_images, output_names
from bti_fast.engine.run_folder import load_model
from bti_fast.errors import UserError
from bti_fast.models import BTINet
from tests.engine.tiny import TinyEncoder


def picture(path: Path, height: int, width: int, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(height * width).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def run_predict(run: Path, out: Path, *images: Path, **more: object):
    config = PredictConfig(model=str(run), images=tuple(map(str, images)), out=str(out), threads=1, **more)
    console = Console(file=io.StringIO(), width=200)
    return predict(config, encoder=TinyEncoder(), console=console), console.file.getvalue()


def test_many_images_are_predicted_by_a_folded_network(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(inference.FOLD_FROM):
        picture(tmp_path / "in" / f"{number}.png", 20 + number % 3, 33)
    folded = []
    fold = BTINet.fold
    monkeypatch.setattr(BTINet, "fold", lambda model: folded.append(1) or fold(model))
    many, _ = run_predict(finished_run, tmp_path / "many", tmp_path / "in")
    assert len(folded) == 1
    monkeypatch.setattr(inference, "FOLD_FROM", 10**9)
    plain, _ = run_predict(finished_run, tmp_path / "plain", tmp_path / "in")
    assert len(folded) == 1 and len(plain.records) == len(many.records) > 30
    for one, other in zip(many.records, plain.records, strict=True):
        assert one["class_prob"] == pytest.approx(other["class_prob"], abs=1e-5)
        assert one["mask_entropy"] == pytest.approx(other["mask_entropy"], abs=1e-5)


def test_good_and_bad_files_together(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    picture(folder / "a" / "scan.png", 30, 50)
    picture(folder / "b" / "scan.png", 64, 33, "RGB")
    picture(folder / "b" / "scan.jpg", 20, 20)
    picture(folder / "b" / "scan_mask.png", 64, 33)  # a mask beside its image is no image
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    whole = (folder / "a" / "scan.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])

    result, said = run_predict(finished_run, tmp_path / "out", folder, tmp_path / "gone.png")
    assert len(result.records) == 3 and len(result.bad) == 4
    assert "3 images predicted" in said and "4 files could not be read" in said

    table = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {Path(row["image"]).name for row in table["unreadable"]} == {
        "broken.png",
        "empty.png",
        "cut.png",
        "gone.png",
    }
    assert all(row["error"] and "\n" not in row["error"] for row in table["unreadable"])
    sizes = {}
    for record in table["images"]:
        image = Image.open(record["image"])
        for kind in ("mask", "overlay"):
            assert Image.open(tmp_path / "out" / record[kind]).size == image.size
        mask = np.asarray(Image.open(tmp_path / "out" / record["mask"]))
        assert set(np.unique(mask)) <= {0, 255}
        assert record["lesion_fraction"] == pytest.approx((mask == 255).mean())
        assert sum(record["class_prob"].values()) == pytest.approx(1)
        assert len(record["gates"]) == len(record["signals"]) == 4
        assert all(0 < level[key] < 1 for level in record["gates"] for key in ("w_seg", "w_cls"))
        assert 0 <= record["failure_score"] <= 1
        sizes[record["mask"]] = image.size
    assert len(sizes) == 3 and sorted(sizes.values()) == [(20, 20), (33, 64), (50, 30)]

    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and sum(bool(row["error"]) for row in rows) == 4
    good = next(row for row in rows if not row["error"])
    assert {
        "class",
        "prob_benign",
        "w_seg_1",
        "w_cls_4",
        "complexity_2",
        "mask_entropy",
        "failure_score",
    } <= set(good)


def test_names_that_are_no_text(finished_run: Path, tmp_path: Path) -> None:
    """A file name is bytes, which need not be UTF-8: tables keep it, and neither table nor report is lost."""
    source = picture(tmp_path / "a.png", 40, 40)
    name = os.fsdecode(b"scan\xff.png")
    (tmp_path / "in").mkdir()
    try:
        source.rename(tmp_path / "in" / name)
    except OSError:
        pytest.skip("this disk takes names in UTF-8 only")
    result, _ = run_predict(finished_run, tmp_path / "out", tmp_path / "in")
    assert len(result.records) == 1 and (tmp_path / "out" / result.records[0]["mask"]).exists()
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"][0]["image"].endswith(
        name
    )
    assert b"scan\xff.png" in (tmp_path / "out" / "predictions.csv").read_bytes()


def test_attention_pictures(finished_run: Path, tmp_path: Path) -> None:
    model = BTINet(TinyEncoder(), interaction="attention", image_size=32)
    model.save(tmp_path / "model.safetensors")
    image = picture(tmp_path / "scan.png", 30, 50)
    result, _ = run_predict(tmp_path / "model.safetensors", tmp_path / "out", image, attention=True)
    (record,) = result.records
    pixels = np.asarray(Image.open(tmp_path / "out" / record["attention"]).convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and pixels.std() > 20  # four rows of eight pictures

    (found,) = predict_images(model, [("scan", read_image(image, 3))], attention=True)
    assert [level.shape for level in found.attention] == [(8, side, side) for side in (2, 4, 8, 16)]
    for level in found.attention:
        np.testing.assert_allclose(level.sum((1, 2)), 1, rtol=1e-5)
    (plain,) = predict_images(model, [("scan", read_image(image, 3))])
    assert not plain.attention

    with pytest.raises(UserError, match="--attention needs a network with attention.*'proxy'"):
        run_predict(finished_run, tmp_path / "none", image, attention=True)


def test_nothing_readable(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of 1 files could be predicted"):
        run_predict(finished_run, tmp_path / "out", tmp_path / "bad.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: no image in it"):
        run_predict(finished_run, tmp_path / "out2", tmp_path / "none")
    assert not (tmp_path / "out2").exists()


def test_results_are_not_overwritten(finished_run: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "scan.png", 40, 40)
    run_predict(finished_run, tmp_path / "out", image)
    with pytest.raises(UserError, match="already holds predictions.json"):
        run_predict(finished_run, tmp_path / "out", image)
    run_predict(finished_run, tmp_path / "out", image, overwrite=True)


def test_interrupted_prediction_keeps_its_table(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(tmp_path / f"{i}.png", 40, 40) for i in range(3)]
    module = sys.modules["bti_fast.engine.predict"]
    write, done = module._write, []

    def stop(*arguments: object):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(module, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        run_predict(finished_run, tmp_path / "out", *images)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 2


def test_prediction_does_not_depend_on_the_batch(finished_run: Path, tmp_path: Path) -> None:
    model = load_model(finished_run / "model.safetensors", TinyEncoder())
    files = [picture(tmp_path / f"{i}.png", 30 + i, 40) for i in range(3)]
    images = [(str(i), read_image(path, 3)) for i, path in enumerate(files)]
    together = list(predict_images(model, images, batch_size=3))
    alone = [found for pair in images for found in predict_images(model, [pair], batch_size=1)]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.mask_prob, b.mask_prob, atol=1e-5)
        np.testing.assert_allclose(a.class_prob, b.class_prob, atol=1e-5)
        np.testing.assert_allclose(a.gates, b.gates, atol=1e-5)


def test_failure_score_by_hand() -> None:
    sure = np.array([[1.0, 0.0], [0.0, 0.0]])
    assert failure_score(sure, [0.0, 1.0]) == 0.0  # soft Dice 2·1 / (1 + 1) = 1
    half = np.array([[0.8, 0.4], [0.0, 0.0]])
    assert failure_score(half, [0.5, 0.5]) == pytest.approx(1 - 2 * 0.8 / (1.2 + 1) * 0.5)
    empty = np.array([[0.3, 0.1], [0.0, 0.0]])
    assert failure_score(empty, [0.9, 0.1]) == pytest.approx(1 - 0.7 * 0.9)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/d/a.png", "/d/b.png"], ["a", "b"]),
        (["/d/x/a.png", "/d/y/a.png"], ["x/a", "y/a"]),
        (["/d/a.png", "/d/a.jpg"], ["a_png", "a_jpg"]),
        (["/d/a.png", "/d/A.png"], ["00001_a", "00002_A"]),
        (["/d/only.png"], ["only"]),
    ],
)
def test_output_names_never_meet(files: list[str], names: list[str]) -> None:
    assert output_names([Path(name) for name in files]) == names


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.TIF", "sub/c_mask.png", "sub/lone_mask.png", "notes.txt"):
        picture(tmp_path / "x.png", 4, 4)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "x.png", tmp_path / name)
    (tmp_path / "x.png").unlink()

    def names(*paths: str) -> list[str]:
        files, bad = find_images([str(tmp_path / path) for path in paths])
        assert not bad
        return [path.relative_to(tmp_path).as_posix() for path in files]

    for hidden in ("._b.png", "sub/.cache/b.png", "results/masks/b.png", "results/overlays/sub/b.png"):
        picture(tmp_path / hidden, 4, 4)
    (tmp_path / "results" / "predictions.json").write_text("{}")  # of an earlier prediction
    assert names("") == ["a.jpg", "b.png", "sub/c.TIF", "sub/lone_mask.png"]
    assert names("results/masks") == ["results/masks/b.png"]
    (tmp_path / "sub" / "gone.png").symlink_to("nowhere.png")  # not passed over: predict lists it as bad
    assert names("sub") == ["sub/c.TIF", "sub/gone.png", "sub/lone_mask.png"]
    (tmp_path / "sub" / "gone.png").unlink()
    assert names("*.png") == ["b.png"]
    assert names("b.png", "b.png", "") == ["b.png", "a.jpg", "sub/c.TIF", "sub/lone_mask.png"]
    assert names("notes.txt") == ["notes.txt"]  # named outright: tried, and reported if it is no image
    assert find_images([str(tmp_path / "*.bmp")]) == (
        [],
        [(str(tmp_path / "*.bmp"), "no such file, folder or pattern")],
    )


def test_overlay_colours() -> None:
    image = np.full((1, 9, 9), 0.5, np.float32)
    predicted, true = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    predicted[1:6, 1:6], true[3:8, 3:8] = True, True
    drawn = overlay(image, predicted, true)
    assert tuple(drawn[1, 1]) == PREDICTED and tuple(drawn[7, 7]) == TRUE
    assert tuple(drawn[0, 0]) == (128, 128, 128)
    assert tuple(drawn[2, 2]) == tuple(round(0.8 * 127.5 + 0.2 * c) for c in PREDICTED)
    assert outline(predicted, 1).sum() == 16
