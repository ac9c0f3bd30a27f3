"""--compare finds what became slower, on whatever machine, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.__main__ import main
from benchmarks.compare import changes
from benchmarks.rows import BUSY_NOTE, COPY_RATE, save
from bti_fast.errors import UserError

from .made_rows import table, timed


def files(folder, old, new) -> list[str]:
    for name, rows in (("old.csv", old), ("new.csv", new)):
        save(folder / name, rows)
    return [str(folder / "old.csv"), str(folder / "new.csv")]


@pytest.mark.parametrize("machine", [1.0, 2.5, 0.4])
def test_a_slowdown_is_caught_on_any_machine(tmp_path, capsys, machine):
    paths = files(tmp_path, table(2.0), table(2.6, machine, run="second"))
    assert main(["--compare", *paths]) == 1
    out = capsys.readouterr().out
    assert "SLOWER  gated_fusion 8x96x56x56 K=1" in out and "1.30x against" in out
    assert "1 of 2 numbers of 1 cases grew" in out


@pytest.mark.parametrize("machine", [1.0, 2.5, 0.4])
def test_a_slower_machine_alone_is_no_slowdown(tmp_path, machine):
    paths = files(tmp_path, table(2.0), table(2.1, machine, run="second"))
    assert main(["--compare", *paths]) == 0
    assert main(["--compare", *paths, "--threshold", "0.04"]) == 1


@pytest.mark.parametrize(("machine", "ratio"), [(1.0, 1.05), (0.5, 2.1)])
def test_a_peer_that_changed_by_itself_is_no_measure_of_the_machine(machine, ratio):
    def rows(ours: float, eager: float, rate: float) -> list:
        copied = dataclasses.replace(timed("copy", rate), metric=COPY_RATE)
        return [timed("bti_fast", ours), timed("eager", eager), copied]

    # Eager takes half; so does the machine in the second case, where our slowdown by 2.1 is hidden by it.
    (change,) = changes(rows(2.0, 10.0, 20.0), rows(2.1, 5.0, 20.0 / machine))
    assert change.ratio == pytest.approx(ratio) and change.slower(0.15) == (machine == 0.5)
    assert "against eager, copy, by which" in str(change)


def test_only_some_slow_samples_are_noise():
    slow = [
        dataclasses.replace(r, p20=2.0) if r.provider == "bti_fast" and r.metric == "ms" else r
        for r in table(2.6)
    ]
    assert not changes(table(2.0), slow)[0].slower(0.15)


def test_times_of_a_busy_machine_are_not_judged(tmp_path, capsys):
    busy = [dataclasses.replace(row, note=f"{BUSY_NOTE}: lost") for row in table(4.0)]
    paths = files(tmp_path, table(2.0), busy)
    assert main(["--compare", *paths]) == 0
    assert "note: 1 times were taken on a busy machine and are not judged" in capsys.readouterr().out


def test_memory_counts_without_peers(tmp_path, capsys):
    paths = files(tmp_path, table(2.0, mb=20), table(2.0, mb=26))
    assert main(["--compare", *paths]) == 1
    assert "LARGER" in capsys.readouterr().out


def test_without_a_common_peer_times_count_as_they_are():
    (change,) = changes([timed("bti_fast", 2.0)], [timed("bti_fast", 3.0)])
    assert change.ratio == pytest.approx(1.5) and change.peers == () and change.slower(0.15)


def test_nothing_in_common_is_one_line(tmp_path, capsys):
    paths = files(tmp_path, table(2.0), table(2.0, size="1x1"))
    with pytest.raises(UserError):
        changes(table(2.0), table(2.0, size="1x1"))
    assert main(["--compare", *paths]) == 2
    assert capsys.readouterr().err == (
        "bti-fast benchmark: --compare: the two tables have no case of bti_fast in common\n"
    )


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_file_that_is_no_table_is_named(tmp_path, capsys, text):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(text)
    assert main(["--compare", str(wrong), str(wrong)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wrong.csv: not a benchmark table; columns missing: bti_fast" in error
