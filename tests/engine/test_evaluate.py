"""Evaluation: the right cases, at their own size, with the numbers recomputed here from the files."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bti_fast.data import read_dataset, read_image
from bti_fast.engine import EvaluateConfig, evaluate
from bti_fast.engine.inference import predict_images
from bti_fast.engine.loaders import read_split
from bti_fast.engine.run_folder import load_model
from bti_fast.errors import UserError
from tests.engine.tiny import TinyEncoder


def run_evaluate(run: Path, out: Path | None, **more: object):
    console = Console(file=io.StringIO(), width=200)
    config = EvaluateConfig(model=str(run), out=None if out is None else str(out), threads=1, **more)
    return evaluate(config, encoder=TinyEncoder(), console=console), console.file.getvalue()


@pytest.fixture(scope="module")
def evaluated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory):
    return run_evaluate(finished_run, tmp_path_factory.mktemp("evaluation") / "val", split="val", worst=2)


def test_numbers_against_the_files(evaluated, finished_run: Path, phantoms: Path) -> None:
    result, _ = evaluated
    cases = read_split(finished_run, read_dataset(phantoms))["val"]
    model = load_model(finished_run / "model.safetensors", TinyEncoder())
    images = [(case.id, read_image(case.image, 3)) for case in cases]
    dice, right = [], []
    for case, found in zip(cases, predict_images(model, images), strict=True):
        truth = np.zeros((40, 40), bool)
        for path in case.masks:
            truth |= np.asarray(Image.open(path).convert("L")) > 127
        mask = found.mask_prob > 0.5
        total = mask.sum() + truth.sum()
        dice.append(2 * (mask & truth).sum() / total if total else 1.0)
        right.append(model.classes[int(np.argmax(found.class_prob))] == case.label)
    assert result.summary["cases"] == len(cases) == 3
    assert result.summary["mask"]["dice"]["value"] == pytest.approx(np.mean(dice))
    assert result.summary["class"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert stored["summary"] == result.summary and stored["split"] == "val"
    with open(result.folder / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [case.id for case in cases]
    assert [float(row["dice"]) for row in rows] == pytest.approx(dice)


def test_every_signal_is_judged(evaluated) -> None:
    result, said = evaluated
    names = {"w_seg", "w_cls", "alignment", "complexity", "confidence", "mask_entropy", "class_entropy"}
    assert set(result.summary["failure"]["signals"]) == names | {"failure_score"}
    assert set(result.baselines) == {"majority class", "mean mask"}
    assert result.baselines["majority class"]["class"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert "majority class" in said and "HD95" in said


def test_pictures_and_page(evaluated) -> None:
    folder = evaluated[0].folder
    for name in ("roc", "reliability", "risk_coverage"):
        assert min(Image.open(folder / "figures" / f"{name}.png").size) > 300
    assert len(list((folder / "worst").glob("*.png"))) == 2
    self_contained(folder / "report.html", svgs=3, pictures=2)


def test_training_report(finished_run: Path) -> None:
    self_contained(finished_run / "report.html", svgs=4, pictures=3)


def self_contained(page: Path, svgs: int, pictures: int) -> None:
    """One file that needs no other, drawn in the page's own colours, with identifiers that do not meet."""
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == svgs and html.count('<img src="data:image/png;base64,') == pictures
    sources = re.findall(r'(?:src|xlink:href|href)="([^"]*)"', html)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "prefers-color-scheme: dark" in html and "currentColor" in html
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    clips = [set(re.findall(r'<clipPath id="([^"]*)"', drawing)) for drawing in drawings]
    assert sum(map(len, clips)) == len(set().union(*clips)) > 0


def test_results_are_not_overwritten(finished_run: Path, evaluated) -> None:
    with pytest.raises(UserError, match="already holds metrics.json"):
        run_evaluate(finished_run, evaluated[0].folder, split="val")


def test_a_bare_checkpoint_needs_to_be_told_more(finished_run: Path, phantoms: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model.safetensors"
    bare.write_bytes((finished_run / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="say where the results go with --out"):
        run_evaluate(bare, None)
    with pytest.raises(UserError, match="name the images with --data"):
        run_evaluate(bare, tmp_path / "out")
    with pytest.raises(UserError, match="no test cases .* give --split all"):
        run_evaluate(bare, tmp_path / "out", data=str(phantoms))
    result, _ = run_evaluate(bare, tmp_path / "out", data=str(phantoms), split="all", worst=0)
    assert result.summary["cases"] == 18 and result.baselines == {}


def test_unknown_class(finished_run: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "manifest.csv").write_text("image,mask,class\na.png,,cyst\n")
    with pytest.raises(UserError, match="class 'cyst' is unknown to .* which has benign, malignant, normal"):
        run_evaluate(finished_run, tmp_path / "out", data=str(tmp_path), split="all")


def test_unwritable_output_is_named_before_any_work(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: output folder cannot be written"):
        run_evaluate(finished_run, tmp_path / "file", data=str(tmp_path / "gone"))
