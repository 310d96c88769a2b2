"""The qcow2 node: requests on guest bytes, over a file that holds the image and, perhaps, a backing node.

Every request claims its range, rounded to clusters, before it looks anything up. Reads and writes in place share their
claims; whatever changes the mapping (an allocating write, zero, discard) and what the caller wants serialised holds its
own alone, until the L2 entries in memory are changed.

Invariants:
- An L2 entry names a host cluster only after the data in it has been written; the file learns of it in a commit.
- A cluster is overwritten in place only if its entry says COPIED; anything else is written to new clusters.
- A cluster that an entry gave up is not used again before a commit has made that durable.
- What a failed write had allocated is given back; its entries stand as they were.
"""

from __future__ import annotations

import functools
from array import array
from typing import ClassVar

from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, Problem, merge_extents
from fleecer.block.nodes.qcow2.allocator import Allocator
from fleecer.block.nodes.qcow2.backing import backing_status
from fleecer.block.nodes.qcow2.commit import Committer
from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.metadata import SingleFlight, Slice
from fleecer.block.nodes.qcow2.reading import Reader
from fleecer.block.nodes.qcow2.writing import Writer
from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import COMPRESSION_ZSTD, LAZY_REFCOUNTS
from fleecer.formats.qcow2.tables import COPIED, Backing, Data, Zero
from fleecer.ranges import PIECE_BYTES, Buffer, ReadAtOnce, WriteAtOnce, align_down, align_up
from fleecer.storage.api import Ended, ReadEnded
from fleecer.units import KiB

STATUS_EXTENTS_MAX = 4096
STATUS_ENTRIES_MAX = 32768
IN_BACKING = -1
_OTHER_BITS = COPIED - 1


def _not_now(_offset: int, _into: memoryview) -> bool:
    """Reads the file or the backing node while that would wait: what is elsewhere, or holds no data, need not."""
    return False


