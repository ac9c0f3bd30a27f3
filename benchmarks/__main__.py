"""``bti-fast benchmark``: what the operators and the network cost here, beside everybody else who can
compute them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bti_fast.errors import UserError

EXAMPLES = """\
bti-fast benchmark                            the operators at the paper's levels; under 5 minutes on 2 cores
bti-fast benchmark --level 3 --no-compile     one size, in seconds
bti-fast benchmark --full --save all.csv      all: batch 1, 3D, dtypes, layouts, modules, network, sweeps
bti-fast benchmark --compare old.csv new.csv  exit status 1 where something became slower
bti-fast benchmark --load all.csv --report all.html
"""


def main(arguments: list[str] | None = None) -> int:
    """Measures, or works on tables measured before; 1 where a comparison or a correctness check failed, 2 for
    bad input."""
    options = parse(arguments)
    try:
        if options.compare:
            return compare_tables(options)
        if options.readme:
            from .readme import update

            print(update())
            return 0
        if options.load:
            return load_tables(options)
        return run(options)
    except UserError as error:
        print(f"bti-fast benchmark: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="bti-fast benchmark",
        description="Measure the operators and the network beside eager PyTorch, torch.compile and attention "
        "backends, interleaved in one run, against the machine's own ceilings.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--only", nargs="+", default=[], metavar="KERNEL", help="operators or modules, by name")
    what.add_argument(
        "--group",
        nargs="+",
        metavar="GROUP",
        help="groups of cases (default: levels, or where the kernels of --only are at home)",
    )
    what.add_argument(
        "--full", action="store_true", help="every group, torch.compile and max-autotune everywhere"
    )
    what.add_argument("--level", type=int, metavar="N", help="one size of the four (five for attention)")
    what.add_argument(
        "--batch", type=int, metavar="N", help="batch of the group levels (default: 8, attention 2)"
    )
    what.add_argument("--list", action="store_true", help="name the cases and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    how.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
    how.add_argument(
        "--seconds", type=float, default=0.4, metavar="X", help="for each row, about (default: 0.4)"
    )
    how.add_argument(
        "--isa",
        nargs="+",
        default=["auto"],
        choices=("auto", "portable", "avx2", "avx512"),
        metavar="NAME",
        help="instruction sets: auto, portable, avx2, avx512",
    )
    how.add_argument(
        "--compile",
        choices=("none", "default", "all"),
        help="cases at which torch.compile, which takes minutes, is measured (default: default; --full: all)",
    )
    how.add_argument("--no-compile", action="store_true", help="the same as --compile none")
    how.add_argument("--max-autotune", action="store_true", help="torch.compile's max-autotune mode too")
    out = parser.add_argument_group("results")
    out.add_argument("--save", type=Path, metavar="FILE", help="write or update a table of rows (CSV)")
    out.add_argument(
        "--report", type=Path, metavar="PAGE", help="write a report page (HTML, needs matplotlib)"
    )
    instead = out.add_mutually_exclusive_group()
    instead.add_argument(
        "--load", type=Path, nargs="+", metavar="FILE", help="measure nothing; use these tables"
    )
    instead.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two tables")
    instead.add_argument(
        "--readme", action="store_true", help="rewrite the README's figures from benchmarks/results"
    )
    out.add_argument(
        "--threshold", type=float, default=0.15, metavar="X", help="of --compare (default: 0.15)"
    )
    options = parser.parse_args(arguments)
    options.compile = (
        "none" if options.no_compile else options.compile or ("all" if options.full else "default")
    )
    return options


def run(options: argparse.Namespace) -> int:
    """Measures the cases asked for and prints, saves and reports them."""
    import torch

    from bti_fast.engine.files import output_folder
    from bti_fast.memory import keep_freed_memory

    from . import table
    from .harness import MODES
    from .measure import Settings, blank, machine_rows, measure
    from .peers import Choice
    from .registry import GROUPS, cases, select
    from .rows import read, save
    from .whole_network import Network, measure_networks

    for name in ("threads", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: found {value}, needed at least 1")
    if not options.seconds > 0:
        raise UserError(f"--seconds: found {options.seconds}, needed a positive number")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    groups = options.group or (GROUPS if options.full else ())
    chosen = select(cases(options.batch, options.device), options.only, groups, options.level)
    if options.list:
        print("\n".join(f"{case.group:18} {case}" for case in chosen))
        return 0
    for path in (options.save, options.report):  # what is measured may take an hour
        if path is not None:
            output_folder(path.parent)
    if options.save and options.save.exists():
        read(options.save)
    torch.set_num_threads(options.threads)
    choice = Choice(options.compile, options.max_autotune or options.full, isas=tuple(options.isa))
    settings = Settings(options.device, options.threads, options.seconds, choice)
    row = blank(settings)
    print(f"bti_fast {row.bti_fast} ({row.commit or 'no commit'}), torch {row.torch}, {row.device}")
    print("medians of interleaved repeats")
    rows = machine_rows("before", settings, row)
    failures, last = [], None

    def show(found: list) -> None:
        nonlocal last
        if table.title(found) != last:
            last = table.title(found)
            print(f"{last}\n{table.HEADER}")
        print("\n".join(table.lines(found)), flush=True)
        rows.extend(found)
        if options.save:  # after every case: an interruption loses one
            save(options.save, rows)

    for case in (case for case in chosen if not isinstance(case, Network)):
        if case.sweeps and options.device == "cpu":  # they come last
            keep_freed_memory()  # else the largest sizes show the price of fresh pages instead of the work
        for mode in MODES:
            try:
                show(measure(case, mode, settings, row))
            except AssertionError as wrong:
                failures.append(str(wrong))
                print(f"WRONG  {wrong}", flush=True)
    networks = [case for case in chosen if isinstance(case, Network)]
    if networks and options.device == "cpu":
        for found in measure_networks(networks, options.threads, row):
            show(found)
    rows += machine_rows("after", settings, row)
    if options.save:
        save(options.save, rows)
    return finish(options, rows) or (1 if failures else 0)


def load_tables(options: argparse.Namespace) -> int:
    """Prints, reports and, with --save, gathers tables that were measured before."""
    from .registry import named
    from .rows import MACHINE, read, save

    rows = [row for path in options.load for row in read(path)]
    kernels = named(options.only, list(dict.fromkeys(row.kernel for row in rows if row.kernel != MACHINE)))
    rows = [row for row in rows if not kernels or row.kernel in (*kernels, MACHINE)]
    if options.save:
        save(options.save, rows)
    return finish(options, rows)


def finish(options: argparse.Namespace, rows: list) -> int:
    """The summary and the report page."""
    from .table import summary

    print("\n".join(summary(rows)))
    if options.report:
        from .report import write_report

        write_report(options.report, rows)
        print(f"\nreport: {options.report}")
    return 0


def compare_tables(options: argparse.Namespace) -> int:
    """Prints what changed; 1 where something of ours became slower or larger."""
    from .compare import changes, describe
    from .rows import read

    if not options.threshold > 0:
        raise UserError(f"--threshold: found {options.threshold}, needed a positive share such as 0.15")
    old, new = (read(path) for path in options.compare)
    lines, worse = describe(changes(old, new), options.threshold)
    print("\n".join(lines))
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())


if __name__ == "__main__":
    raise SystemExit(main())
