"""Reading, checking and splitting image data sets, and the torch dataset over them.

Names load on first use: only `CaseDataset` imports torch and MONAI, so reading and checking start fast.
"""

from importlib import import_module

_HOMES = {
    "Case": "cases",
    "DatasetIndex": "cases",
    "Problem": "cases",
    "read_dataset": "layouts",
    "read_image": "images",
    "read_mask": "images",
    "resize_image": "resize",
    "resize_mask": "resize",
    "near_duplicate_groups": "duplicates",
    "near_duplicate_pairs": "duplicates",
    "LeakWarning": "splits",
    "split_cases": "splits",
    "CheckReport": "check",
    "check_dataset": "check",
    "pack_dataset": "packs",
    "make_phantoms": "phantoms",
    "CaseDataset": "dataset",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
