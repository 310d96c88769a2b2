"""What the writers put into a sector, and who owns which sector.

Every sector that is written says, sixteen times over, which disk and sector it is, which writer wrote it, and as which
of that writer's operations: a sector that is torn, misplaced, stale or of another run tells on itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SECTOR = 512
BASE_WRITER = 0xFFFF
"""The "writer" of what the overlay's backing file held from the start, as operation 0."""

RECORD = struct.Struct("<4sHHQQII")
_REPEAT = SECTOR // RECORD.size
_SUMMED = RECORD.size - 4
MAGIC = b"soak"

_FINE = 80  # sectors in a row of one owner: 40 KiB, so that every 64 KiB cluster has several owners
_COARSE = 2048  # in the upper half, where whole clusters are zeroed and discarded


class Stamp(NamedTuple):
    """Who wrote a sector, and as which of its operations."""

    writer: int
    number: int


class Layout(NamedTuple):
    """The disks, in sectors; of `based` sectors every other run is stamped by the backing file. `salt` is the run's."""

    sectors: tuple[int, ...]
    based: tuple[int, ...]
    writers: int
    salt: int

    def runs(self, disk: int, writer: int) -> list[tuple[int, int]]:
        """The runs of sectors, each (first, end), that a writer owns on a disk."""
        return [(first, end) for first, end, owner in self._owned(disk) if owner == writer]

    def _owned(self, disk: int) -> Iterator[tuple[int, int, int]]:
        size = self.sectors[disk]
        half = size // 2 // _COARSE * _COARSE
        for turn, first in enumerate(range(0, half, _FINE)):
            yield first, min(first + _FINE, half), turn % self.writers
        for turn, first in enumerate(range(half, size, _COARSE)):
            yield first, min(first + _COARSE, size), turn % self.writers

    def owners(self, disk: int) -> bytes:
        """The owner of each sector."""
        return b"".join(bytes([owner]) * (end - first) for first, end, owner in self._owned(disk))

    def has_base(self, disk: int, sector: int) -> bool:
        """Whether the backing file had stamped the sector; if not, it was zero at first."""
        return sector < self.based[disk] and sector // _FINE % 2 == 0

    def stamped(self, disk: int, stamp: Stamp, sector: int) -> bytes:
        """The sector as `stamp` writes it."""
        head = RECORD.pack(MAGIC, disk, stamp.writer, stamp.number, sector, self.salt, 0)[:_SUMMED]
        return (head + zlib.crc32(head).to_bytes(4, "little")) * _REPEAT

    def base(self, disk: int) -> bytes:
        """The content of the backing file."""
        stamp = Stamp(BASE_WRITER, 0)
        return b"".join(
            self.stamped(disk, stamp, sector) if self.has_base(disk, sector) else bytes(SECTOR)
            for sector in range(self.based[disk])
        )

    def read(self, disk: int, sector: int, content: bytes) -> Stamp | None:
        """The stamp that fills the sector, whole and of this place and run; None if there is none."""
        record = content[: RECORD.size]
        magic, of_disk, writer, number, of_sector, salt, checksum = RECORD.unpack(record)
        if (
            magic != MAGIC
            or of_disk != disk
            or of_sector != sector
            or salt != self.salt
            or checksum != zlib.crc32(record[:_SUMMED])
            or content != record * _REPEAT
        ):
            return None
        return Stamp(writer, number)
