"""The published BTI-Net's architecture in plain Keras: seconds and peak memory on this machine, a peer for
``bti_fast.benchmarks.network``.

``python benchmarks/keras_network.py``, in an environment with TensorFlow (``pip install tensorflow-cpu``);
it needs nothing of bti_fast. Layers, layout (NHWC, float32) and parameters are the published code's, written
anew from its saved model. The training step leaves out the boundary and texture terms of the mask loss.

``--beside PYTHON`` names a Python that has bti_fast: TensorFlow's network and that one's then take turns,
step by step, and the ratio is the median of those within a turn, which other users of a machine change least.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

Tensor = Any  # a keras.KerasTensor; shapes are (B, H, W, C) for maps and (B, F) for vectors
INFERENCE, TRAINING = "inference", "training step"
WARM_UP = 2  # the first traces, too
OURS = ((INFERENCE, "folded"), (TRAINING, "bti_fast"), (TRAINING, "checkpointing"))  # beside tf.function
# Keras 3 lets XLA compile predict_on_batch; --xla does so for the others.
CASES = ((INFERENCE, "tf.function"), (INFERENCE, "predict_on_batch"), (TRAINING, "tf.function"))
FEATURES = 256  # of the classification decoder
TAU = 0.7
DROPOUT = 0.3
BN = {"epsilon": 1e-3, "momentum": 0.99}
TAPS = [f"block{stage}a_expand_activation" for stage in (2, 3, 4, 6)] + ["top_activation"]


def separable(
    x: Tensor, channels: int, name: str, dilation: int = 1, activation: str | None = None
) -> Tensor:
    """Depthwise 3x3 without bias, then pointwise with one."""
    from keras import layers

    return layers.SeparableConv2D(
        channels, 3, padding="same", dilation_rate=dilation, activation=activation, name=name
    )(x)


def multi_scale_fusion(x: Tensor, name: str) -> Tensor:
    """Three dilations weighted by a softmax of the spatial mean, then a pointwise convolution."""
    from keras import layers, ops

    channels = x.shape[-1]
    scales = [separable(x, channels, f"{name}.sep_d{dilation}", dilation) for dilation in (1, 2, 4)]
    pooled = layers.GlobalAveragePooling2D()(x)
    hidden = layers.Dense(channels // 8, activation="relu", name=f"{name}.scale_fc1")(pooled)
    weights = layers.Dense(3, activation="softmax", name=f"{name}.scale_fc2")(hidden)
    weights = ops.reshape(weights, (-1, 1, 1, 3))
    fused = sum(weights[..., i : i + 1] * scale for i, scale in enumerate(scales))
    return layers.Conv2D(channels, 1, name=f"{name}.fusion")(fused)


def dual_path_attention(x: Tensor, name: str) -> Tensor:
    """x times a weight for each channel and one for each position."""
    from keras import layers, ops

    channels = x.shape[-1]
    pooled = layers.GlobalAveragePooling2D()(x)
    hidden = layers.Dense(max(8, channels // 16), activation="relu", name=f"{name}.channel_fc1")(pooled)
    channel = layers.Dense(channels, activation="sigmoid", name=f"{name}.channel_fc2")(hidden)
    both = ops.concatenate([ops.max(x, -1, keepdims=True), ops.mean(x, -1, keepdims=True)], -1)
    spatial = layers.Conv2D(1, 7, padding="same", activation="sigmoid", name=f"{name}.spatial")(both)
    return x * ops.reshape(channel, (-1, 1, 1, channels)) * spatial


def residual_block(x: Tensor, channels: int, name: str, attention: bool) -> Tensor:
    """Two separable convolutions with BatchNorm, the fusion, attention where asked for, and the shortcut."""
    from keras import layers, ops

    out = separable(x, channels, f"{name}.conv1", activation="relu")
    out = layers.BatchNormalization(**BN, name=f"{name}.bn1")(out)
    out = separable(out, channels, f"{name}.conv2")
    out = layers.BatchNormalization(**BN, name=f"{name}.bn2")(out)
    out = multi_scale_fusion(out, f"{name}.msf")
    if attention:
        out = dual_path_attention(out, f"{name}.att")
    shortcut = x if x.shape[-1] == channels else layers.Conv2D(channels, 1, name=f"{name}.proj")(x)
    return ops.relu(out + shortcut)


def attention_gate(x: Tensor, g: Tensor, channels: int, name: str) -> Tensor:
    """The skip connection x, weighted at each position by what it and the decoder hold; equal sizes."""
    from keras import layers, ops

    both = layers.Conv2D(channels, 1, name=f"{name}.x_transform")(x)
    both = ops.relu(both + layers.Conv2D(channels, 1, name=f"{name}.g_transform")(g))
    context = separable(separable(both, channels, f"{name}.ctx_sep_d1"), channels, f"{name}.ctx_sep_d2", 2)
    return x * layers.Conv2D(1, 1, activation="sigmoid", name=f"{name}.ctx_out")(context)


def task_interaction(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """TIM: the enhanced map and features."""
    from keras import layers, ops

    channels = x.shape[-1]
    hidden = layers.Conv2D(channels // 2, 1, activation="relu", name=f"{name}.s2c_conv")(x)
    context = layers.GlobalAveragePooling2D()(hidden)
    context = layers.Dense(FEATURES, activation="relu", name=f"{name}.s2c_fc")(context)
    context = layers.BatchNormalization(**BN, name=f"{name}.s2c_bn")(context)
    y_enhanced = y + layers.Dense(FEATURES, activation="sigmoid", name=f"{name}.clf_gate")(context) * context
    prior = layers.Dense(channels, activation="sigmoid", name=f"{name}.c2s_fc")(y)
    pooled = layers.GlobalAveragePooling2D()(x)
    gate = layers.Dense(channels, activation="sigmoid", name=f"{name}.seg_gate")(pooled)
    return x * (1 + TAU * ops.reshape(gate * prior, (-1, 1, 1, channels))), y_enhanced


def uncertainty_proxy_attention(
    x: Tensor, x_enhanced: Tensor, y: Tensor, y_enhanced: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """UPA: how much of TIM's enhancement is let through, by three signals."""
    from keras import layers, ops

    def unit(v: Tensor) -> Tensor:
        return v * ops.rsqrt(ops.maximum(ops.sum(v * v, -1, keepdims=True), 1e-12))

    dx, dy = x_enhanced - x, y_enhanced - y
    pooled = layers.GlobalAveragePooling2D()(dx)
    of_map = layers.Dense(64, use_bias=False, name=f"{name}.seg_proj")(pooled)
    of_features = layers.Dense(64, use_bias=False, name=f"{name}.clf_proj")(dy)
    align = ops.sum(unit(of_map) * unit(of_features), -1, keepdims=True)
    rows = ops.pad(ops.abs(x[:, 1:] - x[:, :-1]), [(0, 0), (0, 1), (0, 0), (0, 0)])
    columns = ops.pad(ops.abs(x[:, :, 1:] - x[:, :, :-1]), [(0, 0), (0, 0), (0, 1), (0, 0)])
    complexity = ops.reshape(ops.mean(rows + columns, (1, 2, 3)), (-1, 1))
    confidence = ops.log1p(ops.var(y_enhanced, -1, keepdims=True))
    signals = ops.concatenate([align, complexity, confidence], -1)
    hidden = layers.Dense(32, activation="relu", name=f"{name}.wn_fc1")(signals)
    w = layers.Dense(2, activation="sigmoid", name=f"{name}.wn_fc2")(hidden)
    return x + ops.reshape(w[:, 0], (-1, 1, 1, 1)) * dx, y + w[:, 1:] * dy


