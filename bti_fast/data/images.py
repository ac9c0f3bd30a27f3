"""How one image or mask file becomes an array, and which files are refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from bti_fast.data.members import member_bytes
from bti_fast.errors import UserError

# Pillow loads most formats late; opening by name needs them now.
Image.init()
# Formats known by their content; EPS is left out because Pillow runs an external program for it.
FORMATS = tuple(
    name
    for name in ("PNG", "JPEG", "MPO", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM", "JPEG2000")
    if name in Image.OPEN
)
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".jp2"}
)
MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112  # EXIF
_PHOTOMETRIC = 262  # TIFF

# What Pillow's decoders raise on damaged bytes; anything else is a bug and must surface as one.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    AttributeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def read_image(path: str | Path, channels: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one image file as float32 (channels, H, W) in [0, 1] at its own size, upright by its EXIF tag.

    A path may lead into a pack: pack.zip/name.

    8-bit values are divided by 255, 16-bit ones by 65535 (no stretching to the image's own range). Colour
    becomes grey by ITU-R 601 luma and grey becomes colour by repetition. Transparency is composited over
    black, unless the image is transparent everywhere: then alpha is ignored. 16-bit colour PNGs lose their
    low byte in Pillow. Raises UserError, one line with the file's name, if the file is missing, empty, not
    an image, damaged, an image sequence, or larger than `max_pixels`.
    """
    if channels not in (1, 3):
        raise UserError(f"channels is {channels!r}; needs 1 (grey) or 3 (RGB)")
    path = Path(path)
    picture = _over_black(_decode(path, max_pixels))
    if picture.mode in ("L", "RGB", "1"):
        picture = picture.convert("L" if channels == 1 else "RGB")
        values = np.asarray(picture, dtype=np.float32) / np.float32(255)
    else:
        values = _deep_values(picture, path).astype(np.float32) / np.float32(65535)
    if values.ndim == 2:
        return np.repeat(values[None], channels, axis=0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def read_mask(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one mask file as bool (H, W): 0/255 masks are cut above 127, masks of only 0 and 1 at 1.

    16-bit masks are cut above half of 65535; colour masks count by their brightest channel, and masks of one
    colour by their transparency where that varies. A mask whose highest value lies between 2 and 127
    (0..32767 in 16 bit) has no clear meaning and raises UserError, as does everything `read_image` refuses.
    """
    return binarise(read_mask_values(path, max_pixels=max_pixels), Path(path))


def read_mask_values(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask file's raw grey values, uint8 or uint16 (H, W); raises UserError as `read_image` does."""
    path = Path(path)
    stored = _decode(path, max_pixels)
    picture = _over_black(stored)
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode not in ("L", "RGB"):
        return _deep_values(picture, path)
    values = np.asarray(picture)
    values = values.max(axis=2) if values.ndim == 3 else values
    if picture is not stored and values.min() == values.max() and _has_alpha(stored):
        # A drawing layer: black on transparent ground would otherwise be taken for an empty mask.
        alpha = np.asarray(stored.convert("RGBA").getchannel("A"))
        return values if alpha.min() == alpha.max() else alpha
    return values


def exif_turn(path: str | Path) -> int:
    """The EXIF orientation of an image file, 1 (as stored) to 8; raises UserError as `read_image` does."""
    with _opened(Path(path), MAX_PIXELS) as picture:
        return int(picture.getexif().get(_ORIENTATION, 1))


def binarise(values: np.ndarray, path: Path) -> np.ndarray:
    """Cut raw mask values, uint8 or uint16 (H, W), to bool by the rule of `read_mask`."""
    highest = int(values.max())
    if highest <= 1:
        return values == 1
    # 8-bit values are often stored in 16-bit files.
    half = 127 if highest <= 255 else 32767
    if highest <= half:
        raise UserError(f"{path}: mask values reach only {highest}; needs 0 and 255, or 0 and 1")
    return values > half


def _decode(path: Path, max_pixels: int) -> Image.Image:
    """The upright picture in memory, whatever its mode."""
    with _opened(path, max_pixels) as picture:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        # Pillow turns TIFFs in which 0 is white round up to 8 bits only.
        if picture.mode.startswith("I;16") and getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            upright = Image.fromarray(65535 - np.asarray(upright))
        return upright


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read; what fails within, decoding too, becomes a UserError."""
    try:
        if not path.exists():
            inside = member_bytes(path)
            if inside is None:
                raise UserError(f"{path}: no such file")
            with _open(path, io.BytesIO(inside), max_pixels) as picture:
                yield picture
            return
        if not path.is_file():
            raise UserError(f"{path}: not a file; needs an image file")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: empty file (0 bytes); needs an image")
        # Given a path, Pillow maps plain TIFFs into memory and garbles those stored on their side.
        with path.open("rb") as stream, _open(path, stream, max_pixels) as picture:
            yield picture
    except UserError:
        raise
    except PermissionError as cause:
        raise UserError(f"{path}: not readable ({cause.strerror}); needs read permission") from cause
    except Image.UnidentifiedImageError as cause:
        raise UserError(f"{path}: not an image, or a damaged header; needs PNG, JPEG, TIFF or BMP") from cause
    except Image.DecompressionBombError as cause:
        raise UserError(f"{path}: far too many pixels; needs at most {max_pixels:,}") from cause
    except _DECODE_ERRORS as cause:
        raise UserError(f"{path}: damaged or truncated ({_one_line(cause)}); needs a whole file") from cause


def _open(path: Path, stream: BinaryIO, max_pixels: int) -> Image.Image:
    """The picture with its header read and its size checked, before any pixel is decoded."""
    picture = Image.open(stream, formats=FORMATS)
    if picture.format not in ("JPEG", "MPO") and getattr(picture, "is_animated", False):
        raise UserError(f"{path}: a sequence of several images; needs a single image")
    width, height = picture.size
    if not 0 < width * height <= max_pixels:
        raise UserError(f"{path}: {width} x {height} pixels; needs from 1 to {max_pixels:,} pixels")
    return picture


def _over_black(picture: Image.Image) -> Image.Image:
    """Reduce any mode to "1", "L", "RGB", or a deep one-channel mode, compositing transparency over black."""
    if picture.mode in ("1", "L", "RGB", "F") or picture.mode.startswith("I"):
        # A transparent colour key marks unused background; its own grey value is what a viewer would hide.
        return picture
    if _has_alpha(picture):
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        colour = picture.convert("RGB")
        if alpha.getextrema() != (255, 255) and alpha.getextrema() != (0, 0):
            colour = Image.composite(colour, Image.new("RGB", picture.size), alpha)
        return colour
    return picture.convert("RGB")


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (
        picture.mode == "P" and "transparency" in picture.info
    )


def _deep_values(picture: Image.Image, path: Path) -> np.ndarray:
    """uint16 (H, W) of a one-channel picture deeper than 8 bits."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.dtype.kind == "f":
        raise UserError(f"{path}: floating-point pixels; needs 8-bit or 16-bit integers")
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 65535:
        raise UserError(f"{path}: 32-bit pixels from {lowest} to {highest}; needs 8-bit or 16-bit values")
    return values.astype(np.uint16)


def _one_line(cause: BaseException) -> str:
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= 120 else text[:117] + "..."
