"""The commands: parsed options to settings, user errors to one line, nothing heavy imported before it is
needed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from bti_fast.cli_options import settings
from bti_fast.cli_parser import EXAMPLES, PROGRAM, build_parser
from bti_fast.engine.config import AblateConfig, TrainConfig
from bti_fast.engine.run_config import CalibrateConfig, EvaluateConfig, FailuresConfig, PredictConfig
from bti_fast.errors import UserError

__all__ = ["EXAMPLES", "build_parser", "main"]

INTERRUPTED = 130


def run_train(values: Namespace) -> int:
    config, resume = settings(TrainConfig, values), values.resume is not None
    if not resume:
        config.checked()  # before the seconds that torch and Lightning take to import
    from bti_fast.engine.train import train

    if values.resume:
        if config.out is not None and Path(config.out) != Path(values.resume):
            raise UserError(
                f"--resume {values.resume} and --out {config.out} name two runs; give one of them"
            )
        config = dataclasses.replace(config, out=values.resume)
    try:
        train(config, resume=resume)
    except KeyboardInterrupt as cause:
        folder = Path(config.out) if config.out else None
        if folder is not None and (folder / "config.yaml").exists():
            raise KeyboardInterrupt(f"go on with: {PROGRAM} train --resume {folder}") from cause
        raise
    return 0


def run_evaluate(values: Namespace) -> int:
    config = settings(EvaluateConfig, values).checked()
    from bti_fast.engine.evaluate import evaluate

    evaluate(config)
    return 0


def run_ablate(values: Namespace) -> int:
    config = settings(AblateConfig, values)
    config = dataclasses.replace(config, rows=config.rows or AblateConfig().rows).checked()
    from bti_fast.engine.ablate import ablate

    try:
        ablate(config)
    except KeyboardInterrupt as cause:
        raise KeyboardInterrupt("give the same command again to go on") from cause
    return 0


def run_calibrate(values: Namespace) -> int:
    config = settings(CalibrateConfig, values).checked()
    from bti_fast.engine.calibrate import calibrate

    calibrate(config)
    return 0


def run_failures(values: Namespace) -> int:
    config = settings(FailuresConfig, values).checked()
    from bti_fast.engine.failures import failures

    failures(config)
    return 0


def run_predict(values: Namespace) -> int:
    config = settings(PredictConfig, values).checked()
    from bti_fast.engine.predict import predict

    predict(config)
    return 0


def run_convert(values: Namespace) -> int:
    from bti_fast.models.convert import convert_file

    source, target = _needed(values, "source", "target")
    convert_file(source, target, images_divided_twice=values.double_rescale)
    _console().print(f"{source} -> {target}", markup=False, highlight=False, soft_wrap=True)
    return 0


def run_data(values: Namespace) -> int:
    if values.subcommand is None:
        raise UserError("data: say check, pack or phantoms")
    commands = {"check": run_data_check, "pack": run_data_pack, "phantoms": run_data_phantoms}
    return commands[values.subcommand](values[values.subcommand])


def run_data_check(values: Namespace) -> int:
    from rich.console import Console

    from bti_fast.data import check_dataset, read_dataset
    from bti_fast.engine.files import write_json

    (path,) = _needed(values, "path")
    report = check_dataset(read_dataset(path, values.layout, groups=values.groups))
    if values.json is not None:
        write_json(Path(values.json), report.to_dict())
    report.render(Console())
    return 0 if report.ok else 1


def run_data_pack(values: Namespace) -> int:
    from bti_fast.data import pack_dataset, read_dataset

    path, file = _needed(values, "path", "file")
    index = read_dataset(path, values.layout)
    for line in index.warnings():
        _console().print(line, markup=False, highlight=False, soft_wrap=True)
    made = pack_dataset(index, file, max_mb=values.max_mb, size=values.size)
    how = "as they were" if made.quality is None else f"as JPEG of quality {made.quality}"
    text = f"{made.cases} images, {how}, {made.bytes / 1e6:.1f} MB -> {made.path}"
    _console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def run_data_phantoms(values: Namespace) -> int:
    from bti_fast.data import make_phantoms

    (folder,) = _needed(values, "folder")
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise UserError(f"{folder}: is not empty; phantoms need a folder of their own")
    made = make_phantoms(folder, values.count, size=values.size, seed=values.seed)
    _console().print(f"{values.count} phantoms -> {made}", markup=False, highlight=False, soft_wrap=True)
    return 0


def run_demo(values: Namespace) -> int:
    from bti_fast.engine.demo import demo

    demo(values.out, data=values.data, epochs=values.epochs, size=values.size, threads=values.threads)
    return 0


def run_doctor(values: Namespace) -> int:
    from bti_fast import doctor

    print(json.dumps(doctor.report(), indent=2, default=str) if values.json else doctor.render())
    return 0


def run_benchmark(arguments: Sequence[str]) -> int:
    """Hands everything to the benchmarks, which have options of their own."""
    return importlib.import_module("bti_fast.benchmarks.__main__").main(list(arguments)) or 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "ablate": run_ablate,
    "calibrate": run_calibrate,
    "failures": run_failures,
    "predict": run_predict,
    "convert": run_convert,
    "data": run_data,
    "demo": run_demo,
    "doctor": run_doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; exit code 0 done, 1 the data check found problems, 2 bad input, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be bytes that the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if arguments[:1] == ["--version"]:
            from bti_fast import __version__

            print(f"{PROGRAM} {__version__}")
            return 0
        if arguments[:1] == ["benchmark"]:
            return run_benchmark(arguments[1:])
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return 0
        values = parser.parse_args(arguments)
        if values.subcommand != "train":
            _check_alone(values.subcommand)
        return COMMANDS[values.subcommand](values[values.subcommand])
    except UserError as error:
        if _is_first() or getattr(error, "own", False):
            print(f"{PROGRAM}: {_single(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        if (missing.name or "bti_fast").split(".")[0] == "bti_fast":
            raise  # our own mistake, not an extra that was left out
        print(
            f"{PROGRAM}: {missing.name} is not installed; needed: pip install 'bti_fast[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        if _is_first():
            print(f"{PROGRAM}: interrupted" + (f"; {stop}" if str(stop) else ""), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _is_first() -> bool:
    """Whether this is the process that speaks: of those that torchrun starts the first, which does all that
    the others do."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def _check_alone(command: str) -> None:
    """UserError where torchrun started several processes for a command that works in one."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "LOCAL_RANK" in os.environ and count != "1":
        instead = (
            "give --devices in place of torchrun" if command == "ablate" else "start it without torchrun"
        )
        raise UserError(f"{command}: torchrun started {count} processes, this command is one; {instead}")


def _single(error: UserError) -> str:
    return " ".join(str(error).split("\n"))


def _needed(values: Namespace, *names: str) -> list[str]:
    """The positional arguments of those names; UserError naming the first that is missing."""
    for name in names:
        if getattr(values, name) is None:
            raise UserError(f"{name.upper()} is missing; see --help")
    return [getattr(values, name) for name in names]


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


if __name__ == "__main__":
    sys.exit(main())
