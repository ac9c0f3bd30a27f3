"""Small data sets and damaged files written for the tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def texture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Coarse random grey image, uint8 (H, W), that correlates with no other seed's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def square_mask(height: int = 40, width: int = 50) -> np.ndarray:
    """uint8 (H, W) mask of 0 and 255 with a square in the middle."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    return mask


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def png_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing: the start of a decompression bomb."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    empty = zlib.compress(b"")
    data = b"IDAT" + empty
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)),
            struct.pack(">I", len(empty)) + data + struct.pack(">I", zlib.crc32(data)),
        ]
    )


def make_busi(root: Path, each: int = 4) -> Path:
    """A BUSI folder with `each` images a class; returns the folder that holds Dataset_BUSI_with_GT."""
    seed = 0
    for name in ("benign", "malignant", "normal"):
        for i in range(1, each + 1):
            seed += 1
            folder = root / "Dataset_BUSI_with_GT" / name
            save(folder / f"{name} ({i}).png", texture(seed))
            mask = square_mask() if name != "normal" else np.zeros((40, 50), dtype=np.uint8)
            save(folder / f"{name} ({i})_mask.png", mask)
    return root


def make_ham10000(root: Path, lesions: int = 2, images: int = 2) -> Path:
    """HAM10000 with `lesions` a class of `images` each, over both parts; returns its folder."""
    root = root / "HAM10000"
    rows, number = ["lesion_id,image_id,dx,dx_type,age,sex,localization"], 0
    for label in ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"):
        for lesion in range(lesions):
            for _ in range(images):
                name, part = f"ISIC_{number:07d}", 1 + number % 2
                image = np.repeat(texture(number)[..., None], 3, axis=2)
                save(root / f"HAM10000_images_part_{part}" / f"{name}.jpg", image)
                masks = root / "HAM10000_segmentations_lesion_tschandl"
                save(masks / f"{name}_segmentation.png", square_mask())
                rows.append(f"HAM_{label}_{lesion},{name},{label},histo,50.0,male,back")
                number += 1
    (root / "HAM10000_metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def make_brisc2025(root: Path, train: int = 3, test: int = 2) -> Path:
    """BRISC 2025 with `train` and `test` images a class; returns the folder with classification_task."""
    root, number = root / "brisc2025", 0
    for part, count in (("train", train), ("test", test)):
        for name, code in (("glioma", "gl"), ("meningioma", "me"), ("no_tumor", "no"), ("pituitary", "pi")):
            for _ in range(count):
                number += 1
                stem = f"brisc2025_{part}_{number:05d}_{code}_ax_t1"
                save(root / "classification_task" / part / name / f"{stem}.jpg", texture(number))
                if name != "no_tumor":
                    save(root / "segmentation_task" / part / "masks" / f"{stem}.png", square_mask())
    return root
