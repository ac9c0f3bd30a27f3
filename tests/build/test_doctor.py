"""The doctor's report: complete, honest, and ready for JSON."""

import json

import torch

from bti_fast import _library, doctor
from bti_fast.ops import OPERATORS


def test_report_covers_every_operator_and_backend():
    state = doctor.report()
    json.dumps(state)
    assert set(state["operators"]) == set(OPERATORS)
    for name, devices in state["operators"].items():
        choice = devices["cpu"]
        assert set(choice["backends"]) == set(OPERATORS[name].backends)
        assert choice["backends"][choice["chosen"]] is None
    assert state["versions"]["torch"] == torch.__version__
    assert state["libraries"]["cpu"]["loaded"] == (_library.load("cpu") is None)


def test_text_gives_the_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(_library, "_outcome", {})
    record = {"native_reason": "no C++ compiler found", "cuda_reason": "y"}
    (tmp_path / "build.json").write_text(json.dumps(record))
    text = doctor.render()
    assert "no: the compiled cpu library is not there" in text and "no C++ compiler found" in text
    assert "entropy_uncertainty on cpu: reference" in text


def test_a_broken_package_is_reported(monkeypatch):
    state = doctor.report()
    state["operators"] = {"error": "ImportError: half of it is gone"}
    assert "unavailable: ImportError: half of it is gone" in doctor.render(state)
