"""Masks, overlays and a table for anybody's images."""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bti_fast.data import read_image
from bti_fast.data.images import SUFFIXES
from bti_fast.engine import run_folder
from bti_fast.engine.device import choose_device, prepare_cpu
from bti_fast.engine.files import output_folder, write_csv, write_json
from bti_fast.engine.inference import (
    REFERRAL,
    Prediction,
    attention_modules,
    class_names,
    for_images,
    predict_images,
)
from bti_fast.engine.pictures import overlay, write_mask, write_picture
from bti_fast.engine.run_config import PredictConfig
from bti_fast.errors import UserError

TABLE_JSON, TABLE_CSV = "predictions.json", "predictions.csv"
PROXIES = ("alignment", "complexity", "confidence")
_MASK_NAME = re.compile(r"^(.+)_mask(_\d+)?$")
_TABLE_SECONDS = 10.0
_PICTURES = ("masks", "overlays", "attention")


@dataclass(frozen=True)
class Predictions:
    """Where the results lie, one record per predicted image, and (path, reason) of each file that was not."""

    folder: Path
    records: list[dict[str, Any]]
    bad: list[tuple[str, str]]


def predict(
    config: PredictConfig, *, encoder: torch.nn.Module | None = None, console: Console | None = None
) -> Predictions:
    """Predicts every image named in config.images; writes masks/*.png (0 and 255, at the image's own size),
    overlays/*.png, predictions.csv and predictions.json to config.out; with config.attention also
    attention/*.png, where each class token looks at each level. Where bti-fast failures has chosen a
    threshold, "refer" says which images a human should look at.

    Unreadable files are listed in the result and in both tables, and the others still predicted. encoder is
    needed where the network was trained with one of its own. UserError for bad settings, and where no image
    at all could be predicted.
    """
    console = console or Console(stderr=True)
    config = config.checked()
    weights, _ = run_folder.find_model(config.model)
    files, bad = find_images(config.images)
    if not files:
        raise UserError(f"{bad[0][0]}: {bad[0][1]}" if bad else f"{config.images[0]}: no image in it")
    folder = output_folder(config.out, marker=TABLE_JSON, overwrite=config.overwrite)
    device = choose_device(config.device)
    prepare_cpu(config.threads)
    model = run_folder.load_model(weights, encoder)
    if config.attention and not attention_modules(model):
        raise UserError(
            f"{config.model}: --attention needs a network with attention; this one was made with "
            f"interaction {model.config['interaction']!r}"
        )
    names = class_names(model)
    referral = model.metadata.get(REFERRAL)
    keys = dict(zip(map(str, files), output_names(files), strict=True))

    records: list[dict[str, Any]] = []
    images: dict[str, np.ndarray] = {}
    saved = time.monotonic()
    model = for_images(model, len(files), device)
    stream = _readable(files, model.config["in_channels"], images, bad, console)
    try:
        for found in predict_images(
            model, stream, batch_size=config.batch_size, device=device, attention=config.attention
        ):
            records.append(
                _write(folder, keys[found.id], found, images.pop(found.id), names, config.threshold)
                | _referred(found, referral)
            )
            if time.monotonic() - saved > _TABLE_SECONDS:
                _write_tables(folder, weights, records, bad, names)
                saved = time.monotonic()
    finally:  # an interrupted run keeps its table of what is done
        _write_tables(folder, weights, records, bad, names)
    if not records:
        raise UserError(
            f"{folder}: none of {len(bad)} files could be predicted, first {bad[0][0]}: {bad[0][1]}"
        )
    text = f"{len(records)} image{'s' * (len(records) != 1)} predicted -> {folder}"
    if referral is not None:
        text += f"; {sum(record['refer'] for record in records)} of them are for a human to look at"
    if bad:
        text += f"; {len(bad)} files could not be read and are listed in {TABLE_CSV}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return Predictions(folder, records, bad)


