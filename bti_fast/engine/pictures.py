"""Masks as PNG files and as overlays on their images."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from bti_fast.engine.files import write_atomic

# Colours that stay apart for colour-blind readers (Okabe and Ito).
PREDICTED = (230, 159, 0)
TRUE = (86, 180, 233)


def overlay(image: np.ndarray, predicted: np.ndarray, true: np.ndarray | None = None) -> np.ndarray:
    """Image (C, H, W) in 0..1 with the predicted mask (H, W) tinted and outlined orange, the true outline
    blue.

    Returns uint8 (H, W, 3).
    """
    grey = np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image[:3]
    canvas = grey.transpose(1, 2, 0).astype(np.float32) * 255
    width = max(1, round(max(image.shape[1:]) / 300))
    canvas[predicted] = 0.8 * canvas[predicted] + 0.2 * np.array(PREDICTED, np.float32)
    if true is not None:
        canvas[outline(true, width)] = TRUE
    canvas[outline(predicted, width)] = PREDICTED
    return np.rint(canvas.clip(0, 255)).astype(np.uint8)


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The outermost `width` pixels inside a bool mask (H, W)."""
    return mask & ~ndimage.binary_erosion(mask, iterations=width, border_value=0)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Writes a bool mask (H, W) as an 8-bit PNG of 0 and 255, in one step."""
    write_picture(path, mask.astype(np.uint8) * 255)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 (H, W) or (H, W, 3) as PNG in one step."""
    write_atomic(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))


def data_uri(pixels: np.ndarray, longest: int = 480) -> str:
    """uint8 (H, W, 3) as a PNG data address for a page, shrunk to `longest` pixels."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
