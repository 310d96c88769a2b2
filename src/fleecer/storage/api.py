"""What a file node needs from the machine: the seam at which a simulator takes the place of a real file.

Invariants that every storage keeps:
- Offsets and lengths are bytes. Reading past `size` gives zeroes; writing past it extends a growable storage.
- A storage that ends before `size`, because somebody else cut it short, fails what reads there; it invents no zeroes.
- What a read returns is private; what a write is given is not kept after the call.
- Every failure is an `IoError` that names the storage, with the `OSError` as its cause where there was one.
- `try_pread_into` and `try_pwrite` never wait for long. They promise nothing about requests of the same storage that
  are in flight elsewhere: the caller reads only where no asynchronous change overlaps the range, and writes only where
  no asynchronous request does.
- An asynchronous operation ends before its caller hears of a cancel: afterwards nothing of it is still under way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from fleecer.ranges import Buffer

ReadEnded = Callable[[Buffer, Exception | None], None]
"""Hears how a read ended: what was read and None, or why it failed. It must not raise."""

Ended = Callable[[Exception | None], None]
"""Hears how something else ended: None, or why it failed. It must not raise."""

BeginRead = Callable[[int, int, ReadEnded], bool]
"""Begins a read at an offset, of a length, or says that it cannot; see `Storage.begin_pread`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StorageLimits:
    """What a storage can do, as data.

    alignment_bytes      offsets and lengths of reads, writes, zeroes and discards are multiples (a power of two)
    preferred_bytes      requests aligned to this are served best
    zero_is_fast         `zero` never writes the zeroes out one by one
    can_discard          `discard` may free space
    growable             a write past the end extends the storage
    reads_zero_when_new  bytes never written read as zero, and cost no space
    """

    alignment_bytes: int = 1
    preferred_bytes: int = 4096
    zero_is_fast: bool = True
    can_discard: bool = True
    growable: bool = True
    reads_zero_when_new: bool = True


class Storage(Protocol):
    """An open file or block device, or what stands for one.

    `name` is what the user calls it. `size` is where it ends, in bytes; a write past that counts once all of it is
    done, so that whoever reads up to there finds the half of none. `identity` is equal for two storages on the same
    bytes, and for no others.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def identity(self) -> tuple[int, int]: ...

    @property
    def is_block_device(self) -> bool: ...

    @property
    def limits(self) -> StorageLimits: ...

    @property
    def reads_wait(self) -> bool:
        """Whether `try_pread_into` is not worth a try just now: begin to read, which finds out again sometimes."""

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        """Fills `into` with the bytes at `offset` if they can be had at once; else False, and no matter what is in it.

        Then use `pread`.
        """

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Writes `data` and returns True, or does nothing and returns False: use `pwrite`."""

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """Begins to do what `pread` does, and returns True; or returns False: use `pread`.

        `ended` is called once, in a later turn of the event loop.
        """

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes at `offset`."""

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes all of `data` at `offset`."""

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Makes the range read as zeroes. With `unmap` its space may be freed; without, it stays or is allocated."""

    async def discard(self, offset: int, length: int) -> None:
        """Frees space where that can be done; afterwards each byte reads as zero or as it was."""

    async def sync(self) -> None:
        """Returns when every operation that returned before this call is on stable storage.

        After a failure the state of all unsynced data is unknown, and a later success does not change that: the kernel
        marks pages clean whose writing failed. The caller must not trust this storage again.
        """

    def begin_sync(self, ended: Ended) -> bool:
        """Begins to do what `sync` does, and returns True; or returns False: use `sync`.

        `ended` is called once, perhaps before this returns.
        """

    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Runs of (length, holds data) from `offset` on, one or more; may stop early. Without data it is zero.

        A run of data is told to its own end, which may lie past that of the range.
        """

    async def truncate(self, size: int) -> None:
        """Makes the storage end at `size`; what is new reads as zero. Nothing else may be in flight."""

    async def close(self) -> None:
        """Gives the descriptor and the locks back. Nothing may be in flight. A second call does nothing."""
