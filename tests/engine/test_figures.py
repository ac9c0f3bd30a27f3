"""Figures: what the numbers are is the metrics' business, what can be told apart is checked here."""

from bti_fast.engine.figures import risk_coverage, roc


def test_no_two_lines_look_alike():
    found = {f"signal {n}": {"coverage": [0.5, 1.0], "risk": [0.1, 0.2], "aurc": 0.15} for n in range(14)}
    lines = risk_coverage(found).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 14
    curve = {"fpr": [0, 1], "tpr": [0, 1], "auc": 0.5}
    classes = roc({f"class {n}": curve for n in range(10)}).axes[0].lines[1:]
    assert len({(line.get_color(), line.get_linestyle()) for line in classes}) == len(classes) == 10
