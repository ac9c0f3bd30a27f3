"""Times of the fused operators on a GPU: medians over runs with a cold L2, beside a copy of the same size."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import PAPER_LEVELS
from benchmarks.task_interaction import _weights
from bti_fast import ops, reference

TAU = 0.7
FEATURES = 256
RUNS = 50
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Least traffic, in units of x: forward, and forward + backward.
UNITS = {"gated_fusion": (2, 5), "task_interaction": (3, 8)}


def fusion(batch: int, channels: int, side: int, fmt, eager: bool = False):
    """(call, inputs, positions of inputs without gradient) of gated_fusion in bfloat16, one mask logit."""
    x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
    inputs = [
        x.contiguous(memory_format=fmt),
        torch.randn(batch, 1, side, side, device="cuda", dtype=torch.bfloat16),
        torch.rand(batch, channels, device="cuda"),
        torch.rand(batch, device="cuda"),
        torch.tensor([1.0, 0.5, -0.2], device="cuda"),
    ]
    if eager:
        return lambda *args: reference.gated_fusion(*args, TAU), inputs, ()
    return lambda *args: tuple(ops.gated_fusion(*args, tau=TAU)), inputs, ()


def interaction(batch: int, channels: int, side: int, fmt, eager: bool = False):
    """The same for task_interaction in evaluation, weights in bfloat16."""
    x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
    weights = [value.to("cuda", torch.bfloat16) for value in _weights(channels, FEATURES)]
    y = torch.randn(batch, FEATURES, device="cuda", dtype=torch.bfloat16)
    inputs = [x.contiguous(memory_format=fmt), y, *weights]
    constant = tuple(2 + ops.TaskInteractionWeights._fields.index(name) for name in ("bn_mean", "bn_var"))
    if eager:
        call = lambda x, y, *w: reference.task_interaction(x, y, list(w), TAU, False)[:4]  # noqa: E731
    else:
        call = lambda x, y, *w: tuple(  # noqa: E731
            ops.task_interaction(x, y, ops.TaskInteractionWeights(*w), tau=TAU)
        )
    return call, inputs, constant


MADE = {"gated_fusion": fusion, "task_interaction": interaction}


def forward(call: Callable, inputs: list[Tensor]) -> Callable[[], tuple]:
    """Runs the call without gradients."""

    def run() -> tuple:
        with torch.no_grad():
            return call(*inputs)

    return run


def forward_backward(call: Callable, inputs: list[Tensor], constant: tuple[int, ...]) -> Callable[[], list]:
    """Runs the call and its gradients for fixed cotangents."""
    inputs = [value.detach().requires_grad_(i not in constant) for i, value in enumerate(inputs)]
    wanted = [value for value in inputs if value.requires_grad]
    cotangents = [torch.randn_like(out) for out in call(*inputs)]

    def run() -> list:
        return list(torch.autograd.grad(call(*inputs), wanted, cotangents))

    return run


def captured(run: Callable) -> Callable[[], None]:
    """The run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def median_ms(run: Callable, runs: int = RUNS) -> dict[str, float]:
    """p20, median and p80 of the run's milliseconds, the L2 overwritten before each."""
    flush = torch.empty(512 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(5):
        run()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    tenths = statistics.quantiles(times, n=10)
    return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7]}


def operators(level: int) -> dict:
    """Both operators at one level, batch 64, bfloat16, beside eager, torch.compile and a copy of x."""
    channels, side = PAPER_LEVELS[level]
    rows = []
    for layout, fmt in FORMATS.items():
        for name, made in MADE.items():
            x = made(64, channels, side, fmt)[1][0]
            target = torch.empty_like(x)
            copy = median_ms(lambda target=target, x=x: target.copy_(x))
            peak = 2 * x.nbytes / copy["p50"]
            for mode, units in zip(("forward", "forward+backward"), UNITS[name], strict=True):
                for provider in ("bti_fast", "compile", "eager", "bti_fast graph", "compile graph"):
                    torch.manual_seed(0)
                    run = _provider(made, provider, mode, 64, channels, side, fmt)
                    times = median_ms(run)
                    share = units * x.nbytes / times["p50"] / peak
                    rows.append(
                        {
                            "operator": name,
                            "size": list(x.shape),
                            "layout": layout,
                            "mode": mode,
                            "provider": provider,
                            **times,
                            "gigabytes_per_second": units * x.nbytes / times["p50"] / 1e6,
                            "share_of_copy": share,
                        }
                    )
                    _show(rows[-1])
    return {"rows": rows}


