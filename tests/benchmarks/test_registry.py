"""The registry's cases: bytes and work by hand, correctness checked, wrong providers and names refused."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cross_attention, entropy_uncertainty, gated_fusion, gated_interaction, task_interaction
from benchmarks.__main__ import main
from benchmarks.harness import Provider, WrongResult, bind, check, plain_operators, runner
from benchmarks.measure import Settings, blank, measure, prepare
from benchmarks.memory import peak_memory
from benchmarks.peers import EAGER, Choice, providers
from benchmarks.registry import GROUPS, KERNELS, cases, select
from bti_fast import ops
from bti_fast.nn import interaction
from bti_fast.nn.headed_fusion import headed_fusion, one_by_one

NO_COMPILE = Choice("none")


def small(kernel: str):
    if kernel == "cross_attention":
        return cross_attention.case(1, 40, 3, heads=2, dim=16, layout="channel-major")
    if kernel.startswith("GatedInteraction"):
        return gated_interaction.case(2, 6, (9, 8), kernel.split()[1])
    if kernel == "entropy_uncertainty":
        return entropy_uncertainty.case(2, 3, (9, 8))
    made = {"gated_fusion": gated_fusion, "task_interaction": task_interaction}[kernel]
    return made.case(2, 6, (9, 8), layout="channels_last")


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "BTINet"])
def test_everybody_agrees_and_a_wrong_provider_does_not(kernel, mode):
    case = small(kernel)
    bound = bind(case, mode)
    runs, reasons = prepare(bound, providers(case, NO_COMPILE)[0])
    assert {EAGER, "bti_fast"} <= set(runs) and not reasons
    eager = runs[EAGER][1]()

    def slightly_off(*inputs):
        first, *rest = case.ours(*inputs)
        return (first * 1.01, *rest)

    def unwritten(*inputs):
        first, *rest = case.ours(*inputs)
        return (torch.where(first == first.max(), torch.nan, first), *rest)

    for call in (slightly_off, unwritten):
        wrong = Provider("wrong", call)
        with pytest.raises(WrongResult, match=f"{kernel}.*: output 0 of wrong is off by"):
            check(bound, wrong, runner(bound, wrong)(), eager)


def test_a_wrong_gradient_is_seen():
    case = small("gated_fusion")
    bound = bind(case, "forward+backward")
    eager = runner(bound, Provider(EAGER, case.reference))()
    half = Provider("half", lambda x, *rest: case.ours(x.detach() + 0.5 * (x - x.detach()), *rest))
    with pytest.raises(WrongResult, match="gradient 0 of half"):
        check(bound, half, runner(bound, half)(), eager)


def test_a_failing_peer_is_listed_and_ours_is_not_forgiven():
    case = small("gated_fusion")

    def broken(*inputs):
        raise RuntimeError("no such\nkernel")

    _, reasons = prepare(bind(case, "forward"), [Provider(EAGER, case.reference), Provider("peer", broken)])
    assert reasons == {"peer": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError):
        prepare(
            bind(case, "forward"), [Provider(EAGER, case.reference), Provider("bti_fast", broken, ours=True)]
        )


def test_rows_of_a_measured_case():
    case = small("cross_attention")
    settings = Settings(threads=1, seconds=0.01, choice=Choice("none", isas=("auto", "sse9")))
    rows = measure(case, "forward", settings, blank(settings))
    times = {row.provider: row for row in rows if row.metric == "ms"}
    assert {"eager", "sdpa", "sdpa flash", "sdpa math", "bti_fast"} <= set(times)
    ours = times["bti_fast"]
    assert 0 < ours.p20 <= ours.p50 <= ours.p80 and ours.samples >= 5
    traffic = 3 * 1 * 2 * 40 * 16 * 4
    assert ours.gb_per_s == pytest.approx(traffic / ours.p50 / 1e6) and 0 < ours.roofline < 1
    absent = {row.provider for row in rows if row.metric == "skipped"}
    assert absent == {"sdpa efficient", "sdpa cudnn", "compile", "bti_fast:sse9"}


def test_least_bytes_by_hand():
    case = gated_fusion.case(8, 96, (56, 56), 4, dtype=torch.bfloat16)
    x, logits = 8 * 96 * 56 * 56 * 2, 8 * 4 * 56 * 56 * 2
    assert case.traffic == {"forward": 2 * x + logits, "forward+backward": 5 * x + 3 * logits}


def test_peak_memory_of_known_allocations():
    x = torch.ones(1000, 1000)

    def run():
        return [(x + 1).sum(0)]  # 4 MB, then 4 kB

    peak, extra = peak_memory(run)
    assert 4_004_000 <= peak < 4_010_000 and extra == peak - 4000


def test_plain_operators_are_put_back():
    before = {name: getattr(ops, name) for name in ("gated_fusion", "task_interaction", "cross_attention")}
    with pytest.raises(KeyError), plain_operators():
        assert ops.gated_fusion is not before["gated_fusion"]
        assert interaction.headed_fusion is one_by_one
        raise KeyError
    assert all(getattr(ops, name) is value for name, value in before.items())
    assert interaction.headed_fusion is headed_fusion


def test_every_kernel_and_group_has_cases():
    everything = cases()
    assert {case.kernel for case in everything} == set(KERNELS)
    assert {case.group for case in everything} == set(GROUPS)
    names = [(case.group, str(case)) for case in everything]
    assert len(names) == len(set(names))
    four = select(everything, ["task_interaction"])
    assert [case.size for case in four] == ["8x384x14x14", "8x192x28x28", "8x96x56x56", "8x48x112x112"]
    assert len(select(everything, ["cross_attention"])) == 5 and len(select(everything, level=3)) == 4
    modules = {case.kernel for case in select(everything, ["GatedInteraction"])}
    assert modules == {f"GatedInteraction {kind}" for kind in ("proxy", "entropy", "attention")}
    assert {case.group for case in select(everything, ["BTINet", "gated_fusion"])} == {"network", "levels"}
    assert {case.group for case in select(everything, ["BTINet"], ["network", "levels"])} == {"network"}


def test_an_instruction_set_that_there_is_not_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--isa", "auto", "sse9", "--list"])
    assert stop.value.code == 2 and "invalid choice: 'sse9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--only", "gated_fushion"],
            "--only: found 'gated_fushion', needed one of entropy_uncertainty, gated",
        ),
        (["--group", "levelz"], "--group: found 'levelz', needed one of levels, batch 1"),
        (["--level", "9"], "--level: found 9, needed 1, 2, 3 or 4"),
        (["--only", "BTINet", "--group", "levels"], "no case of BTINet in levels"),
        (["--threads", "0"], "--threads: found 0, needed at least 1"),
        (["--seconds", "nan"], "--seconds: found nan, needed a positive number"),
        (["--save", "/dev/null/rows.csv"], "/dev/null: output folder cannot be written"),
        (["--report", "/dev/null/page.html"], "/dev/null: output folder cannot be written"),
        (["--compare", "a", "b", "--threshold", "nan"], "--threshold: found nan"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, arguments, line):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bti-fast benchmark: {line}") and error.count("\n") == 1
