"""Which layout a folder has, and reading it: one table names every known layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bti_fast.data import brisc2025, busi, ham10000, manifest, packs
from bti_fast.data.cases import DatasetIndex
from bti_fast.data.groups import with_groups
from bti_fast.data.verify import drop_unusable
from bti_fast.errors import UserError


class Layout(NamedTuple):
    """One layout: what its folder looks like, a finder (its root, or None), and its reader."""

    looks_like: str
    find: Callable[[Path], Path | None]
    read: Callable[..., DatasetIndex]
    class_folders: bool = False  # its reader takes allow_missing_classes


# A new data set is one file with `find` and `read`, and one line here; "auto" tries them in this order.
LAYOUTS: dict[str, Layout] = {
    "busi": Layout(busi.LOOKS_LIKE, busi.find, busi.read, class_folders=True),
    "ham10000": Layout(ham10000.LOOKS_LIKE, ham10000.find, ham10000.read),
    "brisc2025": Layout(brisc2025.LOOKS_LIKE, brisc2025.find, brisc2025.read, class_folders=True),
    "pack": Layout(packs.LOOKS_LIKE, packs.find, packs.read),
    "manifest": Layout(manifest.LOOKS_LIKE, manifest.find, manifest.read),
}


def read_dataset(
    path: str | Path,
    layout: str = "auto",
    *,
    verify: bool = True,
    allow_missing_classes: bool = False,
    groups: str | Path | None = None,
) -> DatasetIndex:
    """Read a data set's folders or manifest into a `DatasetIndex`; nothing is renamed or written.

    With `verify` every file is decoded once: unreadable images and masks, masks of another size than their
    image, and masks without a clear meaning are left out and listed in `problems`; the rest goes on. `groups`
    is a CSV file of images that belong together (see bti_fast.data.groups). Raises
    UserError if the path or layout is unknown, a class folder is missing (unless `allow_missing_classes`), or
    nothing usable is left.
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; needs a data set")
        name, root = _choose(path, layout)
        known = LAYOUTS[name]
        options = {"allow_missing_classes": allow_missing_classes} if known.class_folders else {}
        index = known.read(root, **options)
    except OSError as cause:
        raise UserError(
            f"{path}: cannot be listed ({cause.strerror or cause}); needs read permission"
        ) from cause
    if verify:
        cases, problems = drop_unusable(index.cases)
        index = replace(index, cases=cases, problems=[*index.problems, *problems])
    if groups is not None and index.cases:
        index = with_groups(index, groups)
    if not index.cases:
        first = f"; first problem: {index.problems[0].message}" if index.problems else ", nothing is listed"
        raise UserError(f"{path}: no usable image ({len(index.problems)} problems{first})")
    return index


def _choose(path: Path, layout: str) -> tuple[str, Path]:
    if layout != "auto":
        if layout not in LAYOUTS:
            raise UserError(f"layout is {layout!r}; needs auto, {', '.join(LAYOUTS)}")
        root = LAYOUTS[layout].find(path)
        if root is None:
            raise UserError(f"{path}: not a {layout} data set; needs {LAYOUTS[layout].looks_like}")
        return layout, root
    fitting = [(name, root) for name, known in LAYOUTS.items() if (root := known.find(path)) is not None]
    if len(fitting) > 1:
        names = [name for name, _ in fitting]
        raise UserError(
            f"{path}: fits the layouts {' and '.join(names)}; say which with --layout {' or '.join(names)}"
        )
    if fitting:
        return fitting[0]
    if path.is_dir() and not any(path.iterdir()):
        raise UserError(f"{path}: empty folder; needs a data set")
    looked_for = "; or ".join(f"{name}: {known.looks_like}" for name, known in LAYOUTS.items())
    raise UserError(
        f"{path}: no known data set layout found; {manifest.beginning(path)}looked for {looked_for}"
    )