def find_images(paths: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Image files that files, folders and patterns stand for, in order, each once; and what was not found.

    Folders are searched with their subfolders for the usual image suffixes; mask files beside their image
    (x.png, x_mask.png), hidden files and pictures that an earlier prediction drew are left out there.
    """
    files: dict[Path, None] = {}
    bad: list[tuple[str, str]] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = _in_folder(path)
        elif path.exists():
            found = [path]
        else:
            found = []
            for match in sorted(glob.glob(os.path.expanduser(name), recursive=True)):
                found += _in_folder(Path(match)) if os.path.isdir(match) else [Path(match)]
        if not found:
            bad.append((name, "no image in it" if path.is_dir() else "no such file, folder or pattern"))
        files.update(dict.fromkeys(found))
    return list(files), bad


def _in_folder(folder: Path) -> list[Path]:
    drawn = {table.parent / name for table in folder.rglob(TABLE_JSON) for name in _PICTURES}
    found = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and not p.is_dir()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and drawn.isdisjoint(p.parents)
    )
    stems = {p.with_suffix("") for p in found}

    def is_mask(path: Path) -> bool:
        match = _MASK_NAME.match(path.stem)
        return match is not None and path.with_name(match[1]) in stems

    return [p for p in found if not is_mask(p)]


def output_names(files: Sequence[Path]) -> list[str]:
    """A name per file under which no two files meet, also on disks that ignore case: the plainest that works
    for all.

    File name without suffix; else the path below the folder common to all; else that with its suffix.
    """
    absolute = [Path(os.path.abspath(path)) for path in files]
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    below = [path.relative_to(common) for path in absolute]
    schemes = (
        [path.stem for path in absolute],
        [path.with_suffix("").as_posix() for path in below],
        [f"{path.with_suffix('').as_posix()}_{path.suffix[1:]}" for path in below],
        [f"{number:05d}_{path.stem}" for number, path in enumerate(absolute, start=1)],
    )
    return next(names for names in schemes if len({name.lower() for name in names}) == len(names))


def _readable(
    files: Sequence[Path],
    channels: int,
    images: dict[str, np.ndarray],
    bad: list[tuple[str, str]],
    console: Console,
) -> Iterator[tuple[str, np.ndarray]]:
    """The files that can be read, kept in `images` until they are drawn; the others go to `bad`."""
    for path in files:
        try:
            image = read_image(path, channels)
        except UserError as cause:
            reason = str(cause).removeprefix(f"{path}: ")
            bad.append((str(path), reason))
            console.print(f"warning: {path}: {reason}", markup=False, highlight=False, soft_wrap=True)
            continue
        images[str(path)] = image
        yield str(path), image


def _write(
    folder: Path, key: str, found: Prediction, image: np.ndarray, names: Sequence[str], threshold: float
) -> dict[str, Any]:
    mask = found.mask_prob > threshold
    paths = {"mask": Path("masks") / f"{key}.png", "overlay": Path("overlays") / f"{key}.png"}
    if found.attention:
        paths["attention"] = Path("attention") / f"{key}.png"
    for path in paths.values():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if found.attention:
        from bti_fast.engine.figures import token_attention, write_png  # matplotlib takes half a second

        write_png(token_attention(image, found.attention), folder / paths["attention"])
    write_mask(folder / paths["mask"], mask)
    write_picture(folder / paths["overlay"], overlay(image, mask))
    likely = int(np.argmax(found.class_prob))
    return {
        "image": found.id,
        **{name: path.as_posix() for name, path in paths.items()},
        "height": mask.shape[0],
        "width": mask.shape[1],
        "class": names[likely],
        "class_prob": dict(zip(names, found.class_prob, strict=True)),
        "lesion_fraction": float(mask.mean()),
        "failure_score": found.failure_score,
        "mask_entropy": found.mask_entropy,
        "class_entropy": found.class_entropy,
        "gates": [{"w_seg": seg, "w_cls": cls} for seg, cls in found.gates],
        "signals": [dict(zip(PROXIES, level, strict=True)) for level in found.proxies],
        "level_uncertainty": found.level_uncertainty,
    }


def _referred(found: Prediction, referral: dict[str, Any] | None) -> dict[str, Any]:
    """{"refer": whether a human should look}, or nothing where the checkpoint has no threshold."""
    if referral is None:
        return {}
    value, threshold = found.failure_signals()[referral["signal"]], referral["threshold"]
    return {"refer": threshold is None or not value <= threshold}


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record as one row of predictions.csv; levels are numbered from 1, the coarsest."""
    row = {name: value for name, value in record.items() if not isinstance(value, (dict, list))}
    row |= {f"prob_{name}": value for name, value in record["class_prob"].items()}
    for name in ("gates", "signals"):
        for number, level in enumerate(record[name], start=1):
            row |= {f"{key}_{number}": value for key, value in level.items()}
    return row | {f"uncertainty_{number}": v for number, v in enumerate(record["level_uncertainty"], start=1)}


def _write_tables(
    folder: Path,
    weights: Path,
    records: list[dict[str, Any]],
    bad: list[tuple[str, str]],
    names: Sequence[str],
) -> None:
    rows = [flat(record) for record in records]
    columns = list(dict.fromkeys(["image", *(name for row in rows for name in row), "error"]))
    rows += [{"image": path, "error": reason} for path, reason in bad]
    write_csv(folder / TABLE_CSV, rows, columns)
    write_json(
        folder / TABLE_JSON,
        {
            "model": str(weights),
            "classes": list(names),
            "images": records,
            "unreadable": [{"image": path, "error": reason} for path, reason in bad],
        },
    )
