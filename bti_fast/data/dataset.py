"""The torch data set over cases: MONAI transforms, a bounded shared cache, repeatable augmentation."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from monai.data import CacheDataset
from monai.transforms import Compose, RandAffine, RandFlip, Transform

from bti_fast.data.cases import Case
from bti_fast.data.images import read_image, read_mask
from bti_fast.data.resize import as_size, resize_image, resize_mask, to_uint16
from bti_fast.data.verify import size_message
from bti_fast.errors import UserError

ROTATION = math.radians(15)


class CaseDataset(torch.utils.data.Dataset):
    """Cases as dictionaries of tensors at the network's size.

    Items: image float32 (channels, H, W) in [0, 1]; mask float32 (1, H, W) of 0 and 1, zeros where unknown;
    label int64 scalar, -1 where unknown; has_mask and has_label bool scalars; id str; index int. `augment`
    flips along both axes and rotates by up to 15 degrees (paper's recipe), as a function of (seed, epoch,
    index) only: `set_epoch` chooses the epoch, and worker counts or resuming change nothing. At most
    `cache_bytes` of decoded, resized cases stay in memory, once for all forked workers. Raises UserError
    for a label outside `classes` and for bad size or channels; reading a bad file raises it late.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        classes: Sequence[str],
        size: int | tuple[int, int],
        channels: int = 3,
        *,
        augment: bool = False,
        seed: int = 0,
        cache_bytes: int = 2 << 30,
    ) -> None:
        self.cases = tuple(cases)
        self.classes = tuple(classes)
        self.size = as_size(size)
        if channels not in (1, 3):
            raise UserError(f"channels is {channels!r}; needs 1 (grey) or 3 (RGB)")
        if seed < 0:
            raise UserError(f"seed is {seed}; needs a number from 0 up")
        for case in self.cases:
            if case.label is not None and case.label not in self.classes:
                raise UserError(f"{case.image}: class {case.label!r} is not one of {', '.join(self.classes)}")
        self.channels = channels
        self.augment = augment
        self.seed = seed
        # Shared, so that persistent workers see the epoch that the parent process sets.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._store = CaseStore(len(self.cases), (channels, *self.size), cache_bytes)
        self._random = _augmentation() if augment else None
        steps = [ReadCase(self.size, channels), _stacked, *(self._random.transforms if augment else ())]
        self._items = CacheDataset(
            self.cases,
            Compose(steps),
            cache_num=len(self._store),
            copy_cache=False,
            as_contiguous=False,
            runtime_cache=self._store,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next items get, in this process and in its workers."""
        self._epoch[0] = epoch

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    @property
    def cache_bytes(self) -> int:
        """The memory that the cache takes when it is full."""
        return self._store.nbytes

    @property
    def cached(self) -> int:
        """How many cases the cache holds now, read by whichever process."""
        return self._store.filled

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} outside {len(self)} cases")
        index %= len(self)
        if self._random is not None:
            self._random.set_random_state(seed=_item_seed(self.seed, self.epoch, index))
        try:
            stacked = self._items[index]
        except RuntimeError as wrapped:
            # MONAI wraps whatever a transform raises.
            if isinstance(wrapped.__cause__, UserError):
                raise wrapped.__cause__ from None
            raise
        if self._random is not None:
            stacked = stacked.as_tensor()
            # Interpolated edges are cut at half coverage, as in `resize_mask`.
            stacked[-1] = (stacked[-1] >= 0.5).float()
        case = self.cases[index]
        return {
            "image": stacked[:-1].clone(),
            "mask": stacked[-1:].clone(),
            "label": torch.tensor(-1 if case.label is None else self.classes.index(case.label)),
            "has_mask": torch.tensor(case.mask_known),
            "has_label": torch.tensor(case.label is not None),
            "id": case.id,
            "index": index,
        }


class ReadCase(Transform):
    """Case to {image: uint16 (C, H, W) in 1/65535, mask: uint8 (1, H, W) of 0 and 1}, to be cached."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.size = size
        self.channels = channels

    def __call__(self, case: Case) -> dict[str, np.ndarray]:
        image = read_image(case.image, self.channels)
        mask = np.zeros(image.shape[1:], dtype=bool)
        for path in case.masks:
            part = read_mask(path)
            if part.shape != mask.shape:
                raise UserError(size_message(path, part.shape, mask.shape))
            mask |= part
        return {
            "image": to_uint16(resize_image(image, self.size)),
            "mask": resize_mask(mask, self.size)[None].astype(np.uint8),
        }


class CaseStore:
    """MONAI's runtime cache as a list of fixed slots in anonymous memory, shared by forked workers.

    Slots are filled on first use and the total stays below `limit` bytes. Anonymous memory, not /dev/shm,
    which containers keep too small. A worker started without fork gets a store of its own.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], limit: int) -> None:
        self.shape = shape
        self._slot_bytes = 2 * math.prod(shape) + math.prod(shape[1:])
        self._count = max(0, min(count, limit // (self._slot_bytes + 1)))
        self._allocate()

    def _allocate(self) -> None:
        size = self._count * (self._slot_bytes + 1)
        memory = mmap.mmap(-1, size) if size else bytearray()
        images = self._count * math.prod(self.shape)
        masks = self._count * math.prod(self.shape[1:])
        self._images = np.frombuffer(memory, np.uint16, images).reshape(-1, *self.shape)
        self._masks = np.frombuffer(memory, np.uint8, masks, 2 * images).reshape(-1, 1, *self.shape[1:])
        self._filled = np.frombuffer(memory, np.uint8, self._count, 2 * images + masks)

    def __len__(self) -> int:
        return self._count

    @property
    def filled(self) -> int:
        return int(self._filled.sum())

    @property
    def nbytes(self) -> int:
        return self._images.nbytes + self._masks.nbytes + self._filled.nbytes

    def __getitem__(self, index: int) -> dict[str, np.ndarray] | None:
        if not self._filled[index]:
            return None
        return {"image": self._images[index], "mask": self._masks[index]}

    def __setitem__(self, index: int, item: dict[str, np.ndarray]) -> None:
        self._images[index] = item["image"]
        self._masks[index] = item["mask"]
        # Last, so that another worker never reads half a slot.
        self._filled[index] = 1

    def __getstate__(self) -> dict:
        return {
            name: value for name, value in vars(self).items() if name in ("shape", "_slot_bytes", "_count")
        }

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._allocate()


def _stacked(item: dict[str, np.ndarray]) -> torch.Tensor:
    """Cached integers to one float32 (C + 1, H, W) tensor, the mask last: one MONAI call moves both.

    A plain function: MONAI caches only what precedes the first step that is not a Transform.
    """
    image = item["image"].astype(np.float32) / np.float32(65535)
    return torch.from_numpy(np.concatenate([image, item["mask"].astype(np.float32)]))


def _augmentation() -> Compose:
    return Compose(
        [
            RandFlip(prob=0.5, spatial_axis=0),
            RandFlip(prob=0.5, spatial_axis=1),
            RandAffine(prob=1.0, rotate_range=ROTATION, mode="bilinear", padding_mode="zeros"),
        ]
    )


def _item_seed(seed: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])
