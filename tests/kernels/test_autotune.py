"""Launch shapes: which entry of the table serves which device, and what autotuning measures and remembers."""

import json

import pytest
import torch

pytest.importorskip("triton")

from bti_fast.kernels.launch import Tile  # noqa: E402

from bti_fast.kernels import autotune, launch, tiles  # noqa: E402

OURS, FAST = Tile(4096, 4), Tile(1024, 8)
X = torch.zeros(3, 5, 7, 9)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", {})


class Device:
    """A device whose times are given; counts what it was asked."""

    def __init__(self, times):
        self.times, self.asked = times, []

    def timer(self, call):
        self.asked.append(call())
        return self.times.get(self.asked[-1], 9.0)

    def tune(self, key="kernel on this"):
        return autotune.tuned(key, OURS, lambda tile: tile, self.timer)


def test_the_fastest_is_measured_once_and_kept(monkeypatch):
    device = Device({OURS: 2.0, FAST: 1.0})
    assert device.tune() == FAST
    assert sorted(device.asked) == sorted({OURS, *autotune.CANDIDATES})
    assert json.loads(autotune.cache_file().read_text()) == {"kernel on this": [1024, 8]}
    monkeypatch.setattr(autotune, "_chosen", {})  # as another process begins
    later = Device({})
    assert later.tune() == FAST and later.asked == []
    assert later.tune("kernel on that") == OURS and later.asked != []
    assert set(autotune.read(autotune.cache_file())) == {"kernel on this", "kernel on that"}


def test_within_two_percent_the_table_stands():
    assert Device({OURS: 1.0, FAST: 0.99}).tune() == OURS


def test_what_does_not_fit_is_passed_over():
    device = Device({OURS: 2.0, FAST: 1.0})

    def run(tile):
        if tile == FAST:
            raise autotune.triton.runtime.errors.OutOfResources(999, 99, "shared memory")
        return tile

    assert autotune.tuned("kernel", OURS, run, device.timer) == OURS


def test_a_graph_under_capture_gets_the_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = Device({FAST: 1.0})
    assert device.tune() == OURS and device.asked == [] and not autotune.cache_file().exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert device.tune() == FAST


@pytest.mark.parametrize("text", ("", "[1]", '{"kernel on this": 3}', '{"kernel on this": [1, 2, 3]}'))
def test_a_broken_file_is_replaced(text, caplog):
    autotune.cache_file().parent.mkdir(parents=True)
    autotune.cache_file().write_text(text)
    assert Device({FAST: 1.0}).tune() == FAST
    assert "not a file of launch shapes" in caplog.text
    assert autotune.read(autotune.cache_file()) == {"kernel on this": FAST}


def test_where_nothing_can_be_written_it_still_runs(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Device({FAST: 1.0}).tune() == FAST
    assert "not kept" in caplog.text


def test_only_where_it_is_asked_for(monkeypatch):
    def never(tile):
        raise AssertionError("measured")

    for value in ("0", "1"):  # asked for, but with nothing to measure on
        monkeypatch.setenv("BTI_FAST_AUTOTUNE", value)
        assert autotune.tile_for("modulate", X, 1, never) == launch.entry(launch.TILES["modulate"], X.device)


def test_what_a_choice_holds_for():
    key = autotune.key_of("modulate", X, 1)
    assert autotune.key_of("modulate", torch.zeros(3, 6, 9, 9), 1) == key  # 5 and 6 round to 8, P to 256
    others = [
        autotune.key_of("gated_fusion", X, 1),
        autotune.key_of("modulate", X.half(), 1),
        autotune.key_of("modulate", X, 2),
        autotune.key_of("modulate", torch.zeros(3, 9, 7, 9), 1),
        autotune.key_of("modulate", torch.zeros(5, 5, 7, 9), 1),
    ]
    assert len({key, *others}) == 6
    for part in ("cpu", "float32", torch.__version__, autotune.triton.__version__):
        assert part in key


@pytest.mark.parametrize(
    ("capability", "name"),
    (((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_100")),
)
def test_whose_entries_serve_a_device(capability, name, monkeypatch):
    launch._nvidia.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert launch.architecture(torch.device("cuda", 0)) == name
    monkeypatch.setattr(tiles, "for_amd", lambda: True)
    assert launch.architecture(torch.device("cuda", 0)) == "gfx942"
    launch._nvidia.cache_clear()


def test_every_row_has_an_entry_for_every_architecture():
    for table in (launch.TILES, launch.SUMS, launch.INPUT_GRADIENT):
        assert all(len(row) == len(launch.ARCHITECTURES) for row in table.values())
