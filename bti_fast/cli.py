"""The command line: options to settings, user errors to one line, nothing heavy imported before it is
needed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from bti_fast.engine.config import (
    AblateConfig,
    CalibrateConfig,
    EvaluateConfig,
    FailuresConfig,
    PredictConfig,
    TrainConfig,
    flag,
)
from bti_fast.errors import UserError

PROGRAM = "bti-fast"
INTERRUPTED = 130
KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
}
METAVARS = {int: "N", int | None: "N", float: "X", str: "NAME", str | None: "PATH"}

EXAMPLES = """\
bti-fast segments a lesion and diagnoses the image in one pass. The usual order:
  bti-fast data check BUSI                          is the data in order?
  bti-fast train --data BUSI --out runs/first       train, with a report at the end
  bti-fast evaluate runs/first                      metrics on cases never trained on
  bti-fast predict runs/first scans/ --out results  masks and diagnoses for new images
No data at hand: bti-fast demo --out demo
"""


class Help(DefaultHelpFormatter):
    """Help as written, wrapped by paragraph, with the default beside it and no Python types."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(line if line[:1] == " " else fill(line, width, indent) for line in text.splitlines())

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, []) or action.nargs == 0:
            return text
        return f"{text} (default: {str(action.default).replace('True', 'true').replace('False', 'false')})"


class Parser(ArgumentParser):
    """jsonargparse's parser, except that a mistake is one line and the help is for people."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise UserError(_one_line(message))


def _one_line(message: str) -> str:
    """jsonargparse's message in one line, with options spelled as the user spells them."""
    text = " ".join(str(message).split())
    if match := re.match(r'Parser key "([\w.]+)": (.*)', text):
        name, said = flag(match[1].rsplit(".")[-1]), match[2]
        if wrong := re.match(r"Expected an? (.*)\. Got value: (.*)", said):
            kind = wrong[1].removeprefix("typing.").removeprefix("Literal")
            return f"{name} {wrong[2]}: must be {KINDS.get(kind, 'one of ' + kind.strip('[]'))}"
        return f"{name}: {said}"
    text = re.sub(r"^Subcommand '(\w+)' does not accept option '(.*)'$", r"\1 has no setting \2", text)
    return text.replace("unrecognized arguments:", "unknown option")


def add_settings(
    parser: Parser, config: type, positional: Sequence[str] = (), unused: Sequence[str] = ()
) -> None:
    """One option per field of a settings class, in its groups, with its help and default; plus --config."""
    hints, groups = get_type_hints(config), {}
    for item in dataclasses.fields(config):
        if item.name in unused:
            continue
        text = item.metadata["help"].replace("%", "%%")
        several = get_origin(hints[item.name]) is tuple
        if item.name in positional:
            kind = (
                {"nargs": "*", "type": str, "default": []}
                if several
                else {"nargs": "?", "type": hints[item.name]}
            )
            parser.add_argument(item.name, help=text, **kind)
            continue
        title = item.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        kind = {"metavar": METAVARS[hints[item.name]]} if hints[item.name] in METAVARS else {}
        group.add_argument(flag(item.name), type=hints[item.name], default=item.default, help=text, **kind)
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of settings (batch_size: 4); options given beside it win.",
    )


def settings(config: type, values: Namespace) -> Any:
    """The settings object of parsed options."""
    names = [item.name for item in dataclasses.fields(config) if item.name in values]
    plain = {name: getattr(values, name) for name in names}
    return config(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    )


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
        raise UserError(f"{PROGRAM} data: say check, pack or phantoms")
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
    for problem in index.problems:
        _console().print(f"warning: {problem.message}", markup=False, highlight=False, soft_wrap=True)
    made = pack_dataset(index, file, max_mb=values.max_mb, size=values.size)
    how = "as they were" if made.quality is None else f"as JPEG of quality {made.quality}"
    text = f"{made.cases} images, {how}, {made.bytes / 1e6:.1f} MB -> {made.path}"
    _console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def run_data_phantoms(values: Namespace) -> int:
    from bti_fast.data import make_phantoms

    (folder,) = _needed(values, "folder")
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