def network(size: int = 224, classes: int = 3) -> Any:
    """The keras.Model with random weights: images (B, size, size, 3) in 0..255 -> probabilities
    (B, size, size, 1) and (B, classes).

    size is a multiple of 32, at least 128.
    """
    import keras
    from keras import layers

    image = keras.Input((size, size, 3))
    encoder = keras.applications.EfficientNetB4(include_top=False, weights=None, input_tensor=image)
    taps = [encoder.get_layer(tap).output for tap in TAPS]
    names = ("s1", "s2", "s3", "s4", "bridge")
    maps = [
        residual_block(tap, tap.shape[-1], f"bti_res_{name}", attention=True)
        for tap, name in zip(taps, names, strict=True)
    ]
    x, tokens = maps[4], []
    for level, channels in enumerate((384, 192, 96, 48), start=1):
        skip, source = maps[4 - level], maps[5 - level]
        up_name = "conv2d_transpose" + (f"_{level - 1}" if level > 1 else "")
        up = layers.Conv2DTranspose(channels, 3, strides=2, padding="same", name=up_name)(x)
        gated = attention_gate(skip, up, channels // 2, f"att_gate_d{level}")
        x = layers.Concatenate()([up, gated])
        x = layers.Dropout(DROPOUT)(residual_block(x, channels, f"bti_res_d{level}", attention=False))
        pooled = layers.GlobalAveragePooling2D()(source)
        y = layers.Dense(FEATURES, activation="relu", name=f"clf_d{level}_features")(pooled)
        x_enhanced, y_enhanced = task_interaction(x, y, f"task_interaction_d{level}")
        x, y = uncertainty_proxy_attention(x, x_enhanced, y, y_enhanced, f"upa_d{level}")
        tokens.append(y)
    x = layers.Conv2DTranspose(24, 3, strides=2, padding="same", name="conv2d_transpose_4")(x)
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv2d_8")(x)
    mask = layers.Conv2D(1, 1, activation="sigmoid", name="segmentation_output")(x)
    y = layers.Concatenate()([layers.GlobalAveragePooling2D()(m) for m in maps[1:]] + tokens)
    y = layers.Dense(FEATURES, activation="relu", name="dense_44")(y)
    y = layers.Dropout(DROPOUT)(layers.BatchNormalization(**BN, name="batch_normalization_4")(y))
    label = layers.Dense(classes, activation="softmax", name="classification_output")(y)
    return keras.Model(image, [mask, label])


def main(arguments: list[str] | None = None) -> int:
    """Runs every case in a fresh process, so that each peak of memory is its own; 2 without TensorFlow."""
    options = parse(arguments)
    if options.one:
        mode, call = options.one.split(",")
        print(json.dumps(measure(options, mode, call)))
        return 0
    if importlib.util.find_spec("tensorflow") is None:
        needed = "needed: pip install tensorflow-cpu"
        print(f"keras_network: TensorFlow is not installed in {sys.prefix}, {needed}", file=sys.stderr)
        return 2
    shape, xla = f"{options.batch}x{options.size}x{options.size}x3", ", XLA" if options.xla else ""
    print(f"published architecture, efficientnet-b4, {shape}, {options.threads} threads{xla}")
    if options.beside:
        take_turns(options, sys.argv[1:] if arguments is None else arguments)
        return 0
    print(f"{'mode':14} {'call':17} {'oneDNN':6} {'median s':>9} {'min-max':>15} {'peak GB':>8}")
    for mode, call in CASES:
        # A training step needs batch statistics, which one image does not have.
        if mode not in options.modes or (mode == TRAINING and options.batch == 1):
            continue
        for onednn in ("on", "off") if options.onednn == "both" else (options.onednn,):
            row = in_fresh_process(sys.argv[1:] if arguments is None else arguments, mode, call, onednn)
            span = f"{row['min']:.2f}-{row['max']:.2f}"
            line = f"{mode:14} {call:17} {onednn:6} {row['median']:9.2f} {span:>15} {row['peak']:8.2f}"
            print(line, flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="keras_network", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="side of the square images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after two to warm up")
    parser.add_argument("--modes", nargs="+", choices=(INFERENCE, TRAINING), default=[INFERENCE, TRAINING])
    parser.add_argument("--onednn", choices=("on", "off", "both"), default="both", help="TensorFlow's oneDNN")
    parser.add_argument("--xla", action="store_true", help="let XLA compile every tf.function")
    parser.add_argument(
        "--beside", metavar="PYTHON", help="take turns with the network of bti_fast, as this has it"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--on-request", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("batch", "threads", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: found {getattr(options, name)}, needed at least 1")
    if options.size < 128 or options.size % 32:
        parser.error(f"--size: found {options.size}, needed a multiple of 32 that is at least 128")
    return options


def in_fresh_process(arguments: list[str], mode: str, call: str, onednn: str) -> dict[str, float]:
    """One case: {"median", "min", "max": seconds, "peak": GiB of resident memory}."""
    command = [sys.executable, __file__, *arguments, "--one", f"{mode},{call}"]
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment(onednn == "on")
    )
    return json.loads(found.stdout.splitlines()[-1])


