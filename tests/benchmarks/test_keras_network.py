import importlib.util

import numpy as np
import pytest

from benchmarks import keras_network
from bti_fast.models.convert import GATE, RESIDUAL, TIM, UPA
from bti_fast.models.keras_file import KerasFile

INSIDE = RESIDUAL | GATE | TIM | UPA


def test_without_tensorflow_it_says_so_in_one_line(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorflow" else found(name, *rest)
    )
    assert keras_network.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "TensorFlow is not installed" in err and "pip install tensorflow-cpu" in err


@pytest.mark.parametrize(
    "flags, named", [(["--size", "200"], "--size: found 200"), (["--batch", "0"], "--batch: found 0")]
)
def test_bad_options_are_named(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        keras_network.main(flags)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_the_published_network(shared_dir):
    """Parameters, and outputs with the weights of the recorded file, where TensorFlow is installed."""
    pytest.importorskip("tensorflow")
    model = keras_network.network()
    assert model.count_params() == 57_557_647
    assert sum(np.prod(w.shape) for w in model.trainable_weights) == 57_413_304
    file = KerasFile(shared_dir / "golden" / "full" / "official.keras")
    for layer in (layer for layer in model.layers if layer.weights):
        outer, _, inner = layer.name.partition(".")
        arrays = file.arrays(outer, INSIDE[inner] if inner else "")
        if outer == "normalization":  # the recorded graph scales once more, after it
            arrays[1] = arrays[1] / np.square(file.layers["rescaling_1"].config["scale"])
        layer.set_weights(arrays)
        if outer == "normalization":
            layer.finalize_state()
    assert not list(file.unread())
    expected = np.load(shared_dir / "golden" / "full" / "expected.npz")
    mask, label = model(expected["x255"].transpose(0, 2, 3, 1).astype("float32"), training=False)
    for found, truth in (
        (mask.numpy().transpose(0, 3, 1, 2), expected["x255.seg"]),
        (label.numpy(), expected["x255.clf"]),
    ):
        assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()
