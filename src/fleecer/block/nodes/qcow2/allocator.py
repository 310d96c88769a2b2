"""Host clusters: who uses how many, which are free, and how the refcount structure grows.

Invariants:
- Refcounts in memory are never below the references that any state of the file may hold: an allocation counts at once,
  a free only when `release` is called, after the commit that removed the last durable reference.
- A refcount block is in the file, initialised, before the table in memory names it; commit.py makes the block durable
  before the table in the file does.
- A cluster handed out is not metadata; if the refcounts say that a metadata cluster is free, the image is corrupt.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
from array import array
from typing import NamedTuple

from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.metadata import SingleFlight, Slice, SliceCache
from fleecer.errors import CorruptImage, FleecerError, IoError
from fleecer.formats.qcow2.header import REFCOUNT_TABLE_BYTES_MAX, REFCOUNT_TABLE_FIELD
from fleecer.formats.qcow2.refcounts import RefcountWidth
from fleecer.formats.qcow2.tables import encode_table

_RELEASES_BETWEEN_TURNS = 4096


class Run(NamedTuple):
    """Host clusters just allocated: their offset and number; `fresh` if they lie beyond all that was ever written."""

    offset: int
    clusters: int
    fresh: bool


class Allocator:
    """The free and used clusters of one image."""

    def __init__(self, image: Image, *, cache_bytes: int, discard_freed: bool) -> None:
        self._image = image
        bits = image.header.cluster_bits
        self._bits = bits
        self._width = RefcountWidth(image.header.refcount_order)
        self._per_block = image.header.refcounts_per_block
        slice_bytes = min(4096, 1 << bits)
        self._per_slice = self._width.entries_in(slice_bytes)
        self.cache: SliceCache[bytearray] = SliceCache(slice_bytes, cache_bytes, self._load)
        self.table_dirty: set[int] = set()
        self.freed: list[tuple[int, int]] = []
        self._discard_freed = discard_freed
        # No cluster below it is free. Those from it to `_free_end` are, while `_counting`, their slice, is in memory.
        self._cursor = 0
        self._free_end = 0
        self._counting: Slice[bytearray] | None = None
        # No cluster from it on was ever written.
        self._written_end = -(-image.file.size >> bits)
        self._growth = SingleFlight()

    async def _load(self, offset: int) -> bytearray:
        return bytearray(await self._image.read(offset, self.cache.slice_bytes))

    async def allocate(self, most: int) -> Run:
        """Between 1 and `most` neighbouring free clusters, with a refcount of 1 from now on.

        It waits only where refcounts must be read or the structure must grow. Raises CorruptImage or IoError; then
        nothing is allocated.
        """
        while True:
            run = self.find(most)
            if run is None:
                index = self._cursor
                await self._cover(index // self._per_block)
                await self._fetch(index)
                continue
            await self._check_free(run.offset >> self._bits, run.clusters)
            self.take(run)
            return run

    def find(self, most: int) -> Run | None:
        """What `allocate` would, but it is allocated by `take` only; None where that would have to wait.

        It is good until something else is allocated or the caller gives way. Whether it is metadata was not looked at.
        """
        counting = self._counting
        known = counting is not None and self.cache.slices.get(counting.offset) is counting
        if not (known and self._cursor < self._free_end) and not self._look_for_free():
            return None
        first = self._cursor
        return Run(first << self._bits, min(most, self._free_end - first), first >= self._written_end)

    def _look_for_free(self) -> bool:
        """Moves the cursor to the next free cluster; False where that takes a wait."""
        width = self._width
        while True:
            index = self._cursor
            self._free_end = 0
            slice_ = self._counting = self._cached(index)
            if slice_ is None:
                return False
            at = index % self._per_slice
            free = width.find_free(slice_.data, at)
            if free >= 0:
                self._cursor = index - at + free
                self._free_end = self._cursor + width.free_run(slice_.data, free, self._per_slice)
                return True
            self._cursor = index - at + self._per_slice

    def take(self, run: Run) -> None:
        """Allocates what `find` has just found."""
        slice_ = self._counting
        assert slice_ is not None, "nothing was found"
        first, count = run.offset >> self._bits, run.clusters
        self._width.put_ones(slice_.data, first % self._per_slice, count)
        self.cache.mark_dirty(slice_)
        self._cursor = end = first + count
        if end > self._written_end:
            self._written_end = end

    async def _check_free(self, first: int, count: int) -> None:
        # Waits only when it raises.
        for cluster in range(first, first + count):
            if cluster << self._bits in self._image.metadata:
                at, size = cluster << self._bits, 1 << self._bits
                raise await self._image.corrupt(f"refcounts call the metadata cluster at {at} free", (at, size))

    def free(self, offset: int, count: int = 1) -> None:
        """Takes back one use of each of `count` clusters. They can be used again after the next commit."""
        first = offset >> self._bits
        freed = self.freed
        if freed and freed[-1][0] + freed[-1][1] == first:
            freed[-1] = (freed[-1][0], freed[-1][1] + count)
        else:
            freed.append((first, count))

    def take_freed(self) -> list[tuple[int, int]]:
        """The clusters freed so far, for a commit that hands them to `release` when it is through."""
        taken, self.freed = self.freed, []
        return taken

    async def release(self, freed: list[tuple[int, int]]) -> None:
        """Lowers the refcounts of clusters to which no durable table refers any more, once for each mention.

        Those that are then unused are discarded in the file first, if that was asked for.
        """
        emptied: set[int] = set()
        seen = 0
        for first, count in freed:
            for cluster in range(first, first + count):
                seen += 1
                if seen % _RELEASES_BETWEEN_TURNS == 0:
                    await asyncio.sleep(0)
                slice_ = await self._fetch(cluster)
                refcount = self._width.get(slice_.data, cluster % self._per_slice)
                if not refcount or cluster in emptied:
                    raise await self._image.corrupt(
                        f"cluster at {cluster << self._bits} was freed more often than used"
                    )
                if refcount == 1:
                    emptied.add(cluster)
                else:
                    self._width.put(slice_.data, cluster % self._per_slice, refcount - 1)
                    self.cache.mark_dirty(slice_)
        ordered = sorted(emptied)
        if self._discard_freed:
            await self._discard(ordered)
        for number, cluster in enumerate(ordered, 1):
            if number % _RELEASES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
            slice_ = await self._fetch(cluster)
            self._width.put(slice_.data, cluster % self._per_slice, 0)
            self.cache.mark_dirty(slice_)
            if cluster < self._cursor:
                self._cursor = cluster
                self._free_end = 0

    async def _discard(self, clusters: list[int]) -> None:
        file, bits = self._image.file, self._bits
        at = 0
        while at < len(clusters):
            stop = at + 1
            while stop < len(clusters) and clusters[stop] == clusters[at] + stop - at:
                stop += 1
            start, end = clusters[at] << bits, min((clusters[at] + stop - at) << bits, file.size)
            if start < end:
                # A hint: the clusters are free whether or not the file gave their space back.
                with contextlib.suppress(IoError):
                    await file.discard(start, end - start)
            at = stop

    def _cached(self, cluster: int) -> Slice[bytearray] | None:
        """The slice that counts `cluster`, if it is in memory."""
        number, at = divmod(cluster, self._per_block)
        table = self._image.refcount_table
        block = table[number] if number < len(table) else 0
        if not block or block % (1 << self._bits):
            return None
        slice_ = self.cache.slices.get(block + at // self._per_slice * self.cache.slice_bytes)
        if slice_ is not None:
            slice_.used = True
        return slice_

    async def _fetch(self, cluster: int) -> Slice[bytearray]:
        """The slice that counts `cluster`, from the file if need be."""
        number, at = divmod(cluster, self._per_block)
        table = self._image.refcount_table
        block = table[number] if number < len(table) else 0
        if not block:
            raise await self._image.corrupt(f"cluster at {cluster << self._bits} is in use without a refcount")
        if block % (1 << self._bits) or block >= self._image.file.size:
            problem = f"refcount table entry {number} is {block}: misaligned or past the file's end"
            raise CorruptImage(self._image.path, problem)
        return await self.cache.fetch(block + at // self._per_slice * self.cache.slice_bytes)

    async def _cover(self, number: int) -> None:
        """Sees to it that refcount block `number` exists."""
        while number >= len(self._image.refcount_table) or not self._image.refcount_table[number]:
            await self._growth.run("grow", lambda: self._grow(number))

    async def _grow(self, number: int) -> None:
        table, metadata = self._image.refcount_table, self._image.metadata
        first = number * self._per_block
        if number >= len(table):
            await self._new_table(number, first)
        elif not table[number]:
            await self._new_blocks(first, number, 1, 1)
            metadata.add(first << self._bits)
            table[number] = first << self._bits
            self.table_dirty.add(number)

    async def _new_blocks(self, first: int, number: int, count: int, in_use: int) -> None:
        """Writes `count` refcount blocks, `number` and following, into the first clusters that they count.

        These begin at `first`; `in_use` of them are counted as used.
        """
        await self._check_free(first, in_use)
        self._written_end = max(self._written_end, first + in_use)
        for at in range(count):
            block = bytearray(1 << self._bits)
            self._width.put_ones(block, 0, max(0, min(in_use - at * self._per_block, self._per_block)))
            self.cache.forget((first + at) << self._bits, 1 << self._bits)
            await self._image.file.pwrite((first + at) << self._bits, block)

    async def _new_table(self, number: int, first: int) -> None:
        """Moves the refcount table to a larger place behind all that is counted, together with the blocks for there."""
        image, bits = self._image, self._bits
        old_offset, old_clusters = image.refcount_table_offset, len(image.refcount_table) * 8 >> bits
        limit = REFCOUNT_TABLE_BYTES_MAX >> bits
        clusters, blocks = max(min(old_clusters * 3 // 2, limit), old_clusters + 1), 1
        while True:
            in_use = blocks + clusters
            last = (first + in_use - 1) // self._per_block
            if blocks > last - number and clusters << bits > last * 8:
                break
            blocks = max(blocks, last - number + 1)
            clusters = max(clusters, -(-(last + 1) * 8 >> bits))
        if clusters > limit:
            detail = f"the image cannot grow: refcount table of {clusters << bits} bytes exceeds its limit"
            raise IoError(errno.ENOSPC, image.name, "allocate", detail=detail)
        await self._new_blocks(first, number, blocks, in_use)
        table = image.refcount_table + array("Q", bytes((clusters << bits) - len(image.refcount_table) * 8))
        for at in range(blocks):
            table[number + at] = (first + at) << bits
        offset = (first + blocks) << bits
        await image.file.pwrite(offset, encode_table(table))
        try:
            await image.file.flush()
        except FleecerError as error:
            image.poison(error)
            raise
        await image.patch_header(REFCOUNT_TABLE_FIELD, struct.pack(">QI", offset, clusters))
        image.refcount_table, image.refcount_table_offset = table, offset
        self.table_dirty.clear()
        image.metadata.update(range(first << bits, (first + in_use) << bits, 1 << bits))
        image.metadata.difference_update(range(old_offset, old_offset + (old_clusters << bits), 1 << bits))
        self.free(old_offset, old_clusters)