def small_batch() -> dict:
    """Batch 8 under CUDA graphs, bti_fast beside torch.compile."""
    rows = []
    for channels, side in PAPER_LEVELS:
        for name, made in MADE.items():
            for mode in ("forward", "forward+backward"):
                for provider in ("bti_fast graph", "compile graph"):
                    fmt = torch.contiguous_format
                    run = _provider(made, provider, mode, 8, channels, side, fmt)
                    size = [8, channels, side, side]
                    rows.append(
                        {"operator": name, "size": size, "mode": mode, "provider": provider, **median_ms(run)}
                    )
                    _show(rows[-1])
    return {"rows": rows}


def _provider(made, provider: str, mode: str, batch: int, channels: int, side: int, fmt) -> Callable:
    call, inputs, constant = made(batch, channels, side, fmt, eager=not provider.startswith("bti_fast"))
    if provider.startswith("compile"):
        call = torch.compile(call)
    run = forward(call, inputs) if mode == "forward" else forward_backward(call, inputs, constant)
    return captured(run) if provider.endswith("graph") else run


def _show(row: dict) -> None:
    share = f"{row['share_of_copy']:6.0%} of copy" if "share_of_copy" in row else ""
    name = f"{row['operator']:17} {'x'.join(map(str, row['size'])):16} {row.get('layout', ''):13}"
    print(f"{name} {row['mode']:17} {row['provider']:15} {row['p50']:8.4f} ms {share}", flush=True)


def graphs() -> dict:
    """Captures every fused operator, replays it on new numbers, compares with a plain call bit for bit."""
    from benchmarks import gpu_attention

    cases = {
        (name, layout): made(4, 48, 28, fmt) for name, made in MADE.items() for layout, fmt in FORMATS.items()
    }
    for m in (1, 64, 256):
        tokens = gpu_attention.inputs(m, batch=2, n=3136)
        cases["cross_attention", f"M={m}"] = (gpu_attention.fused, tokens, ())
    for (name, kind), (call, inputs, constant) in cases.items():
        plain = forward_backward(call, inputs, constant)
        kept: list = []

        def run(plain=plain, kept=kept):
            kept[:] = plain()

        replay = captured(run)
        with torch.no_grad():
            inputs[0].copy_(torch.randn_like(inputs[0]))
        replay()
        got = [value.clone() for value in kept]
        for one, two in zip(got, plain(), strict=True):
            if not torch.equal(one, two):
                raise AssertionError(f"{name}, {kind}: a replayed graph differs from a call")
    return {}


def network() -> dict:
    """Milliseconds of a training step of BTINet: B4, 224 px, batch 64, bfloat16 autocast."""
    from bti_fast.losses import classification_loss, segmentation_loss
    from bti_fast.models import BTINet

    rows = []
    image = torch.rand(64, 3, 224, 224, device="cuda")
    mask = (torch.rand(64, 1, 224, 224, device="cuda") > 0.8).float()
    label = torch.randint(0, 3, (64,), device="cuda")
    for choice in ("none", "proxy", "entropy", "none"):
        torch.manual_seed(0)
        model = BTINet("efficientnet-b4", interaction=choice).cuda().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = model(image)
            loss = segmentation_loss(out.seg_logits.float(), mask)
            (loss + classification_loss(out.cls_logits.float(), label)).backward()
            optimizer.step()

        rows.append({"interaction": choice, **median_ms(step, runs=20)})
        print(rows[-1], flush=True)
        del model, optimizer, step
    return {"rows": rows}
