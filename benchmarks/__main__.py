"""``bti-fast benchmark``: the operators' speed table on this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

OPERATORS = ("entropy_uncertainty", "gated_fusion", "task_interaction", "cross_attention")


def main(arguments: list[str] | None = None) -> int:
    """Parses the flags, measures, prints one table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="bti-fast benchmark",
        description="Measure the operators beside eager PyTorch and torch.compile, interleaved in one run.",
    )
    parser.add_argument(
        "--only", choices=OPERATORS, nargs="+", default=OPERATORS, help="operators to measure"
    )
    parser.add_argument("--level", type=int, choices=(1, 2, 3, 4), help="one size of the four instead of all")
    parser.add_argument("--batch", type=int, help="images in a batch (default: 8; 2 for cross_attention)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time budget for each line (default: 2)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes minutes"
    )
    parser.add_argument("--save", type=Path, help="write the rows as JSON here")
    options = parser.parse_args(arguments)

    import torch

    from bti_fast import __version__

    from .harness import MODES, ceilings, measure

    torch.set_num_threads(options.threads)
    bandwidth, rate = ceilings(options.threads)
    print(
        f"bti_fast {__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"{options.threads} threads: copy {bandwidth / 1e9:.1f} GB/s, sgemm {rate / 1e9:.0f} GFLOP/s, "
        f"float32, medians"
    )
    print(
        f"{'operator':20} {'size':24} {'mode':17} {'provider':9} {'ms':>8} {'p20-p80':>15} "
        f"{'vs eager':>9} roofline"
    )
    rows = []
    for name in options.only:
        module = importlib.import_module(f".{name}", __package__)
        cases = module.benchmarks(**({"batch": options.batch} if options.batch else {}))
        for case in cases if options.level is None else cases[options.level - 1 : options.level]:
            if options.no_compile:
                case.providers.pop("compile", None)
            for mode in MODES:
                for row in measure(case, mode, options.seconds):
                    rows.append(row)
                    print(
                        f"{row.operator:20} {row.size:24} {row.mode:17} {row.provider:9} {row.p50:8.2f} "
                        f"{row.p20:7.2f}-{row.p80:<7.2f} {row.ratio:8.2f}x {row.roofline:7.0%}",
                        flush=True,
                    )
    if options.save:
        record = {
            "bti_fast": __version__,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
            "copy_bytes_per_second": bandwidth,
            "sgemm_flop_per_second": rate,
            "rows": [asdict(row) for row in rows],
        }
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
