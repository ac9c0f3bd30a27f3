"""Rows survive the CSV file; ratios, losses, shares and exponents come out as computed by hand."""

from __future__ import annotations

import csv
import dataclasses

import pytest

from benchmarks.rows import COLUMNS, EXTRA, SKIPPED, gains, losses, read, save
from benchmarks.scaling import exponent, fits
from benchmarks.whole_network import shares

from .made_rows import ROW, table, timed


def test_columns_and_round_trip(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [*table(2.0), dataclasses.replace(ROW, provider="sdpa cudnn", metric=SKIPPED, note="no GPU, here")]
    save(path, rows)
    with open(path, newline="") as file:
        header = next(csv.reader(file))
    assert header == COLUMNS
    needed = "kernel provider mode metric size p20 p50 p80 gb_per_s roofline device torch bti_fast commit"
    assert set(needed.split()) <= set(header)
    assert read(path) == rows


def test_a_case_measured_again_replaces_all_of_its_rows(tmp_path):
    path = tmp_path / "rows.csv"
    save(path, table(2.0) + table(5.0, size="other"))
    again = [timed("bti_fast", 1.0, run="second"), timed("eager", 9.0, run="second")]
    kept = save(path, again)
    assert [row for row in kept if row.size == ROW.size] == again
    assert [row for row in kept if row.size == "other"] == table(5.0, size="other")


def test_gains_are_geometric_means_within_a_run():
    rows = table(2.0) + table(0.5, size="large") + [timed("eager", 1e6, run="another")]
    found = {gain.peer: gain for gain in gains(rows)}
    assert found["eager"].mean == pytest.approx(10.0)  # of 5 and 20
    assert (found["eager"].worst, found["eager"].worst_size) == (pytest.approx(5.0), ROW.size)
    assert found["compile"].mean == pytest.approx(4.0) and found["compile"].cases == 2


def test_the_best_of_the_attention_calls_is_the_peer():
    rows = [timed("bti_fast", 2.0), timed("sdpa", 5.0), timed("sdpa math", 9.0), timed("sdpa flash", 4.0)]
    assert [(gain.peer, gain.mean) for gain in gains(rows)] == [("best sdpa", pytest.approx(2.0))]


def test_every_loss_is_listed_worst_first():
    rows = table(5.0) + table(3.0, size="won") + table(20.0, size="lost")
    found = [(loss.row.size, loss.peer.provider, round(loss.ratio, 3)) for loss in losses(rows)]
    assert found == [("lost", "compile", 0.2), ("lost", "eager", 0.5), (ROW.size, "compile", 0.8)]
    assert losses([timed("bti_fast", 1.02), timed("eager", 1.0)])[0].within_spread


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponents_of_known_costs(power):
    assert exponent((x, 3e-4 * x**power) for x in (784, 3136, 12544)) == pytest.approx(power, abs=1e-9)
    rows = [timed("bti_fast", 0.1 * x**power, group="sweep batch", x=float(x)) for x in (1, 2, 4, 8)]
    rows += [dataclasses.replace(row, metric=EXTRA) for row in rows]
    (fit,) = fits(rows + table(2.0))
    assert fit.exponent == pytest.approx(power, abs=1e-9) and len(fit.points) == 4


def test_one_size_has_no_exponent():
    with pytest.raises(ValueError, match="two different sizes"):
        exponent([(3, 1.0), (3, 2.0)])


def test_share_of_the_interaction_is_a_difference():
    size = "efficientnet-b4 8x3x224x224"
    rows = [
        timed("bti_fast", ms, kernel="BTINet", mode="training step", size=f"{size} {name}")
        for name, ms in (("none", 9700.0), ("proxy", 10000.0))
    ]
    ((row, share),) = shares(rows)
    assert row.size.endswith("proxy") and share == pytest.approx(0.03)