def environment(onednn: bool) -> dict[str, str]:
    """That of a process with TensorFlow."""
    return {**os.environ, "TF_ENABLE_ONEDNN_OPTS": str(int(onednn)), "TF_CPP_MIN_LOG_LEVEL": "2"}


def take_turns(options: argparse.Namespace, arguments: list[str]) -> None:
    """Prints both networks' seconds and memory, and the ratio of each to TensorFlow's in the same turns."""
    print(f"{'mode':14} {'network':13} {'median s':>9} {'min-max':>15} {'peak GB':>8} {'of TensorFlow':>14}")
    for mode, provider in OURS:
        if mode not in options.modes or (mode == TRAINING and options.batch == 1):
            continue
        theirs = [sys.executable, __file__, *arguments, "--one", f"{mode},tf.function", "--on-request"]
        ours = [options.beside, "-m", "bti_fast.benchmarks.network", "--on-request"]
        ours += ["--one", f"proxy,{mode},{provider}"]
        for name in ("size", "batch", "threads"):
            ours += [f"--{name}", str(getattr(options, name))]
        networks = {
            "TensorFlow": asked(theirs, environment(options.onednn != "off")),
            provider: asked(ours, dict(os.environ)),
        }
        times = {name: [] for name in networks}
        for _ in range(options.repeats):
            for name, process in networks.items():
                times[name].append(float(answer(process)))
        for name, process in networks.items():
            found = json.loads(process.communicate()[0].splitlines()[-1])
            ratio = statistics.median(
                own / other for own, other in zip(times[name], times["TensorFlow"], strict=True)
            )
            span = f"{found['min']:.2f}-{found['max']:.2f}"
            line = f"{mode:14} {name:13} {found['median']:9.3f} {span:>15} {found['peak']:8.2f} {ratio:14.2f}"
            print(line, flush=True)


