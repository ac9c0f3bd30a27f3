"""The paper's ablation: every interaction on the same splits, budget and seeds, each cell a normal run."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from bti_fast import metrics
from bti_fast.engine import figures, report, run_folder
from bti_fast.engine.config import AblateConfig, TrainConfig
from bti_fast.engine.evaluate import CASES, evaluate
from bti_fast.engine.evaluate import RESULT as EVALUATED
from bti_fast.engine.files import output_folder, write_csv, write_json, write_text
from bti_fast.engine.options import flag
from bti_fast.engine.run_config import EvaluateConfig
from bti_fast.engine.train import train
from bti_fast.errors import UserError

SETTINGS, RESULT, TABLE = "ablation.yaml", "ablation.json", "ablation.csv"
REFERENCES = ("fixed", "none")
# Metric in the summary, its title, and how a case scores in the paired comparison (None: not by case).
METRICS: dict[tuple[str, str], tuple[str, str | None]] = {
    ("mask", "iou"): ("IoU", "iou"),
    ("mask", "dice"): ("Dice", "dice"),
    ("class", "accuracy"): ("Accuracy", "right"),
    ("class", "macro_f1"): ("Macro F1", None),
    ("class", "macro_auc"): ("Macro AUC", None),
}
CLAIMS = (
    "The paper's claims: adaptive over fixed gating +2.36 IoU (points), classification up to +2.26 points."
)


@dataclass(frozen=True)
class Ablation:
    """Where the results lie; per row and metric its value for each seed; per row, reference and metric the
    mean paired difference with its 95 % interval."""

    folder: Path
    values: dict[str, dict[str, list[float | None]]]
    differences: dict[str, dict[str, dict[str, Any]]]


def ablate(
    config: AblateConfig,
    *,
    encoder: Callable[[], torch.nn.Module] | None = None,
    console: Console | None = None,
) -> Ablation:
    """Trains and evaluates config.rows x config.seeds and writes ablation.json, ablation.csv, ablation.md,
    figures/ablation.png and report.html to config.out; each cell is the run folder OUT/ROW-seedN.

    Called again it goes on where it was stopped; processes that name different rows may work on one
    config.out at a time, and a last call with all rows makes the table. All cells share data, split and
    budget; seed n of one row is paired with seed n of another. encoder makes an encoder of five feature maps
    for each cell. UserError for bad input, and where the folder holds an ablation of other settings.
    """
    console = console or Console(stderr=True)
    config = config.checked()
    if (Path(config.out) / run_folder.CONFIG).exists():
        raise UserError(f"{config.out}: is the folder of one run; an ablation needs an --out of its own")
    folder = output_folder(config.out)
    _keep_settings(folder, config)
    cells = [(row, seed) for seed in range(config.seed, config.seed + config.seeds) for row in config.rows]
    for number, (row, seed) in enumerate(cells, start=1):
        text = f"cell {number} of {len(cells)}: interaction {row}, seed {seed}"
        console.print(text, markup=False, highlight=False)
        _run_cell(_cell_folder(folder, row, seed), config, row, seed, encoder, console)

    seeds = range(config.seed, config.seed + config.seeds)
    found = {row: [_read_cell(_cell_folder(folder, row, seed)) for seed in seeds] for row in config.rows}
    values = {
        row: {title: [cell[title] for cell in cells] for title, _ in METRICS.values()}
        for row, cells in found.items()
    }
    differences = _differences(found)
    _write(folder, config, values, differences)
    console.print(_table(values))
    for line in _sentences(differences):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {folder / run_folder.REPORT}", markup=False, highlight=False, soft_wrap=True)
    return Ablation(folder, values, differences)


def _cell_folder(folder: Path, row: str, seed: int) -> Path:
    return folder / f"{row}-seed{seed}"


def _keep_settings(folder: Path, config: AblateConfig) -> None:
    """Writes the settings of a new ablation; UserError where those of an old one differ.

    Settings with which no cell was begun (a mistake in one of them) are replaced. More rows or seeds may be
    asked for later, and the machine may differ.
    """
    # More processes make larger joint batches, so they are no matter of the machine alone.
    free = {*TrainConfig.RUNTIME, "rows", "seeds"} - {"devices", "num_nodes"}
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    asked["data"] = str(Path(config.data).resolve())
    path = folder / SETTINGS
    if not path.exists() or not any(folder.glob(f"*-seed*/{run_folder.CONFIG}")):
        write_text(path, yaml.safe_dump(asked, sort_keys=False))
        return
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise UserError(f"{path}: cannot be read ({cause})") from cause
    for name, value in asked.items():
        # An older ablation says nothing of settings that came later.
        old = stored.get(name, getattr(AblateConfig(), name)) if isinstance(stored, dict) else "nothing"
        if old != value:
            raise UserError(
                f"{folder}: holds an ablation with {flag(name)} {old}, not {value}; choose another --out"
            )


def _run_cell(
    out: Path,
    config: AblateConfig,
    row: str,
    seed: int,
    encoder: Callable[[], torch.nn.Module] | None,
    console: Console,
) -> None:
    """Trains and evaluates one cell, from wherever it was left."""
    if (out / "evaluate-test" / EVALUATED).exists():
        return
    plain = {item.name: getattr(config, item.name) for item in dataclasses.fields(TrainConfig)}
    cell = TrainConfig(**{**plain, "interaction": row, "seed": seed, "out": str(out)})
    resume = (out / run_folder.CONFIG).exists()
    train(cell, resume=resume, encoder=encoder() if encoder else None, console=console)
    judged = EvaluateConfig(
        model=str(out),
        worst=0,
        batch_size=config.batch_size,
        device=config.device,
        threads=config.threads,
        overwrite=True,
    )
    evaluate(judged, encoder=encoder() if encoder else None, console=console)


def _read_cell(out: Path) -> dict[str, Any]:
    """Metrics by title, and "cases": each case's scores by its id, None where it has no truth."""
    summary = json.loads((out / "evaluate-test" / EVALUATED).read_text())["summary"]
    with open(out / "evaluate-test" / CASES, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cases = {
        row["id"]: {
            "iou": float(row["iou"]) if row["iou"] else None,
            "dice": float(row["dice"]) if row["dice"] else None,
            "right": float(row["class"] == row["predicted"]) if row["class"] else None,
        }
        for row in rows
    }
    named = {title: summary[group][name]["value"] for (group, name), (title, _) in METRICS.items()}
    return {**named, "cases": cases}


def _differences(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Row -> "vs reference" -> metric title -> mean difference, interval, and over how many cases."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for row, cells in found.items():
        for reference in REFERENCES:
            if reference not in found or reference == row:
                continue
            compared = {}
            for title, score in METRICS.values():
                pairs = _paired(cells, found[reference], score) if score else np.zeros((0, 0))
                if pairs.size:
                    low, high = metrics.paired_interval(pairs)
                    compared[title] = {
                        "mean": float(pairs.mean()),
                        "interval": [low, high],
                        "cases": pairs.shape[1],
                    }
            result.setdefault(row, {})[reference] = compared
    return result


def _paired(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], score: str) -> np.ndarray:
    """Differences (seeds, cases) over the cases that have the score in every cell."""
    names = [
        name
        for name in ours[0]["cases"]
        if all(cell["cases"].get(name, {}).get(score) is not None for cell in (*ours, *theirs))
    ]
    return np.array(
        [
            [a["cases"][name][score] - b["cases"][name][score] for name in names]
            for a, b in zip(ours, theirs, strict=True)
        ]
    )


def _spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    return f"{np.mean(known):.3f}" + (f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else "")


def _cells(
    values: Mapping[str, Mapping[str, Sequence[float | None]]],
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table."""
    compared = [(reference, title) for reference in REFERENCES for title in ("IoU", "Accuracy")]
    shown = [key for key in compared if any(key[0] in d for d in differences.values())]
    columns = ["Interaction", *(title for title, _ in METRICS.values())]
    columns += [f"{title} over {reference}" for reference, title in shown]
    rows = []
    for row, by_metric in values.items():
        cells = [row, *(_spread(seeds) for seeds in by_metric.values())]
        for reference, title in shown:
            found = differences.get(row, {}).get(reference, {}).get(title)
            cells.append(
                ""
                if found is None
                else "{:+.3f} [{:+.3f}, {:+.3f}]".format(found["mean"], *found["interval"])
            )
        rows.append(cells)
    return columns, rows


def _table(values: Mapping[str, Any]) -> Table:
    columns, rows = _cells(values, {})
    table = Table(title="Ablation: mean ± spread over seeds")
    for column in columns:
        first = column == columns[0]
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        table.add_row(*row)
    return table


def _sentences(differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A line for each row and reference: paired differences with their 95 % intervals."""
    lines = []
    for row, by_reference in differences.items():
        for reference, found in by_reference.items():
            parts = [
                "{} {:+.3f} [{:+.3f}, {:+.3f}]".format(title, found[title]["mean"], *found[title]["interval"])
                for title in ("IoU", "Accuracy")
                if title in found
            ]
            if parts:
                lines.append(f"{row} over {reference}: {', '.join(parts)}")
    return lines


def _write(
    folder: Path, config: AblateConfig, values: Mapping[str, Any], differences: Mapping[str, Any]
) -> None:
    columns, rows = _cells(values, differences)
    write_json(
        folder / RESULT,
        {
            "rows": list(config.rows),
            "seeds": list(range(config.seed, config.seed + config.seeds)),
            "values": values,
            "differences": differences,
        },
    )
    write_csv(folder / TABLE, [dict(zip(columns, row, strict=True)) for row in rows], columns)
    lines = [columns, ["---"] * len(columns), *rows]
    write_text(folder / "ablation.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    drawing = figures.seeds_by_row(
        {title: {r: v[title] for r, v in values.items()} for title in ("IoU", "Accuracy")}
    )
    (folder / "figures").mkdir(exist_ok=True)
    figures.write_png(drawing, folder / "figures" / "ablation.png")
    note = (
        f"Mean ± standard deviation over {config.seeds} seeds on the same test cases. Differences are paired "
        "by case and seed; their intervals resample cases and seeds, one that holds 0 shows none. "
        f"{CLAIMS}"
    )
    sections = {
        "Table": report.table(columns, rows) + report.note(note),
        "Each seed": report.figures([figures.svg(drawing)]),
        "Cells": report.note(", ".join(sorted(p.parent.name for p in folder.glob(f"*/{run_folder.CONFIG}")))),
    }
    subtitle = (
        f"{config.encoder}, {config.size} px, at most {config.epochs} + {config.gate_epochs} epochs, "
        f"data {Path(config.data).name}"
    )
    report.write_page(folder / run_folder.REPORT, f"Ablation {folder.name}", subtitle, sections)
