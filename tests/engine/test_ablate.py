"""The ablation: same cases for every cell, the table from the cells' own files, and going on after a stop."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bti_fast.engine import AblateConfig, ablate
from bti_fast.engine.run_folder import read_config
from bti_fast.errors import UserError
from bti_fast.metrics import paired_interval
from tests.engine.tiny import TinyEncoder

ROWS = ("none", "fixed", "proxy")


def run_ablate(data: Path, out: Path, encoder=TinyEncoder, **changes: object):
    defaults = {"rows": ROWS, "seeds": 2, "epochs": 1, "gate_epochs": 1, "size": 32, "batch_size": 4}
    config = AblateConfig(data=str(data), out=str(out), threads=1, device="cpu", **{**defaults, **changes})
    screen = Console(file=io.StringIO(), width=250)
    return ablate(config, encoder=encoder, console=screen), screen.file.getvalue()


def cases(cell: Path) -> dict[str, dict[str, str]]:
    with open(cell / "evaluate-test" / "cases.csv", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_stopped_and_gone_on_and_the_table_from_the_files(phantoms: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "ablation", []

    def stops_in_the_fourth() -> TinyEncoder:
        made.append(None)  # two encoders a cell: one trains, one is evaluated
        return TinyEncoder(*((1, KeyboardInterrupt()) if len(made) == 7 else ()))

    with pytest.raises(UserError, match="no such file or folder"):
        run_ablate(tmp_path / "mistaken", out)  # leaves no setting behind
    with pytest.raises(KeyboardInterrupt):
        run_ablate(phantoms, out, stops_in_the_fourth)
    done = {cell: cell.stat().st_mtime_ns for cell in out.glob("*-seed0/model.safetensors")}
    assert len(done) == 3 and not (out / "ablation.json").exists()
    found, said = run_ablate(phantoms, out)
    assert all(os.stat(cell).st_mtime_ns == before for cell, before in done.items())
    assert "cell 6 of 6: interaction proxy, seed 1" in said and "proxy over fixed: IoU " in said

    cells = {(row, seed): out / f"{row}-seed{seed}" for row in ROWS for seed in (0, 1)}
    configs = {key: read_config(cell) for key, cell in cells.items()}
    assert all((config.interaction, config.seed) == key for key, config in configs.items())
    assert len({(cell / "split.csv").read_text() for cell in cells.values()}) == 1
    rows = {key: cases(cell) for key, cell in cells.items()}
    for row in ROWS:
        for seed in (0, 1):
            iou = np.mean([float(case["iou"]) for case in rows[row, seed].values()])
            right = np.mean([case["class"] == case["predicted"] for case in rows[row, seed].values()])
            assert found.values[row]["IoU"][seed] == pytest.approx(iou)
            assert found.values[row]["Accuracy"][seed] == pytest.approx(right)
    gain = found.differences["proxy"]["fixed"]["IoU"]
    names = list(rows["proxy", 0])
    pairs = np.array(
        [
            [float(rows["proxy", s][n]["iou"]) - float(rows["fixed", s][n]["iou"]) for n in names]
            for s in (0, 1)
        ]
    )
    assert gain["mean"] == pytest.approx(pairs.mean()) and gain["cases"] == len(names) == 3
    assert gain["interval"] == pytest.approx(list(paired_interval(pairs)))
    assert set(found.differences["fixed"]) == {"none"} and set(found.differences["none"]) == {"fixed"}
    assert json.loads((out / "ablation.json").read_text())["values"] == found.values
    text = (out / "ablation.md").read_text().splitlines()
    assert len(text) == 5 and text[0].startswith("| Interaction | IoU | Dice |")
    assert (out / "figures" / "ablation.png").stat().st_size > 5000
    assert "2.36 IoU" in (out / "report.html").read_text()

    with pytest.raises(UserError, match="holds an ablation with --epochs 1, not 2"):
        run_ablate(phantoms, out, epochs=2)
    with pytest.raises(UserError, match="is the folder of one run"):
        run_ablate(phantoms, out / "none-seed0")
    fewer, _ = run_ablate(phantoms, out, rows=("proxy",), seeds=1)
    assert fewer.values == {"proxy": {k: v[:1] for k, v in found.values["proxy"].items()}}
    assert fewer.differences == {}
