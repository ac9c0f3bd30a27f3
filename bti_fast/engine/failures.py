"""Do gates and proxies foretell failures? Every signal of one pass against MC-dropout and an ensemble."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bti_fast import metrics
from bti_fast.data import read_image
from bti_fast.engine import figures, report, run_folder
from bti_fast.engine.files import write_csv, write_json
from bti_fast.engine.inference import FAILURE_SCORE, MAX_SOFTMAX, REFERRAL, class_names
from bti_fast.engine.run_config import FailuresConfig
from bti_fast.engine.sampling import SAMPLED, add_sampled_signals, seconds_an_image
from bti_fast.engine.subject import Subject, open_subject
from bti_fast.errors import UserError

RESULT = "failures.json"
CASES = "cases.csv"
SINGLE = (*metrics.SIGNALS, MAX_SOFTMAX, FAILURE_SCORE)
DROPOUT, ENSEMBLE = "mc_dropout", "ensemble"


@dataclass(frozen=True)
class Failures:
    """Where the results lie; per signal AUROC, AURC and cost; who is referred on validation and on test."""

    folder: Path
    signals: dict[str, dict[str, Any]]
    referral: dict[str, Any]


def failures(
    config: FailuresConfig, *, encoder: torch.nn.Module | None = None, console: Console | None = None
) -> Failures:
    """Judges every failure signal on the test cases and writes failures.json, cases.csv,
    figures/risk_coverage.png and report.html.

    A failure is one of the network's own single pass (IoU below 0.5 or a wrong class), whatever the signal.
    On the validation cases a threshold on config.signal is chosen that keeps most cases with a failure rate
    of at most config.target_rate; it goes into the checkpoint, and predict marks the cases above it.
    UserError for bad input, such as an ensemble of other classes or a signal that the network does not have.
    """
    console = console or Console(stderr=True)
    subject, folder = open_subject(config, "failures", RESULT, encoder, console, stores=True)
    members = _members(config, subject, encoder)
    val, test = subject.cases("val"), subject.cases("test")
    val_rows, rows = (subject.rows(cases, config.batch_size) for cases in (val, test))
    chosen = _refer(config, val_rows, rows)
    torch.manual_seed(config.seed)
    cost = {}
    image = read_image(test[0].image, subject.model.config["in_channels"])
    batch = min(config.batch_size, len(test))
    for prefix, group in ((None, [(subject.model, 0)]), *members.items()):
        if prefix is not None:
            add_sampled_signals(prefix, group, test, rows, config.batch_size, subject.device)
        seconds = seconds_an_image(group, image, batch, subject.device)
        cost[prefix] = {"passes": sum(passes or 1 for _, passes in group), "milliseconds": 1000 * seconds}
    names = [name for name in SINGLE if any(name in row["failure_signals"] for row in rows)]
    signals = {name: {**_judge(rows, name), **cost[None]} for name in names}
    for prefix in members:
        for name in (f"{prefix}_{suffix}" for suffix in SAMPLED):
            signals[name] = {**_judge(rows, name), **cost[prefix]}

    rate = metrics.summarise(rows, subject.names)["failure"]["rate"]
    run_folder.save_weights(subject.weights, subject.model, {**subject.model.metadata, REFERRAL: chosen})
    write_csv(folder / CASES, [_flat(row) for row in rows])
    write_json(
        folder / RESULT,
        {
            "model": str(subject.weights),
            "ensemble": list(config.ensemble),
            "failure_rate": rate,
            "signals": signals,
            "referral": chosen,
        },
    )
    _report(folder, subject, rows, signals, rate, chosen)
    console.print(_table(signals, rate))
    for line in (_sentence(chosen), f"report: {folder / run_folder.REPORT}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return Failures(folder, signals, chosen)


def _members(
    config: FailuresConfig, subject: Subject, encoder: torch.nn.Module | None
) -> dict[str, list[tuple[Any, int]]]:
    """The networks of each sampled set, with their passes with dropout; UserError where one does not fit."""
    found: dict[str, list[tuple[Any, int]]] = {}
    if config.passes:
        found[DROPOUT] = [(subject.model, config.passes)]
    if config.ensemble:
        others = []
        for name in config.ensemble:
            weights, _ = run_folder.find_model(name)
            # A copy: loading fills the encoder that it is given.
            model = run_folder.load_model(weights, copy.deepcopy(encoder))
            if tuple(class_names(model)) != subject.names:
                raise UserError(
                    f"{name}: knows the classes {', '.join(class_names(model))}; an ensemble needs those of "
                    f"{config.model}: {', '.join(subject.names)}"
                )
            others.append((model.to(subject.device), 0))
        found[ENSEMBLE] = [(subject.model, 0), *others]
    return found


def _refer(
    config: FailuresConfig, val: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The threshold chosen on validation, and what it does on both splits."""
    known = sorted({name for row in val for name in row["failure_signals"]})
    if config.signal not in known:
        raise UserError(f"--signal {config.signal}: this network has {', '.join(known)}")
    values, failed, _ = metrics.signals_and_failures(val, config.signal)
    if not len(values):
        raise UserError("no validation case has a mask or a class to choose the threshold by")
    found = metrics.choose_threshold(values, failed, config.target_rate)
    values, failed, _ = metrics.signals_and_failures(test, config.signal)
    judged = metrics.judge_threshold(values, failed, found.threshold)
    splits = {
        "validation": {"cases": len(val), "kept": found.coverage, "failure_rate": found.failure_rate},
        "test": {"cases": len(test), "kept": judged.coverage, "failure_rate": judged.failure_rate},
    }
    return {
        "signal": config.signal,
        "threshold": found.threshold,
        "target_failure_rate": config.target_rate,
        **splits,
    }


