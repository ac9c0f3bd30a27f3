"""Synthetic ultrasound-like images with benign, malignant, or no lesions, made on demand."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bti_fast.data.resize import as_size
from bti_fast.errors import UserError

CLASSES = ("normal", "benign", "malignant")
MANIFEST = "manifest.csv"
_SMALLEST = 16


def make_phantoms(
    folder: str | Path,
    count: int,
    size: int | tuple[int, int] = 128,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
) -> Path:
    """Write `count` phantoms to folder/images, their masks (0/255) to folder/masks, and folder/manifest.csv.

    Classes take turns. Image i depends on (seed, i, its class, size) only, so a longer run repeats a
    shorter one bit for bit. The manifest is written last. Returns the folder, which `read_dataset` reads.
    Raises UserError for a bad count, size, seed or class, and where the folder cannot be written.
    """
    if count < 1:
        raise UserError(f"phantom count is {count}; needs at least 1")
    height, width = as_size(size)
    if min(height, width) < _SMALLEST:
        raise UserError(f"phantom size is {height} x {width}; needs at least {_SMALLEST} x {_SMALLEST}")
    if seed < 0:
        raise UserError(f"seed is {seed}; needs a number from 0 up")
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or not classes:
        raise UserError(f"phantom classes are {tuple(classes)}; needs some of {', '.join(CLASSES)}")
    folder = Path(folder)
    try:
        _write(folder, count, (height, width), seed, tuple(classes))
    except OSError as cause:
        raise UserError(f"{folder}: cannot write phantoms ({cause.strerror or cause})") from cause
    return folder


def _write(folder: Path, count: int, size: tuple[int, int], seed: int, classes: tuple[str, ...]) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    digits = max(4, len(str(count - 1)))
    rows = []
    for i in range(count):
        label = classes[i % len(classes)]
        image, mask = phantom(label, size, np.random.default_rng((seed, i)))
        name = f"phantom_{i:0{digits}d}.png"
        Image.fromarray(image).save(folder / "images" / name)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / name)
        rows.append((f"images/{name}", f"masks/{name}", label))
    partial = folder / (MANIFEST + ".part")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([("image", "mask", "class"), *rows])
    os.replace(partial, folder / MANIFEST)


def phantom(label: str, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One phantom of a class: grey uint8 (H, W) and its lesion mask, bool (H, W).

    A tissue map (skin, fat lobules, gland, muscle) and the lesion give echo strength; attenuation along each
    beam gives shadow or enhancement; Rayleigh speckle and log compression give the texture.
    """
    height, width = size
    depth, lateral = np.meshgrid(
        (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij"
    )
    echo, boundaries = _tissue(depth, lateral, rng)
    beam = _beams(depth, lateral, boundaries, rng)
    mask = np.zeros(size, dtype=bool)
    if label != "normal":
        mask = _lesion(label, depth, lateral, echo, beam, rng)
    envelope = _speckle(size, rng) * 10 ** ((echo + beam) / 20)
    return _compress(envelope, depth, rng), mask


def _smooth_noise(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of unit variance, smooth over `scale` pixels (rows, columns), periodic."""
    rows = np.fft.fftfreq(size[0])[:, None] * scale[0]
    columns = np.fft.rfftfreq(size[1])[None] * scale[1]
    spectrum = np.fft.rfft2(rng.standard_normal(size)) * np.exp(-2 * np.pi**2 * (rows**2 + columns**2))
    field = np.fft.irfft2(spectrum, size)
    return (field - field.mean()) / max(field.std(), 1e-9)


def _curve(lateral: np.ndarray, bend: float, rng: np.random.Generator) -> np.ndarray:
    """A slowly waving offset (1, W) for a layer's boundary, of about `bend` image heights."""
    x = lateral[:1]
    waves = [np.sin(2 * np.pi * (k * x + rng.random())) * rng.standard_normal() / k for k in (0.5, 1, 2)]
    return bend * sum(waves)


def _tissue(depth: np.ndarray, lateral: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Echo strength in dB (H, W) of skin, fat, gland and muscle, and where the layers end."""
    size = depth.shape
    skin = rng.uniform(0.03, 0.06) + _curve(lateral, 0.004, rng)
    fat = rng.uniform(0.15, 0.32) + _curve(lateral, 0.03, rng)
    gland = rng.uniform(0.66, 0.85) + _curve(lateral, 0.03, rng)
    lobules = _smooth_noise(size, (0.035 * size[0], 0.06 * size[1]), rng)
    strands = _smooth_noise(size, (0.015 * size[0], 0.07 * size[1]), rng)
    fat_echo = -12 + 2.5 * lobules + 8 * np.exp(-((lobules / 0.18) ** 2)) * rng.uniform(0.3, 1)
    sheets = _smooth_noise(size, (0.02 * size[0], 0.12 * size[1]), rng)
    ridges = rng.uniform(3, 9) * np.exp(-((sheets / 0.15) ** 2))
    gland_echo = (
        rng.uniform(-7, -3) + 2.2 * strands + ridges - rng.uniform(1, 6) * np.clip(lobules - 0.6, 0, 1.5)
    )
    fibres = np.sin(2 * np.pi * (depth * rng.uniform(12, 20) + _curve(lateral, 0.8, rng)))
    muscle_echo = -13 + 2 * fibres + 1.5 * strands + 1.2 * ridges
    echo = np.where(depth < fat, fat_echo, np.where(depth < gland, gland_echo, muscle_echo))
    _lobule(depth, lateral, echo, rng)
    echo = np.where(depth < skin, 0.0, echo)
    for edge, strength in ((skin, 6.0), (gland, rng.uniform(3, 8))):
        echo = echo + strength * np.exp(-(((depth - edge) / 0.012) ** 2))
    return echo, {"fat": fat, "gland": gland}


def _lobule(depth: np.ndarray, lateral: np.ndarray, echo: np.ndarray, rng: np.random.Generator) -> None:
    """Sometimes a dark, blurred fat lobule or duct (echo changed in place), which is no lesion."""
    for _ in range(rng.integers(0, 3)):
        y = (depth - rng.uniform(0.2, 0.8)) / rng.uniform(0.03, 0.09)
        x = (lateral - rng.random()) / rng.uniform(0.06, 0.2)
        x = x + rng.uniform(-0.8, 0.8) * y
        echo -= rng.uniform(2, 7) * np.exp(-((y**2 + x**2) ** 2))


def _beams(depth: np.ndarray, lateral: np.ndarray, boundaries: dict, rng: np.random.Generator) -> np.ndarray:
    """Gain in dB (H, W) along the beams: attenuation, poor contact, and shadows that belong to no lesion."""
    gain = -rng.uniform(6, 22) * np.clip(depth - 0.2, 0, None) / 0.8
    gain = gain - rng.uniform(0, 5) * np.clip(np.abs(lateral - rng.uniform(0.4, 0.6)) - 0.3, 0, None) / 0.2
    for _ in range(rng.integers(0, 3)):
        start = boundaries["fat"] * rng.uniform(0.9, 1.6)
        column = np.exp(-(((lateral - rng.random()) / rng.uniform(0.02, 0.06)) ** 2))
        gain = gain - rng.uniform(2, 7) * column * np.clip((depth - start) / 0.1, 0, 1)
    return gain


def _lesion(label: str, depth, lateral, echo, beam, rng: np.random.Generator) -> np.ndarray:
    """Draw a lesion into echo and beam (both changed in place) and return its mask.

    Benign: oval, wider than tall, smooth, even, thin capsule, enhancement behind it. Malignant: taller,
    spiculated, uneven, bright halo, shadow behind it. Strengths overlap so that no single sign decides.
    """
    benign = label == "benign"
    height, width = depth.shape
    radius = rng.uniform(0.07, 0.19)
    stretch = rng.uniform(1.15, 1.9) if benign else rng.uniform(0.75, 1.3)
    radius_y, radius_x = radius / np.sqrt(stretch), radius * np.sqrt(stretch) * height / width
    radius_x = min(radius_x, 0.3)
    centre_y = rng.uniform(0.28 + radius_y / 2, 0.68)
    centre_x = rng.uniform(radius_x + 0.06, 0.94 - radius_x)
    tilt = rng.normal(0, 0.15 if benign else 0.4)
    y, x = (depth - centre_y) / radius_y, (lateral - centre_x) / radius_x
    y, x = np.cos(tilt) * y - np.sin(tilt) * x, np.sin(tilt) * y + np.cos(tilt) * x
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    outline = _outline(angle, benign, rng)
    # Signed distance to the outline, in units of the image's height; negative inside.
    outside = (distance - outline) * radius
    soft = rng.uniform(0.004, 0.009) if benign else rng.uniform(0.008, 0.02)
    inside = 1 / (1 + np.exp(np.clip(outside / soft, -50, 50)))
    depression = rng.uniform(7, 18) if benign else rng.uniform(6, 16)
    clumps = _smooth_noise(depth.shape, (0.03 * height, 0.03 * height), rng)
    interior = -depression - 5 + (0.8 if benign else rng.uniform(1.5, 3)) * clumps
    echo += inside * (interior - echo)
    if benign:
        echo += rng.uniform(2, 7) * np.exp(-((outside / 0.008) ** 2)) * np.clip(np.abs(y), 0, 1)
    else:
        echo += rng.uniform(0, 4) * np.exp(-(((outside - 0.02) / 0.02) ** 2))
        _calcifications(echo, inside, rng)
    _behind(label, depth, lateral, beam, (centre_y, centre_x, radius_y, radius_x), rng)
    return outside <= 0


def _outline(angle: np.ndarray, benign: bool, rng: np.random.Generator) -> np.ndarray:
    """Radius of the lesion's outline over the angle, 1 on average."""
    outline = np.ones_like(angle)
    for k in range(2, 5 if benign else 9):
        size = rng.normal(0, 0.035 if benign else 0.075) * 2 / np.sqrt(k)
        outline += size * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    if not benign:
        for _ in range(rng.integers(5, 13)):
            away = np.angle(np.exp(1j * (angle - rng.uniform(-np.pi, np.pi))))
            outline += rng.uniform(0.1, 0.4) * np.exp(-((away / rng.uniform(0.07, 0.16)) ** 2))
    return np.clip(outline, 0.5, 1.6)


def _calcifications(echo: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> None:
    rows, columns = np.nonzero(inside > 0.8)
    if len(rows) and rng.random() < 0.5:
        for spot in rng.integers(0, len(rows), rng.integers(2, 7)):
            echo[rows[spot], columns[spot]] += rng.uniform(10, 18)


def _behind(label: str, depth, lateral, beam, lesion, rng: np.random.Generator) -> None:
    """Enhancement (benign, most of the time) or shadow (malignant, most of the time) below the lesion."""
    centre_y, centre_x, radius_y, radius_x = lesion
    across = (lateral - centre_x) / radius_x
    column = 1 / (1 + np.exp(np.clip((np.abs(across) - 0.85) / 0.08, -50, 50)))
    below = np.clip((depth - centre_y - 0.5 * radius_y) / (0.8 * radius_y), 0, 1)
    fading = np.exp(-np.clip(depth - centre_y - radius_y, 0, None) / rng.uniform(0.2, 0.6))
    strength = rng.uniform(2, 10) if label == "benign" else -rng.uniform(2, 14)
    if rng.random() < 0.15:
        strength = rng.uniform(-2, 2)
    beam += strength * column * below * fading
    if label == "benign":
        for side in (-1, 1):
            beam -= rng.uniform(0, 4) * np.exp(-(((across - side) / 0.1) ** 2)) * below * fading


def _speckle(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Envelope (H, W) of mean square 1, compounded from looks of Rayleigh speckle; grains wider than high."""
    grain = max(size) / 128 * rng.uniform(0.7, 1.1)
    scale = (max(0.45, 0.45 * grain), max(0.6, 0.9 * grain))
    looks = rng.integers(2, 5)
    power = sum(_smooth_noise(size, scale, rng) ** 2 for _ in range(2 * looks))
    return np.sqrt(power / (2 * looks))


def _compress(envelope: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Log compression of the envelope to uint8 with gain, dynamic range and a little noise."""
    dynamic, top = rng.uniform(36, 48), rng.uniform(6, 10)
    decibel = 20 * np.log10(envelope + 10 ** (-dynamic / 20) * rng.uniform(0.5, 1.5))
    decibel = decibel + rng.uniform(-1, 3) * (depth - 0.5)
    grey = np.clip((decibel + dynamic - top) / dynamic, 0, 1) ** rng.uniform(1.0, 1.6)
    grey = grey + rng.normal(0, 0.012, grey.shape)
    return np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)