def asked(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """A process that times a step for each line it is sent, warm."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise SystemExit(f"keras_network: {' '.join(command)} ended with {process.wait()} before its first step")


def answer(process: subprocess.Popen[str]) -> str:
    """Seconds of the next step."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def measure(options: argparse.Namespace, mode: str, call: str) -> dict[str, float]:
    """The case in this process."""
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    keras.utils.set_random_seed(0)
    model = network(options.size)
    pixels = (options.batch, options.size, options.size)
    image_array = np.random.rand(*pixels, 3).astype("float32") * 255
    image = tf.constant(image_array)
    mask = tf.constant((np.random.rand(*pixels, 1) > 0.9).astype("float32"))
    label = tf.one_hot(np.arange(options.batch) % 3, 3)
    optimizer = keras.optimizers.Adam(1e-4, global_clipnorm=1.0)
    if mode == TRAINING:
        optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=options.xla)
    def forward(image: tf.Tensor) -> list[tf.Tensor]:
        return model(image, training=False)

    @tf.function(jit_compile=options.xla)
    def train(image: tf.Tensor, mask: tf.Tensor, label: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(*model(image, training=True), mask, label)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    def step() -> None:
        if mode == TRAINING:
            train(image, mask, label)
            model.trainable_variables[0].numpy()  # waits for the step
        elif call == "predict_on_batch":
            model.predict_on_batch(image_array)
        else:
            [out.numpy() for out in forward(image)]

    for _ in range(WARM_UP):
        step()
    times = []
    for _ in requests() if options.on_request else range(options.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        if options.on_request:
            print(times[-1], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "peak": peak}


def requests() -> Iterator[str]:
    """Lines of the standard input: one for each step that is to be timed."""
    print("ready", flush=True)
    yield from sys.stdin


def loss_of(prob: Any, classes: Any, mask: Any, label: Any) -> Any:
    """Focal Tversky with the size boost and focal cross-entropy (γ = 2), weighted 0.8 and 0.2; a scalar."""
    import tensorflow as tf

    plane, eps = (1, 2, 3), 1e-7
    index = tf.reduce_sum(mask * prob, plane) + eps
    index /= 0.5 * (tf.reduce_sum(mask, plane) + tf.reduce_sum(prob, plane)) + eps
    boost = 1 + tf.exp(-10 * tf.reduce_mean(mask, plane))
    segmentation = tf.maximum(1 - index, eps) ** 0.75 * boost
    right = tf.reduce_sum(tf.clip_by_value(classes, eps, 1 - eps) * label, -1)
    return tf.reduce_mean(0.8 * segmentation - 0.2 * (1 - right) ** 2 * tf.math.log(right))


if __name__ == "__main__":
    raise SystemExit(main())
