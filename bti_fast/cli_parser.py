"""The whole command line: every command with its options and help."""

from __future__ import annotations

from bti_fast.cli_options import Parser, add_settings
from bti_fast.engine.config import AblateConfig, TrainConfig
from bti_fast.engine.run_config import CalibrateConfig, EvaluateConfig, FailuresConfig, PredictConfig

PROGRAM = "bti-fast"

EXAMPLES = """\
bti-fast segments a lesion and diagnoses the image in one pass. The usual order:
  bti-fast data check BUSI                          is the data in order?
  bti-fast train --data BUSI --out runs/first       train, with a report at the end
  bti-fast evaluate runs/first                      metrics on cases never trained on
  bti-fast predict runs/first scans/ --out results  masks and diagnoses for new images
No data at hand: bti-fast demo --out demo
"""


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
        "same budget and several seeds. Stopped, the same command goes on; rows may be divided between "
        "shells that share --out, before a last run of all. All options of train apply.",
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