def _judge(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    values, failed, left_out = metrics.signals_and_failures(rows, name)
    interval = metrics.auroc_interval(values, failed)
    return {
        "auroc": metrics.failure_auroc(values, failed),
        "auroc_interval": None if interval is None else list(interval),
        "aurc": metrics.failure_aurc(values, failed),
        "count": len(values),
        "left_out": left_out,
    }


def _sentence(chosen: dict[str, Any]) -> str:
    """Who is referred, in words."""
    target = f"{chosen['target_failure_rate']:.0%}"
    if chosen["threshold"] is None:
        return f"no threshold on {chosen['signal']} keeps failures at {target}: predict refers every case"
    parts = []
    for split in ("validation", "test"):
        rate = chosen[split]["failure_rate"]
        said = "no case" if rate is None else f"{rate:.1%} of the kept fail"
        parts.append(f"{split}: {chosen[split]['kept']:.0%} kept, {said}")
    return (
        f"predict refers cases with {chosen['signal']} above {chosen['threshold']:.4g} "
        f"(aim: {target} failures among the kept; {'; '.join(parts)})"
    )


COLUMNS = ("Signal", "AUROC", "95 % interval", "AURC", "Passes", "ms an image")


def _cells(signals: dict[str, dict[str, Any]]) -> list[list[str]]:
    cells = []
    for name, found in signals.items():
        interval = found["auroc_interval"]
        cells.append(
            [
                name.replace("_", " "),
                metrics.format_value(found["auroc"]),
                "n/a" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
                metrics.format_value(found["aurc"]),
                str(found["passes"]),
                f"{found['milliseconds']:.1f}",
            ]
        )
    return cells


def _table(signals: dict[str, dict[str, Any]], rate: dict[str, Any]) -> Table:
    table = Table(
        title=f"How well each signal foretells a failure ({metrics.format_value(rate['value'])} of "
        f"{rate['count']} test cases fail)"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "Signal" else "right")
    for row in _cells(signals):
        table.add_row(*row)
    return table


def _report(
    folder: Path,
    subject: Subject,
    rows: Sequence[dict[str, Any]],
    signals: dict[str, dict[str, Any]],
    rate: dict[str, Any],
    chosen: dict[str, Any],
) -> None:
    (folder / "figures").mkdir(exist_ok=True)
    shown = [name for name in signals if name in SINGLE or name.endswith(FAILURE_SCORE)]
    drawing = figures.risk_coverage({name: metrics.risk_coverage(rows, name) for name in shown})
    figures.write_png(drawing, folder / "figures" / "risk_coverage.png")
    value = metrics.format_value(rate["value"])
    note = (
        f"A failure is an IoU below 0.5 or a wrong class in the network's single pass: {value} of "
        f"{rate['count']} test cases. AUROC: higher is better, 0.5 is a coin; AURC: lower is better, {value} "
        "is a coin. Intervals resample the cases. Milliseconds are measured here, at the network's size."
    )
    sections = {
        "Signals": report.table(COLUMNS, _cells(signals)) + report.note(note),
        "Referring cases to a human": report.note(_sentence(chosen)),
        "Risk and coverage": report.figures([figures.svg(drawing)]),
    }
    title = f"Failure signals of {subject.weights.parent.name}"
    report.write_page(folder / run_folder.REPORT, title, f"test cases of {subject.index.root.name}", sections)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    failed = metrics.is_failure(row)
    return {
        "id": row["id"],
        "iou": row["iou"],
        "failed": None if failed is None else int(failed),
        **row["failure_signals"],
    }
