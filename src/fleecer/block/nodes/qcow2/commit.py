"""Metadata on its way to the file: the order that keeps the image sound at every instant, and shared flushes.

A commit takes what is dirty in one step, then
 1. writes refcounts and flushes: every data write that had returned, and every count, is durable;
    if the refcount table changed, writes its entries and flushes;
 2. writes L2 tables; if L1 entries changed, flushes and writes those;
 3. flushes; only now are the clusters freed before the commit released for use.
So a durable table never names a cluster whose count or content is not durable: a power cut leaves leaks at worst.

Invariants: one commit runs at a time; a flush returns after a commit that began after its call; the first failure
poisons the image.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable
from errno import EIO
from typing import NamedTuple

from fleecer import eager
from fleecer.block.nodes.qcow2.allocator import Allocator
from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.metadata import Slice, SliceCache
from fleecer.errors import FleecerError, IoError, told
from fleecer.formats.qcow2.tables import encode_table
from fleecer.storage.api import Ended
from fleecer.units import MiB
from fleecer.waiters import Waiters

DIRTY_BYTES_MAX = 8 * MiB
FREED_RUNS_MAX = 65536
_SECTOR_ENTRIES = 64


class _Batch(NamedTuple):
    """What one commit stores: bytes as they were when it began."""

    counts: list[tuple[int, bytes]]
    table_entries: list[tuple[int, bytes]]
    maps: list[tuple[int, bytes]]
    l1_entries: list[tuple[int, bytes]]
    freed: list[tuple[int, int]]
    pinned: list[Slice[bytearray] | Slice[array[int]]]


class Committer:
    """Stores the metadata of one image."""

    def __init__(
        self,
        image: Image,
        l2: SliceCache[array[int]],
        allocator: Allocator,
        *,
        l2_cache_bytes: int,
        refcount_cache_bytes: int,
    ) -> None:
        self._image = image
        self._l2 = l2
        self._allocator = allocator
        # In slices.
        self._maps_dirty_max = min(DIRTY_BYTES_MAX, l2_cache_bytes // 4) // l2.slice_bytes
        self._counts_dirty_max = min(DIRTY_BYTES_MAX, refcount_cache_bytes // 4) // allocator.cache.slice_bytes
        self._begun = 0
        self._finished = 0
        self._running = False
        self._waiting = Waiters()

    @property
    def dirty(self) -> bool:
        """Whether a commit would store anything."""
        allocator = self._allocator
        counts = allocator.cache.dirty
        return bool(self._l2.dirty or counts or self._image.l1_dirty or allocator.table_dirty or allocator.freed)

    @property
    def running(self) -> bool:
        """Whether a commit is under way: perhaps for nobody, if whoever asked for it was cancelled."""
        return self._running

    @property
    def pressing(self) -> bool:
        """Whether so much is dirty that writers should wait for a commit."""
        return (
            len(self._l2.dirty) > self._maps_dirty_max
            or len(self._allocator.cache.dirty) > self._counts_dirty_max
            or len(self._allocator.freed) > FREED_RUNS_MAX
        )

    async def flush(self) -> None:
        """Returns when all that returned before this call is durable. Callers meanwhile share the next commit."""
        wanted = self._begun + 1
        while self._finished < wanted:
            self._image.check_failure("flush")
            if not self._running:
                # In a task of its own where it has to wait: who is cancelled must not stop it half-way.
                eager.start(self._run())
            if self._running:
                await self._waiting.wait()

    def begin_flush(self, ended: Ended) -> bool:
        """See `Node.begin_flush`: where there is nothing to commit."""
        if self._running or self.dirty or self._image.failure is not None:
            return False
        return self._image.file.begin_flush(functools.partial(self._flush_ended, ended))

    def _flush_ended(self, ended: Ended, error: Exception | None) -> None:
        if isinstance(error, FleecerError):
            self._image.poison(error)
        ended(error)

    async def _run(self) -> None:
        """One commit. A failure is left in the image, for all who wait."""
        self._running = True
        self._begun += 1
        try:
            if self.dirty:
                await self._commit()
            else:
                await self._image.file.flush()
            self._finished = self._begun
        except FleecerError as error:
            self._image.poison(error)
        except BaseException as error:
            self._image.poison(IoError(EIO, self._image.name, "flush", detail=told(error)))
            raise
        finally:
            self._running = False
            self._waiting.wake()

    async def _commit(self) -> None:
        batch = self._take()
        try:
            await self._store_counts(batch)
            await self._store_maps(batch)
        finally:
            for slice_ in batch.pinned:
                slice_.pins -= 1
        if batch.freed:
            await self._allocator.release(batch.freed)

    def _take(self) -> _Batch:
        """All that is dirty, copied; no await, so the parts belong to one instant."""
        image, allocator = self._image, self._allocator
        counts, maps = allocator.cache.take_dirty(), self._l2.take_dirty()
        batch = _Batch(
            [(slice_.offset, bytes(slice_.data)) for slice_ in counts],
            _sectors(image.refcount_table, allocator.table_dirty, image.refcount_table_offset),
            [(slice_.offset, image.mapping.encode(slice_.data)) for slice_ in maps],
            _sectors(image.l1, image.l1_dirty, image.header.l1_table_offset),
            allocator.take_freed(),
            [*counts, *maps],
        )
        allocator.table_dirty.clear()
        image.l1_dirty.clear()
        return batch

    async def _store_counts(self, batch: _Batch) -> None:
        file = self._image.file
        await self._write(batch.counts)
        await file.flush()
        if batch.table_entries:
            await self._write(batch.table_entries)
            await file.flush()

    async def _store_maps(self, batch: _Batch) -> None:
        file = self._image.file
        if not batch.maps and not batch.l1_entries:
            return
        await self._write(batch.maps)
        if batch.l1_entries:
            await file.flush()
            await self._write(batch.l1_entries)
        await file.flush()

    async def _write(self, pieces: list[tuple[int, bytes]]) -> None:
        """Writes the pieces, neighbours in one go."""
        pieces = sorted(pieces)
        at = 0
        while at < len(pieces):
            start, data = pieces[at]
            parts, end = [data], start + len(data)
            at += 1
            while at < len(pieces) and pieces[at][0] == end and end - start < MiB:
                parts.append(pieces[at][1])
                end += len(pieces[at][1])
                at += 1
            await self._image.file.pwrite(start, b"".join(parts))


def _sectors(table: array[int], indexes: Iterable[int], offset: int) -> list[tuple[int, bytes]]:
    """The sectors of a table at `offset` that hold the entries `indexes`, the last one cut where the table ends."""
    pieces: list[tuple[int, bytes]] = []
    for sector in sorted({index // _SECTOR_ENTRIES for index in indexes}):
        start = sector * _SECTOR_ENTRIES
        pieces.append((offset + start * 8, encode_table(table[start : start + _SECTOR_ENTRIES])))
    return pieces
