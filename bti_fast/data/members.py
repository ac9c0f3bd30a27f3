"""Files inside a pack: an uncompressed zip archive, mapped into memory, whose members are read by path."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from bti_fast.errors import UserError

SUFFIX = ".zip"


class Pack:
    """The members of one archive by name; nothing is copied until a member is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                infos = zipfile.ZipFile(file).infolist()
        except (OSError, ValueError, zipfile.BadZipFile) as cause:
            raise UserError(f"{path}: damaged or not a pack ({cause}); needs a whole .zip file") from cause
        squeezed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
        if squeezed:
            raise UserError(
                f"{path}: members are compressed, first {squeezed[0]}; needs one made by bti-fast data pack"
            )
        self._infos = {info.filename: info for info in infos}

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def names(self) -> list[str]:
        """All members."""
        return list(self._infos)

    def read(self, name: str) -> bytes:
        """The bytes of a member, checked by their sum; UserError where they are damaged."""
        info = self._infos[name]
        start = info.header_offset + 30
        if start > len(self._memory):
            raise UserError(f"{self.path}/{name}: outside the file; the pack is truncated")
        # The local header's own lengths: its extra field may differ from the directory's.
        lengths = struct.unpack("<HH", self._memory[start - 4 : start])
        start += sum(lengths)
        data = self._memory[start : start + info.file_size]
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise UserError(f"{self.path}/{name}: damaged (its checksum is wrong)")
        return data


def open_pack(path: Path) -> Pack:
    """The pack at path, opened once for as long as the file stays the same; UserError where it is none."""
    state = path.stat()
    return _open(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _open(path: Path, changed: int, size: int) -> Pack:
    return Pack(path)


def member_bytes(path: Path) -> bytes | None:
    """The bytes of "pack.zip/name", or None where path does not lead into a pack or to no member of it."""
    for parent in path.parents:
        if parent.suffix.lower() == SUFFIX and parent.is_file():
            pack, name = open_pack(parent), path.relative_to(parent).as_posix()
            return pack.read(name) if name in pack else None
    return None
