"""The whole BTI-Net: seconds and peak memory of inference and of a training step, each in a fresh process.

``python -m bti_fast.benchmarks.network``. Providers: "reference" is the network with the operators in plain
PyTorch, contiguous layout and the allocator as it comes; "bti_fast" is what the commands run; "folded" is
that after ``BTINet.fold()``, for inference; "checkpointing" is "bti_fast" with activation checkpointing,
for training; "compile" is "bti_fast" (for inference: folded) under
torch.compile. ``benchmarks/keras_network.py`` measures the same layers in TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

MODES = ("inference", "training step")
PROVIDERS = {
    "inference": ("reference", "bti_fast", "folded"),
    "training step": ("reference", "bti_fast", "checkpointing"),
}
WARM_UP = 2  # steps before the timed ones: freed memory fits together only then


def main(arguments: list[str] | None = None) -> int:
    """Runs every asked combination in a fresh process, so that each peak of memory is its own."""
    parser = argparse.ArgumentParser(prog="bti_fast.benchmarks.network", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="efficientnet-b4", help="efficientnet-b0 to -b7")
    parser.add_argument("--size", type=int, default=224, help="side of the square images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after two to warm up")
    parser.add_argument(
        "--interactions", nargs="+", default=["proxy"], help="none fixed proxy entropy attention"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also under torch.compile (minutes to compile)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--on-request", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # A training step needs batch statistics, which one image does not have.
    modes = MODES if options.batch > 1 else MODES[:1]
    if options.one:
        print(json.dumps(_measure(options, *options.one.split(","))))
        return 0
    print(f"{options.encoder}, {options.batch}x3x{options.size}x{options.size}, {options.threads} threads")
    print(f"{'interaction':12} {'mode':14} {'provider':13} {'median s':>9} {'min-max':>15} {'peak GB':>8}")
    for interaction in options.interactions:
        for mode in modes:
            for provider in (*PROVIDERS[mode], *(("compile",) if options.compile else ())):
                row = in_fresh_process(
                    sys.argv[1:] if arguments is None else arguments, interaction, mode, provider
                )
                span = f"{row['min']:.2f}-{row['max']:.2f}"
                line = f"{interaction:12} {mode:14} {provider:13} {row['median']:9.2f} {span:>15}"
                print(f"{line} {row['peak']:8.2f}", flush=True)
    return 0


def in_fresh_process(arguments: list[str], *case: str) -> dict:
    """{"times": seconds, "median", "min", "max", "peak": GiB of resident memory} of one interaction, mode and
    provider, with this command's arguments otherwise."""
    command = [sys.executable, "-m", "bti_fast.benchmarks.network", *arguments, "--one", ",".join(case)]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )


def _measure(options: argparse.Namespace, interaction: str, mode: str, provider: str) -> dict:
    import contextlib

    import torch

    import bti_fast
    from bti_fast.losses import classification_loss, segmentation_loss
    from bti_fast.memory import keep_freed_memory
    from bti_fast.models import BTINet

    if provider != "reference":
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = BTINet(options.encoder, interaction=interaction, image_size=options.size)
    if provider == "reference":
        model.to(memory_format=torch.contiguous_format)
    if provider == "folded" or (provider, mode) == ("compile", "inference"):
        model = model.fold()
    model.activation_checkpointing = provider == "checkpointing"
    image = torch.rand(options.batch, 3, options.size, options.size)
    mask = (torch.rand(options.batch, 1, options.size, options.size) > 0.9).float()
    label = torch.arange(options.batch) % 3
    optimizer = None if mode == "inference" else torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    forward = torch.compile(model) if provider == "compile" else model

    def inference() -> None:
        with torch.no_grad():
            forward(image)

    def training_step() -> None:
        optimizer.zero_grad()
        out = forward(image)
        loss = 0.8 * segmentation_loss(out.seg_logits, mask) + 0.2 * classification_loss(
            out.cls_logits, label
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.train(mode != "inference")
    step = inference if mode == "inference" else training_step
    forced = bti_fast.backend("reference") if provider == "reference" else contextlib.nullcontext()
    times = []
    with forced:
        for _ in range(WARM_UP):
            step()
        for _ in _requests() if options.on_request else range(options.repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
            if options.on_request:
                print(times[-1], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    median = statistics.median(times)
    return {"times": times, "median": median, "min": min(times), "max": max(times), "peak": peak}


def _requests() -> Iterator[str]:
    """Lines of the standard input: one for each step that is to be timed, from whoever takes turns."""
    print("ready", flush=True)
    yield from sys.stdin


if __name__ == "__main__":
    raise SystemExit(main())