class Qcow2Node(Node):
    """An open qcow2 image. Made by `open_qcow2` (opening.py)."""

    driver = "qcow2"
    writer_class: ClassVar[type[Writer]] = Writer

    __slots__ = (
        "_backing",
        "_cluster_bits",
        "_cluster_mask",
        "_cluster_size",
        "_commits",
        "_file",
        "_file_end",
        "_flights",
        "_image",
        "_in_flight",
        "_l1",
        "_l2_bits",
        "_odd_bits",
        "_offset_in_cluster",
        "_reader",
        "_slice_mask",
        "_slice_start_mask",
        "_slices",
        "_writer",
    )

    def __init__(
        self,
        image: Image,
        backing: Edge | None,
        *,
        read_only: bool,
        l2_cache_bytes: int,
        refcount_cache_bytes: int,
        discard_freed: bool,
        serialise: bool,
    ) -> None:
        header = image.header
        limits = Limits(
            preferred_bytes=max(header.subcluster_size, min(header.cluster_size, 4 * KiB)),
            cluster_size_bytes=header.subcluster_size,
            zero_is_fast=header.version >= 3,
            reads_zero_when_new=backing is None,
        )
        super().__init__(image.name, header.disk_size, limits=limits, read_only=read_only)
        self.children = (image.file,) if backing is None else (image.file, backing)
        self._image = image
        image.on_failure = self.give_up
        if header.corrupt:
            marked = CorruptImage(image.path, "it is marked corrupt; repair it with qemu-img check -r all")
            self.problem = Problem(str(marked), corrupt=True)
        self._file = image.file
        self._file_end = image.file.size
        self._backing = backing
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._cluster_mask = -header.cluster_size
        self._offset_in_cluster = header.cluster_size - 1
        self._odd_bits = image.mapping.odd_bits
        self._in_flight = InFlight(serialise=serialise)
        self._flights = SingleFlight()
        self._reader = reader = Reader(image, backing, l2_cache_bytes)
        allocator = Allocator(image, cache_bytes=refcount_cache_bytes, discard_freed=discard_freed)
        self._commits = Committer(
            image,
            reader.cache,
            allocator,
            l2_cache_bytes=l2_cache_bytes,
            refcount_cache_bytes=refcount_cache_bytes,
        )
        self._writer = self.writer_class(image, reader, backing, allocator, self._commits, self._in_flight)
        # What most requests need is at hand here.
        self._l1 = image.l1
        self._slices = reader.cache.slices
        self._l2_bits = reader.l2_bits
        self._slice_mask = reader.slice_mask
        self._slice_start_mask = reader.slice_start_mask

    # The six operations.

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`: where the slices are in memory, nobody changes the range, and nothing is compressed."""
        read_backing = self._backing.reader() if self._backing is not None else None
        return functools.partial(self._read_at_once, self._file.reader() or _not_now, read_backing or _not_now)

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`: in clusters in a row, ours alone or new, their slice in memory, which nobody changes."""
        write = self._file.writer() if self._image.accepts_writes else None
        return functools.partial(self._write_at_once, write) if write is not None else None

    def serialising_writer(self) -> WriteAtOnce | None:
        """See `Node.serialising_writer`: as `writer`, where no claim touches the clusters."""
        write = self.writer()
        return functools.partial(self._write_alone_at_once, write) if write is not None else None

    def _read_at_once(self, read: ReadAtOnce, read_backing: ReadAtOnce, offset: int, into: memoryview) -> bool:
        place = self._place(offset, len(into))
        if not place:
            return self._read_parts_at_once(read, read_backing, offset, into)
        if self._in_flight.would_wait(offset & self._cluster_mask, self._cluster_size):
            return False
        return read(place, into) if place > 0 else read_backing(offset, into)

    def _place(self, offset: int, length: int) -> int:
        """Where in the file the range is, or `IN_BACKING`, if that can be told at first sight, as for most; else 0."""
        inner = offset & self._offset_in_cluster
        if inner + length > self._cluster_size:
            return 0
        cluster = offset >> self._cluster_bits
        entry = self._l1[cluster >> self._l2_bits]
        table = entry & _OTHER_BITS
        slice_ = self._slices.get(table + (cluster << 3 & self._slice_start_mask))
        if slice_ is None:
            return 0 if entry else self._in_backing(offset + length)
        slice_.used = True
        entry = slice_.data[cluster & self._slice_mask]
        host = entry & _OTHER_BITS
        if not host or (host | table) & self._odd_bits:
            return 0 if entry or table & self._odd_bits else self._in_backing(offset + length)
        end = host + inner + length
        return host + inner if end <= self._file_end or self._is_in_file(end) else 0

    def _in_backing(self, end: int) -> int:
        """What `_place` says of a range that is not allocated here: the backing node may end before `end`."""
        return IN_BACKING if self._backing is not None and end <= self._backing.size else 0

    def _read_parts_at_once(self, read: ReadAtOnce, read_backing: ReadAtOnce, offset: int, into: memoryview) -> bool:
        start, stop, _ = self._claim_bounds(offset, len(into))
        if len(into) > PIECE_BYTES or self._in_flight.would_wait(start, stop - start):
            return False
        return self._reader.read_at_once(read, read_backing, offset, into)

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Node.begin_pread`: a range in a row in the file or in the backing node, whose slices are in memory."""
        child, place = self._file, self._place(offset, length)
        if place == IN_BACKING and self._backing is not None:
            child, place = self._backing, offset
        elif not place:
            plans = self._reader.plan_at_once(offset, length)
            if plans is None or len(plans) != 1:
                return False
            if isinstance(plan := plans[0], Data):
                place = plan.host_offset
            elif isinstance(plan, Backing) and self._backing is not None:
                child, place = self._backing, offset
            else:
                return False
        start, stop, _ = self._claim_bounds(offset, length)
        return self._in_flight.begin_read(start, stop, child.begin_pread, place, length, ended)

    def _write_at_once(self, write: WriteAtOnce, offset: int, data: Buffer) -> bool:
        image, bits = self._image, self._cluster_bits
        cluster = offset >> bits
        table = self._l1[cluster >> self._l2_bits] & _OTHER_BITS
        slice_ = self._slices.get(table + (cluster << 3 & self._slice_start_mask))
        inner = offset & self._offset_in_cluster
        if slice_ is None or table & self._odd_bits or not image.accepts_writes:
            return False
        slice_.used = True
        if inner + len(data) > self._cluster_size:
            return self._write_run_at_once(write, slice_, offset, data)
        host = slice_.data[cluster & self._slice_mask] - COPIED
        if (
            host <= 0
            or (host >= self._file_end and not self._is_in_file(host + 1))
            or host & self._odd_bits
            or host in image.metadata
            or self._in_flight.would_wait(cluster << bits, self._cluster_size)
        ):
            return self._writer.write_new_at_once(write, slice_, offset, data)
        return write(host + inner, data)

    def _write_alone_at_once(self, write: WriteAtOnce, offset: int, data: Buffer) -> bool:
        start, stop, _ = self._claim_bounds(offset, len(data))
        return not self._in_flight.overlaps(start, stop - start) and write(offset, data)

    def _write_run_at_once(self, write: WriteAtOnce, slice_: Slice[array[int]], offset: int, data: Buffer) -> bool:
        length = len(data)
        start, stop, _ = self._claim_bounds(offset, length)
        first = start >> self._cluster_bits & self._slice_mask
        ends_in_slice = first + (stop - start >> self._cluster_bits) <= self._slice_mask + 1
        if not ends_in_slice or self._in_flight.would_wait(start, stop - start):
            return False
        file_end = self._file_end = self._file.size
        host, run = self._image.mapping.in_place(slice_.data, first, offset - start, length, file_end)
        if not run:
            return self._writer.write_new_at_once(write, slice_, offset, data)
        clusters = range(host & self._cluster_mask, host + length, self._cluster_size)
        return run == length and self._image.metadata.isdisjoint(clusters) and write(host, data)

    def _is_in_file(self, end: int) -> bool:
        """Whether the file, which may have grown, reaches up to `end`."""
        self._file_end = self._file.size
        return end <= self._file_end

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`. Raises CorruptImage where the tables do not make sense for the range."""
        start, stop, _ = self._claim_bounds(offset, length)
        claim = self._in_flight.enter(start, stop - start)
        try:
            if claim.blockers:
                await claim.granted()
            return await self._reader.read(offset, length)
        finally:
            self._in_flight.leave(claim)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        if not self._image.accepts_writes:
            await self._prepare()
        start, stop, _ = self._claim_bounds(offset, len(data))
        in_flight = self._in_flight
        if not serialising and not self._needs_new(offset):
            claim = in_flight.enter(start, stop - start)
            try:
                if claim.blockers:
                    await claim.granted()
                if await self._writer.write_in_place(offset, data):
                    return
            finally:
                in_flight.leave(claim)
        claim = in_flight.enter(start, stop - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self._writer.write(offset, memoryview(data))
        finally:
            in_flight.leave(claim)

    def _needs_new(self, offset: int) -> bool:
        """Whether the cluster there cannot be written in place as it is now, as far as that is in memory."""
        cluster = offset >> self._cluster_bits
        slice_ = self._reader.slice_in_memory(cluster)
        return slice_ is not None and not slice_.data[cluster & self._slice_mask] & COPIED

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`. Whole clusters get the zero flag (version 3); parts of clusters are written."""
        if not self._image.accepts_writes:
            await self._prepare()
        start, stop, end = self._claim_bounds(offset, length)
        claim = self._in_flight.enter(start, stop - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            first, last = self._whole_units(offset, end)
            writer = self._writer
            whole = first < last and (self._image.mapping.has_zero_flag or (unmap and not writer.backed))
            if not whole:
                await writer.write_zeroes(offset, end)
                return
            await writer.write_zeroes(offset, first)
            await writer.empty(first, last, unmap=unmap)
            await writer.write_zeroes(last, end)
        finally:
            self._in_flight.leave(claim)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`. Whole clusters read as zero afterwards; version 2 over a backing node keeps them."""
        if not self._image.accepts_writes:
            await self._prepare()
        first, last = self._whole_units(offset, offset + length)
        if first >= last or (self._writer.backed and not self._image.mapping.has_zero_flag):
            return
        start, stop, _ = self._claim_bounds(first, last - first)
        claim = self._in_flight.enter(start, stop - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self._writer.empty(first, last, unmap=True)
        finally:
            self._in_flight.leave(claim)

    def begin_flush(self, ended: Ended) -> bool:
        """See `Node.begin_flush`."""
        return not self.read_only and self._commits.begin_flush(ended)

    async def flush(self) -> None:
        """See `Node.flush`. Commits the metadata; the first failure makes every later write and flush fail."""
        if not self.read_only:
            await self._commits.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`. It stops early after a bounded number of table entries and extents."""
        start, stop, _ = self._claim_bounds(offset, length)
        claim = self._in_flight.enter(start, stop - start)
        try:
            if claim.blockers:
                await claim.granted()
            extents: list[Extent] = []
            for plan in await self._reader.plan(offset, length, STATUS_ENTRIES_MAX):
                if isinstance(plan, Backing):
                    extents.extend(await backing_status(self._backing, offset, plan.length, STATUS_EXTENTS_MAX))
                elif isinstance(plan, Zero):
                    extents.append(Extent(plan.length, ZERO if plan.allocated else HOLE | ZERO))
                else:
                    extents.append(Extent(plan.length, 0))
                if len(extents) >= STATUS_EXTENTS_MAX:
                    break
                offset += plan.length
            return merge_extents(extents)
        finally:
            self._in_flight.leave(claim)

    def describe(self) -> dict[str, object]:
        """What is particular to the image, in QMP's terms (QEMU's ImageInfoSpecificQCow2)."""
        header = self._image.header
        described: dict[str, object] = {
            "compat": "1.1" if header.version >= 3 else "0.10",
            "refcount-bits": 1 << header.refcount_order,
            "compression-type": "zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib",
        }
        if header.version >= 3:
            described["lazy-refcounts"] = bool(header.compatible_features & LAZY_REFCOUNTS)
            described["corrupt"] = self.problem is not None and self.problem.corrupt
            described["extended-l2"] = header.extended_l2
        return described

    async def close(self) -> None:
        """Commits what is dirty, frees included, unless the image was given up before."""
        while (self._commits.dirty or self._commits.running) and self._image.failure is None:
            await self._commits.flush()

    async def _prepare(self) -> None:
        while not self._image.accepts_writes:
            await self._flights.run("prepare", self._image.prepare_writing)

    def _whole_units(self, offset: int, end: int) -> tuple[int, int]:
        """Where what can be emptied by entries alone begins in the range, and where it ends."""
        unit = self._writer.unit_bytes
        return align_up(offset, unit), end if end == self.size else align_down(end, unit)

    def _claim_bounds(self, offset: int, length: int) -> tuple[int, int, int]:
        """The range rounded outward to clusters, and its own end."""
        return align_down(offset, self._cluster_size), align_up(offset + length, self._cluster_size), offset + length