def build_parser() -> Parser:
    """The whole command line, built from the settings classes without importing torch."""
    parser = Parser(prog=PROGRAM, description=EXAMPLES)
    commands = parser.add_subcommands(required=False, metavar="COMMAND", help="")

    train = Parser(
        usage="bti-fast train --data PATH --out RUN [options]",
        description="Train both stages of a BTI-Net: the network on masks and classes, then its gates.",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="Go on with an interrupted run, named here or by --out; its own settings are used.",
    )
    add_settings(train, TrainConfig)
    commands.add_subcommand("train", train, help="train a network on a folder of images")

    evaluate = Parser(
        usage="bti-fast evaluate RUN [options]",
        description="Measure a trained network on cases with known masks and classes.",
    )
    add_settings(evaluate, EvaluateConfig, positional=("model",))
    commands.add_subcommand("evaluate", evaluate, help="metrics, figures and a report for a trained network")

    ablate = Parser(
        usage="bti-fast ablate [ROW ...] --data PATH --out DIR --seeds 3 [options]",
        description="The paper's ablation: train and evaluate every interaction on the same splits with the "
        "same budget and several seeds. Stopped, the same command goes on. All options of train apply.",
    )
    add_settings(ablate, AblateConfig, positional=("rows",), unused=("interaction",))
    commands.add_subcommand("ablate", ablate, help="compare the interactions over several seeds")

    calibrate = Parser(
        usage="bti-fast calibrate RUN [options]",
        description="Bring the confidences in line with how often they are right: one temperature for the "
        "mask and one for the class, fitted on the validation cases and stored with the weights.",
    )
    add_settings(calibrate, CalibrateConfig, positional=("model",))
    commands.add_subcommand("calibrate", calibrate, help="temperature scaling, fitted on validation cases")

    failures = Parser(
        usage="bti-fast failures RUN [OTHER_RUN ...] [options]",
        description="Which number foretells that a case went wrong? Gates, proxies and entropies of one pass "
        "against MC-dropout and an ensemble of the runs named. Stores the threshold by which predict refers "
        "cases to a human.",
    )
    add_settings(failures, FailuresConfig, positional=("model", "ensemble"))
    commands.add_subcommand("failures", failures, help="failure signals compared; a threshold for predict")

    predict = Parser(
        usage="bti-fast predict RUN IMAGE [IMAGE ...] --out DIR [options]",
        description="Segment and diagnose images. Unreadable files are listed and the others still done; "
        "the exit code is 2 only where nothing could be predicted.",
    )
    add_settings(predict, PredictConfig, positional=("model", "images"))
    commands.add_subcommand("predict", predict, help="masks, overlays and a table for new images")

    convert = Parser(
        usage="bti-fast convert official.keras model.safetensors [options]",
        description="Convert weights of the published TensorFlow code; needs h5py, not TensorFlow.",
    )
    convert.add_argument("source", nargs="?", type=str | None, help="The .keras file that model.save wrote.")
    convert.add_argument("target", nargs="?", type=str | None, help="The .safetensors file to write.")
    convert.add_argument(
        "--double-rescale",
        type=bool,
        default=False,
        help="The images were divided by 255 before the network's own division, as the published loaders do.",
    )
    commands.add_subcommand("convert", convert, help="published .keras weights to model.safetensors")

    data = Parser(description="Look at a data set before training, pack it, or make a synthetic one.")
    commands.add_subcommand("data", data, help="check or pack a data set, or make a synthetic one")
    data_commands = data.add_subcommands(required=False, metavar="COMMAND", help="")
    check = Parser(
        description="Counts, unreadable files, bad masks, near-duplicates and leaks between splits. "
        "Exit code 1 where something is wrong."
    )
    check.add_argument("path", nargs="?", type=str | None, help="Folder with the images.")
    check.add_argument(
        "--layout",
        type=str,
        default="auto",
        help="busi, ham10000, brisc2025, manifest, pack, or auto to look for itself.",
    )
    check.add_argument(
        "--groups",
        type=str | None,
        default=None,
        help="CSV file with the columns image and group (patient, say) that must not cross splits.",
    )
    check.add_argument(
        "--json", type=str | None, default=None, help="Also write the report to this JSON file."
    )
    data_commands.add_subcommand("check", check, help="report on a data set before training")
    pack = Parser(
        description="Write a data set as one file that --data takes in place of the folder. Images that do "
        "not fit go in as JPEG."
    )
    pack.add_argument("path", nargs="?", type=str | None, help="Folder with the images.")
    pack.add_argument("file", nargs="?", type=str | None, help="The .zip file to write.")
    pack.add_argument("--layout", type=str, default="auto", help="As for check.")
    pack.add_argument("--max-mb", type=float, default=60.0, help="Largest size in million bytes.")
    pack.add_argument("--size", type=int, default=0, help="Longest side of an image in pixels; 0 keeps it.")
    data_commands.add_subcommand("pack", pack, help="a data set as one file")
    phantoms = Parser(description="Make synthetic ultrasound-like images with lesions of two kinds and none.")
    phantoms.add_argument("folder", nargs="?", type=str | None, help="Folder to make; must be new or empty.")
    phantoms.add_argument("--count", type=int, default=150, help="Number of images.")
    phantoms.add_argument("--size", type=int, default=128, help="Side of each image in pixels.")
    phantoms.add_argument("--seed", type=int, default=0, help="Another seed, other images.")
    data_commands.add_subcommand("phantoms", phantoms, help="make a synthetic data set")

    demo = Parser(
        description="Train a small network on synthetic images (or yours), evaluate it and predict."
    )
    demo.add_argument("--out", type=str, default="demo", help="Folder for everything the demo makes.")
    demo.add_argument(
        "--data", type=str | None, default=None, help="Your own images instead of synthetic ones."
    )
    demo.add_argument("--epochs", type=int, default=8, help="Passes over the training images in stage 1.")
    demo.add_argument("--size", type=int, default=96, help="Side of the network's input in pixels.")
    demo.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice.")
    commands.add_subcommand("demo", demo, help="the whole job on synthetic images, in a few minutes")

    doctor = Parser(description="Say what is built, loaded and chosen on this machine, and why not the rest.")
    doctor.add_argument("--json", type=bool, default=False, help="Print as JSON instead of for reading.")
    commands.add_subcommand(
        "doctor", doctor, help="what is built, loaded and chosen here, and why not the rest"
    )
    benchmark = Parser(description="Time the operators and the network; from a clone of the source tree.")
    commands.add_subcommand("benchmark", benchmark, help="time the operators and the network")
    return parser


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
        return COMMANDS[values.subcommand](values[values.subcommand])
    except UserError as error:
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
        print(f"{PROGRAM}: interrupted" + (f"; {stop}" if str(stop) else ""), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
