"""Everything that needs a GPU, in steps of under ten minutes each: tests, sanitizer, CUDA graphs, speed.

    python benchmarks/gpu.py                    every step, results in benchmarks/results/<device>.json
    python benchmarks/gpu.py contract graphs    these steps only

Steps: contract (the operators' contract tests on CUDA tensors), memcheck and racecheck (compute-sanitizer on
a small case), graphs (capture and replay), operators-1 to operators-4 (speed at one level each, cold L2),
attention (cross_attention against pinned SDPA backends), small-batch (batch 8 under CUDA graphs), network (a
training step of BTINet with and without interactions), busi, ham10000 and brisc2025 (both stages trained at
224 px from packs/NAME.zip, and evaluated), ablation (the interactions on BUSI). These four need the training
extra; ended by the limit, they go on when called again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIMIT = 600  # seconds a step
TRAINING = ("busi", "ham10000", "brisc2025", "ablation")
STEPS = (
    "contract",
    "memcheck",
    "racecheck",
    "graphs",
    "operators-1",
    "operators-2",
    "operators-3",
    "operators-4",
    "attention",
    "small-batch",
    "network",
    *TRAINING,
)


def environment() -> dict[str, str]:
    """Of the steps: the GPU's kernels, not interpreted, and a deterministic cuBLAS."""
    values = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [values.get("PYTHONPATH")])]
    return {**values, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(paths)}


def device() -> dict:
    """What the numbers belong to."""
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True) if shutil.which(query[0]) else None
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver.stdout.split("\n")[0].strip() if driver else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def small_case() -> None:
    """Every fused operator, forward and backward, on tensors that a sanitizer gets through."""
    import torch

    from benchmarks import gpu_attention, gpu_timing

    for fmt in gpu_timing.FORMATS.values():
        for made in (gpu_timing.fusion, gpu_timing.interaction):
            call, inputs, constant = made(2, 16, 13, fmt)
            gpu_timing.forward_backward(call, inputs, constant)()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in ("tokens", "maps"):
            for m in (1, 40, 200):  # every variant of the kernels at 64 channels
                inputs = [value.to(dtype) for value in gpu_attention.inputs(m, layout, batch=1, n=300)]
                gpu_timing.forward_backward(gpu_attention.fused, inputs, ())()

    torch.cuda.synchronize()


def sanitize(tool: str) -> list[str]:
    """The command that runs small_case under compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise FileNotFoundError("compute-sanitizer: not on PATH nor in /usr/local/cuda/bin")
    return [found, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--inside", "small"]


def run_inside(step: str) -> dict:
    """One step in this process; its numbers."""
    if step in TRAINING:
        from benchmarks import gpu_training

        return gpu_training.ablation() if step == "ablation" else gpu_training.data_set(step)
    from benchmarks import gpu_timing

    if step == "small":
        small_case()
        return {}
    if step == "graphs":
        return gpu_timing.graphs()
    if step.startswith("operators-"):
        return gpu_timing.operators(int(step[-1]) - 1)
    if step == "attention":
        from benchmarks import gpu_attention

        return gpu_attention.attention()
    return gpu_timing.small_batch() if step == "small-batch" else gpu_timing.network()


def run_step(step: str, scratch: Path) -> dict:
    """One step in a process of its own: {"passed": bool, "seconds": float, ...numbers}."""
    if step in TRAINING:
        from benchmarks import gpu_training

        gpu_training.pack("busi" if step == "ablation" else step)
    if step == "contract":
        command = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_contract.py"]
    elif step in ("memcheck", "racecheck"):
        command = sanitize(step)
    else:
        command = [sys.executable, __file__, "--inside", step, "--numbers", str(scratch)]
    values = environment()
    if step == "contract":
        values["BTI_FAST_TEST_DEVICE"] = "cuda"
    if step in ("memcheck", "racecheck"):
        values["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    scratch.unlink(missing_ok=True)
    started = datetime.now()
    try:
        passed = subprocess.run(command, cwd=ROOT, env=values, timeout=LIMIT).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{step}: stopped after {LIMIT} s")
        passed = False
    seconds = (datetime.now() - started).total_seconds()
    numbers = json.loads(scratch.read_text()) if scratch.exists() else {}
    scratch.unlink(missing_ok=True)
    return {"passed": passed, "seconds": round(seconds, 1), **numbers}


def main() -> int:
    """Runs the steps asked for and writes the results after each; 1 where one failed, 2 where none can."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], metavar="step", help=", ".join(STEPS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch finds no GPU here; nothing was run")
        return 2
    from bti_fast import _library

    for name in ("cpu", "cuda"):
        if missing := _library.load(name):
            print(f"gpu: {missing}; install first: pip install --no-build-isolation --no-deps -e {ROOT}")
            return 2
    if chosen.inside:
        numbers = run_inside(chosen.inside)
        if chosen.numbers:
            chosen.numbers.write_text(json.dumps(numbers))
        return 0
    info = device()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{info['device'].lower().replace(' ', '-')}.json"
    record = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    failed = []
    for step in chosen.steps or STEPS:
        print(f"== {step}", flush=True)
        try:
            result = run_step(step, path.with_suffix(".part"))
        except FileNotFoundError as cause:
            result = {"passed": False, "seconds": 0.0, "reason": str(cause)}
        reason = f" ({result['reason']})" if "reason" in result else ""
        verdict = "passed" if result["passed"] else "FAILED"
        print(f"== {step}: {verdict} in {result['seconds']} s{reason}", flush=True)
        record["steps"][step] = {**result, **info}
        path.write_text(json.dumps(record, indent=1) + "\n")
        failed += [] if result["passed"] else [step]
    print(f"results: {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
