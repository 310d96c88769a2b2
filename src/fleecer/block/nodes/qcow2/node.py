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

import asyncio
import functools
from array import array

from fleecer import spares
from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, Problem, merge_extents
from fleecer.block.nodes.qcow2.allocator import Allocator, Run
from fleecer.block.nodes.qcow2.backing import backing_status, read_backing
from fleecer.block.nodes.qcow2.commit import Committer
from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.metadata import SingleFlight, Slice, SliceCache
from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import COMPRESSION_ZSTD, LAZY_REFCOUNTS
from fleecer.formats.qcow2.tables import (
    COMPRESSED,
    COPIED,
    ZERO_FLAG,
    Backing,
    Compressed,
    Data,
    Plan,
    Zero,
    decode_table,
    join_backing,
)
from fleecer.ranges import PIECE_BYTES, Buffer, ReadAtOnce, WriteAtOnce, align_down, align_up, ends_piece, zeroes
from fleecer.storage.api import ReadEnded

SLICE_BYTES_MAX = 4096
STATUS_EXTENTS_MAX = 4096
STATUS_ENTRIES_MAX = 32768
_SLICES_BETWEEN_TURNS = 64
_OTHER_BITS = COPIED - 1


class Qcow2Node(Node):
    """An open qcow2 image. Made by `open_qcow2` (opening.py)."""

    driver = "qcow2"

    __slots__ = (
        "_allocator",
        "_backed",
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
        "_l2",
        "_l2_bits",
        "_odd_bits",
        "_offset_in_cluster",
        "_slice_bits",
        "_slice_mask",
        "_slice_start_mask",
        "_slices",
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
            preferred_bytes=header.cluster_size,
            cluster_size_bytes=header.cluster_size,
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
        # What is not allocated may be the backing file's, now, or when the image is next opened over it.
        self._backed = backing is not None or header.backing_file is not None
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._cluster_mask = -header.cluster_size
        self._offset_in_cluster = header.cluster_size - 1
        self._odd_bits = image.mapping.odd_bits
        self._l1 = image.l1
        self._l2_bits = header.cluster_bits - 3
        slice_bytes = min(SLICE_BYTES_MAX, header.cluster_size)
        self._slice_bits = (slice_bytes // 8).bit_length() - 1
        self._slice_mask = (1 << self._slice_bits) - 1
        self._slice_start_mask = header.cluster_size - slice_bytes
        self._l2: SliceCache[array[int]] = SliceCache(slice_bytes, l2_cache_bytes, self._load_slice)
        self._slices = self._l2.slices
        self._allocator = Allocator(image, cache_bytes=refcount_cache_bytes, discard_freed=discard_freed)
        self._commits = Committer(
            image,
            self._l2,
            self._allocator,
            l2_cache_bytes=l2_cache_bytes,
            refcount_cache_bytes=refcount_cache_bytes,
        )
        self._in_flight = InFlight(serialise=serialise)
        self._flights = SingleFlight()

    # The six operations.

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`: where the slices are in memory, nobody changes the range, and nothing is compressed."""
        read = self._file.reader()
        return functools.partial(self._read_at_once, read) if read is not None else None

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`: in clusters in a row that are ours alone, their slice in memory, which nobody changes."""
        write = self._file.writer() if self._image.accepts_writes else None
        return functools.partial(self._write_at_once, write) if write is not None else None

    def _read_at_once(self, read: ReadAtOnce, offset: int, into: memoryview) -> bool:
        if not (place := self._place_in_file(offset, len(into))):
            return self._read_parts_at_once(read, offset, into)
        in_flight = self._in_flight
        return not in_flight.would_wait(offset & self._cluster_mask, self._cluster_size) and read(place, into)

    def _place_in_file(self, offset: int, length: int) -> int:
        """Where in the file the range is, if that can be told at first sight, as for most; else 0."""
        cluster = offset >> self._cluster_bits
        table = self._l1[cluster >> self._l2_bits] & _OTHER_BITS
        slice_ = self._slices.get(table + (cluster << 3 & self._slice_start_mask))
        inner = offset & self._offset_in_cluster
        if slice_ is None or inner + length > self._cluster_size:
            return 0
        slice_.used = True
        host = slice_.data[cluster & self._slice_mask] & _OTHER_BITS
        end = host + inner + length
        odd = not host or (host | table) & self._odd_bits
        return host + inner if not odd and (end <= self._file_end or self._is_in_file(end)) else 0

    def _read_parts_at_once(self, read: ReadAtOnce, offset: int, into: memoryview) -> bool:
        """As `_read`, where nothing of it has to wait."""
        length = len(into)
        start, stop, _ = self._claim_bounds(offset, length)
        if length > PIECE_BYTES or self._in_flight.would_wait(start, stop - start):
            return False
        plans = self._plan_at_once(offset, length)
        if plans is not None and len(plans) == 1:
            return self._carry_out_at_once(read, plans[0], offset, into)
        at = 0
        for plan in plans or ():
            if not self._carry_out_at_once(read, plan, offset + at, into[at : at + plan.length]):
                return False
            at += plan.length
        return plans is not None

    def _plan_at_once(self, offset: int, length: int) -> list[Plan] | None:
        """As `_plan`; None where a slice is not in memory."""
        plans: list[Plan] = []
        end = offset + length
        while offset < end:
            cluster = offset >> self._cluster_bits
            index = cluster >> self._l2_bits
            slice_ = None
            if table := self._image.mapping.table_offset(self._l1[index], index, self._file.size):
                slice_ = self._slices.get(table + (cluster << 3 & self._slice_start_mask))
                if slice_ is None:
                    return None
                slice_.used = True
            offset = self._plan_part(plans, slice_, offset, end)
        return plans

    def _carry_out_at_once(self, read: ReadAtOnce, plan: Plan, offset: int, into: memoryview) -> bool:
        if isinstance(plan, Data):
            return plan.host_offset + plan.length <= self._file_end and read(plan.host_offset, into)
        if isinstance(plan, Backing) and self._backing is not None:
            return self._backing.try_pread_into(offset, into)
        if isinstance(plan, Compressed):
            return False
        into[:] = zeroes(plan.length)
        return True

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Node.begin_pread`: a range in a row in the file or in the backing node, whose slices are in memory."""
        start, stop, _ = self._claim_bounds(offset, length)
        in_flight = self._in_flight
        if in_flight.would_wait(start, stop - start):
            return False
        child, place = self._file, self._place_in_file(offset, length)
        if not place:
            plans = self._plan_at_once(offset, length)
            if plans is None or len(plans) != 1:
                return False
            if isinstance(plan := plans[0], Data):
                place = plan.host_offset
            elif isinstance(plan, Backing) and self._backing is not None:
                child, place = self._backing, offset
            else:
                return False
        claim = in_flight.enter(start, stop - start)
        if child.begin_pread(place, length, functools.partial(in_flight.read_ended, claim, ended)):
            return True
        in_flight.leave(claim)
        return False

    def _write_at_once(self, write: WriteAtOnce, offset: int, data: Buffer) -> bool:
        image, bits = self._image, self._cluster_bits
        cluster = offset >> bits
        table = self._l1[cluster >> self._l2_bits] & _OTHER_BITS
        slice_ = self._slices.get(table + (cluster << 3 & self._slice_start_mask))
        inner = offset & self._offset_in_cluster
        if slice_ is None or not image.accepts_writes:
            return False
        slice_.used = True
        if inner + len(data) > self._cluster_size:
            return self._write_run_at_once(write, slice_, offset, data)
        host = slice_.data[cluster & self._slice_mask] - COPIED
        if (
            host <= 0
            or (host >= self._file_end and not self._is_in_file(host + 1))
            or (host | table) & self._odd_bits
            or host in image.metadata
            or self._in_flight.would_wait(cluster << bits, self._cluster_size)
        ):
            return False
        return write(host + inner, data)

    def _write_run_at_once(self, write: WriteAtOnce, slice_: Slice[array[int]], offset: int, data: Buffer) -> bool:
        start, stop, _ = self._claim_bounds(offset, len(data))
        first, count = start >> self._cluster_bits & self._slice_mask, stop - start >> self._cluster_bits
        if first + count > len(slice_.data) or self._in_flight.would_wait(start, stop - start):
            return False
        file_end = self._file_end = self._file.size
        host, run = self._image.mapping.in_place(slice_.data, first, count, file_end)
        if run < count or not self._image.metadata.isdisjoint(range(host, host + stop - start, self._cluster_size)):
            return False
        return write(host + offset - start, data)

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
            return await self._read(offset, length)
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
                if await self._write_in_place(offset, data):
                    return
            finally:
                in_flight.leave(claim)
        claim = in_flight.enter(start, stop - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self._write(offset, memoryview(data))
        finally:
            in_flight.leave(claim)

    def _needs_new(self, offset: int) -> bool:
        """Whether the cluster there cannot be written in place as it is now, as far as that is in memory."""
        cluster = offset >> self._cluster_bits
        table = self._l1[cluster >> self._l2_bits] & _OTHER_BITS
        slice_ = self._slices.get(table + (cluster << 3 & self._slice_start_mask))
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
            first = align_up(offset, self._cluster_size)
            last = end if end == self.size else align_down(end, self._cluster_size)
            whole = first < last and (self._image.mapping.has_zero_flag or (unmap and not self._backed))
            if not whole:
                await self._write_zeroes(offset, end)
                return
            await self._write_zeroes(offset, first)
            await self._empty_clusters(first, last, unmap=unmap)
            await self._write_zeroes(last, end)
        finally:
            self._in_flight.leave(claim)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`. Whole clusters read as zero afterwards; version 2 over a backing node keeps them."""
        if not self._image.accepts_writes:
            await self._prepare()
        _, _, end = self._claim_bounds(offset, length)
        first = align_up(offset, self._cluster_size)
        last = end if end == self.size else align_down(end, self._cluster_size)
        if first >= last or (self._backed and not self._image.mapping.has_zero_flag):
            return
        claim = self._in_flight.enter(first, align_up(last, self._cluster_size) - first, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self._empty_clusters(first, last, unmap=True)
        finally:
            self._in_flight.leave(claim)

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
            for plan in await self._plan(offset, length, STATUS_ENTRIES_MAX):
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
            described["extended-l2"] = False
        return described

    async def close(self) -> None:
        """Commits what is dirty, frees included, unless the image was given up before."""
        while (self._commits.dirty or self._commits.running) and self._image.failure is None:
            await self._commits.flush()

    async def _prepare(self) -> None:
        while not self._image.accepts_writes:
            await self._flights.run("prepare", self._image.prepare_writing)

    def _claim_bounds(self, offset: int, length: int) -> tuple[int, int, int]:
        """The range rounded outward to clusters, and its own end."""
        return align_down(offset, self._cluster_size), align_up(offset + length, self._cluster_size), offset + length

    # Look-up.

    async def _load_slice(self, offset: int) -> array[int]:
        return decode_table(await self._image.read(offset, self._l2.slice_bytes))

    async def _slice(self, cluster: int) -> Slice[array[int]] | None:
        """The slice with the entry of a guest cluster, None if there is no L2 table. It is current until a wait."""
        index = cluster >> self._l2_bits
        while True:
            entry = self._l1[index]
            table = self._image.mapping.table_offset(entry, index, self._file.size)
            if not table:
                return None
            slice_ = await self._l2.fetch(table + (cluster << 3 & self._slice_start_mask))
            # While it was read the table may have moved, and its old place may have got another use.
            if self._l1[index] == entry:
                return slice_

    async def _plan(self, offset: int, length: int, entries_max: int | None = None) -> list[Plan]:
        """What the range consists of, or the first part of it where `entries_max` entries were not enough."""
        bits = self._cluster_bits
        plans: list[Plan] = []
        end = offset + length
        seen = 0
        while offset < end and (entries_max is None or seen < entries_max):
            cluster = offset >> bits
            slice_ = await self._slice(cluster)
            stop = self._plan_part(plans, slice_, offset, end)
            seen += (stop - offset >> bits) + 1 if slice_ is not None else 1
            offset = stop
        return plans

    def _plan_part(self, plans: list[Plan], slice_: Slice[array[int]] | None, offset: int, end: int) -> int:
        """Plans up to the end of the slice that `offset` is in, None if it has no L2 table; returns where that is."""
        bits = self._cluster_bits
        cluster = offset >> bits
        if slice_ is None:
            stop = min(((cluster >> self._l2_bits) + 1) << self._l2_bits + bits, end)
            join_backing(plans, stop - offset)
        else:
            first = cluster & self._slice_mask
            stop = min((cluster - first + (1 << self._slice_bits)) << bits, end)
            file_end = self._file_end = self._file.size
            inner = offset & self._offset_in_cluster
            self._image.mapping.plan(plans, slice_.data, first, cluster, inner, stop - offset, file_end)
        return stop

    # Reading. The caller holds a claim.

    async def _read(self, offset: int, length: int) -> Buffer:
        plans = await self._plan(offset, length)
        if len(plans) == 1:
            return await self._carry_out(plans[0], offset)
        data = bytearray(length)
        at = 0
        for plan in plans:
            if not isinstance(plan, Zero):
                data[at : at + plan.length] = await self._carry_out(plan, offset + at)
            if ends_piece(at, plan.length):
                await asyncio.sleep(0)
            at += plan.length
        return data

    async def _carry_out(self, plan: Plan, offset: int) -> Buffer:
        if isinstance(plan, Data):
            return await self._image.read(plan.host_offset, plan.length)
        if isinstance(plan, Zero):
            return zeroes(plan.length)
        if isinstance(plan, Compressed):
            return await self._image.read_compressed(plan)
        return await read_backing(self._backing, offset, plan.length)

    # Writing. The caller holds a claim, alone but for `_write_in_place`.

    async def _write_in_place(self, offset: int, data: Buffer) -> bool:
        """Writes `data` if every cluster of it can be written where it is; else writes nothing and returns False."""
        bits = self._cluster_bits
        runs: list[tuple[int, int]] = []
        position, end = offset, offset + len(data)
        while position < end:
            cluster = position >> bits
            slice_ = await self._slice(cluster)
            if slice_ is None:
                return False
            first = cluster & self._slice_mask
            count = min((end - 1 >> bits) - cluster + 1, (1 << self._slice_bits) - first)
            file_end = self._file_end = self._file.size
            host, run = self._image.mapping.in_place(slice_.data, first, count, file_end)
            if not run:
                return False
            stop = min((cluster + run) << bits, end)
            runs.append((host + (position & self._offset_in_cluster), stop - position))
            position = stop
        view = memoryview(data)
        at = 0
        for host, length in runs:
            await self._image.check_overlap(host, length)
            await self._file.pwrite(host, view[at : at + length])
            if ends_piece(at, length):
                await asyncio.sleep(0)
            at += length
        return True

    async def _write(self, offset: int, view: memoryview) -> None:
        """Writes in place where that may be, to new clusters elsewhere; slice by slice."""
        bits = self._cluster_bits
        while view:
            cluster = offset >> bits
            slice_ = await self._own_slice(cluster)
            slice_.pins += 1
            try:
                first = cluster & self._slice_mask
                length = min(len(view), ((cluster - first + (1 << self._slice_bits)) << bits) - offset)
                await self._write_in_slice(slice_, offset, view[:length])
            finally:
                slice_.pins -= 1
            offset += length
            view = view[length:]

    async def _write_in_slice(self, slice_: Slice[array[int]], offset: int, view: memoryview) -> None:
        bits = self._cluster_bits
        mapping = self._image.mapping
        while view:
            cluster = offset >> bits
            first = cluster & self._slice_mask
            count = (offset + len(view) - 1 >> bits) - cluster + 1
            host, run = mapping.in_place(slice_.data, first, count, self._file.size)
            length = min(len(view), ((cluster + max(run, 1)) << bits) - offset)
            if run:
                host += offset & self._offset_in_cluster
                await self._image.check_overlap(host, length)
                await self._file.pwrite(host, view[:length])
            else:
                length = await self._write_new(slice_, first, count, offset, view)
            offset += length
            view = view[length:]

    async def _write_new(self, slice_: Slice[array[int]], first: int, count: int, offset: int, view: memoryview) -> int:
        """Writes the start of `view` to new clusters and links them from `first` on; returns the bytes written."""
        bits, entries = self._cluster_bits, slice_.data
        cluster = offset >> bits
        mapping, file_end = self._image.mapping, self._file.size
        # What cannot be written in place, up to where it can again. Bad entries are found before anything is written.
        new = 1
        while new < count and not mapping.in_place(entries, first + new, 1, file_end)[1]:
            new += 1
        old = [mapping.host_clusters(entries[first + at], cluster + at, file_end) for at in range(new)]
        entry = entries[first]
        host = entry & ~(COPIED | ZERO_FLAG)
        set_aside = entry & COPIED and entry & ZERO_FLAG and not entry & COMPRESSED and host < file_end
        if set_aside:
            # For this very cluster, and read by nobody: it can be used, as a whole.
            await self._image.check_overlap(host, 1)
            run, old = Run(host, 1, fresh=False), [None]
        else:
            run = await self._allocator.allocate(new)
        length = min(len(view), ((cluster + run.clusters) << bits) - offset)
        try:
            await self._fill(run, entries, first, offset, view[:length])
        except BaseException:
            if not set_aside:
                self._allocator.free(run.offset, run.clusters)
            raise
        for at in range(run.clusters):
            entries[first + at] = run.offset + (at << bits) | COPIED
            gone = old[at]
            if gone is not None:
                self._allocator.free(gone.first << bits, gone.clusters)
        self._l2.mark_dirty(slice_)
        return length

    async def _fill(self, run: Run, entries: array[int], first: int, offset: int, view: memoryview) -> None:
        """Writes `view`, and around it the old content of the clusters it covers in part, to new host clusters."""
        size = self._cluster_size
        start, end = offset & -size, offset + len(view)
        stop = start + run.clusters * size
        head, tail = offset - start, stop - end
        parts: list[Buffer] = []
        if head or tail:
            last = first + run.clusters - 1
            blank = (not head or self._blank(entries[first])) and (not tail or self._blank(entries[last]))
            if blank and run.fresh and self._file.node.limits.reads_zero_when_new:
                await self._file.pwrite(run.offset + head, view)
                return
            # Bytes past the image's end are zeroes, whatever the backing node holds there.
            visible = min(stop, self.size)
            if run.clusters == 1 and not blank:
                whole = await self._read(start, visible - start)
                if visible < stop or not (type(whole) is bytearray or spares.is_spare(whole)):
                    whole = bytearray(whole) + zeroes(stop - visible)
                # What was read is ours alone, but for constants and what is kept: it need not be copied once more.
                memoryview(whole)[head : end - start] = view
                await self._file.pwrite(run.offset, whole)
                spares.give(whole)
                return
            before = await self._read(start, head) if head else b""
            after = await self._read(end, visible - end) if end < visible else b""
            parts = [before, view, after, zeroes(stop - max(visible, end))]
        await self._file.pwrite(run.offset, b"".join(parts) if parts else view)

    def _blank(self, entry: int) -> bool:
        """Whether a cluster with that entry reads as zeroes, as far as that is known without a look at other nodes."""
        if entry & COMPRESSED:
            return False
        return bool(entry & ZERO_FLAG) or (not entry and self._backing is None)

    async def _write_zeroes(self, offset: int, end: int) -> None:
        """Writes zeroes one by one, but not where there are some by the tables' word; piece by piece."""
        while offset < end:
            length = min(end - offset, PIECE_BYTES)
            plans = await self._plan(offset, length)
            if not all(self._reads_zero(plan) for plan in plans):
                await self._write(offset, memoryview(zeroes(length)))
            offset += length
            if offset < end:
                await asyncio.sleep(0)

    def _reads_zero(self, plan: Plan) -> bool:
        return isinstance(plan, Zero) or (isinstance(plan, Backing) and not self._backed)

    async def _empty_clusters(self, offset: int, end: int, *, unmap: bool) -> None:
        """Makes whole clusters read as zeroes by their entries alone; with `unmap` their host clusters are freed.

        `end` is a multiple of the cluster size, or the end of the image.
        """
        bits = self._cluster_bits
        mapping = self._image.mapping
        cluster, stop = offset >> bits, align_up(end, self._cluster_size) >> bits
        slices = 0
        while cluster < stop:
            if not self._backed and not self._l1[cluster >> self._l2_bits]:
                cluster = ((cluster >> self._l2_bits) + 1) << self._l2_bits
                continue
            slice_ = await self._own_slice(cluster)
            entries, file_end = slice_.data, self._file.size
            first = cluster & self._slice_mask
            count = min(stop - cluster, (1 << self._slice_bits) - first)
            for at in range(count):
                entry = entries[first + at]
                emptied = self._emptied(entry, unmap)
                if emptied != entry:
                    gone = mapping.host_clusters(entry, cluster + at, file_end)
                    entries[first + at] = emptied
                    self._l2.mark_dirty(slice_)
                    if gone is not None and emptied <= ZERO_FLAG:
                        self._allocator.free(gone.first << bits, gone.clusters)
            cluster += count
            slices += 1
            if slices % _SLICES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)

    def _emptied(self, entry: int, unmap: bool) -> int:
        """What becomes of an entry whose cluster shall read as zeroes."""
        if not self._backed and (unmap or not entry):
            return 0
        if unmap or entry & COMPRESSED:
            return ZERO_FLAG
        return entry | ZERO_FLAG

    async def _own_slice(self, cluster: int) -> Slice[array[int]]:
        """The slice with a guest cluster's entry, in an L2 table that is ours alone; made if there was none.

        It is in the cache until a wait. Where too much is dirty it waits for a commit first.
        """
        if self._commits.pressing:
            await self._commits.flush()
        index = cluster >> self._l2_bits
        while True:
            if not self._l1[index] & COPIED:
                await self._flights.run(index, lambda: self._make_table(index))
                continue
            slice_ = await self._slice(cluster)
            if slice_ is not None:
                return slice_

    async def _make_table(self, index: int) -> None:
        """Gives an L1 entry a table of its own: empty, or a copy of one that is shared with a snapshot."""
        image = self._image
        entry = self._l1[index]
        if entry & COPIED:
            return
        size = self._cluster_size
        old = image.mapping.table_offset(entry, index, self._file.size)
        content = await image.read(old, size) if old else bytes(size)
        run = await self._allocator.allocate(1)
        try:
            await self._file.pwrite(run.offset, content)
        except BaseException:
            self._allocator.free(run.offset)
            raise
        self._l2.forget(run.offset, size)
        image.metadata.add(run.offset)
        self._l1[index] = run.offset | COPIED
        image.l1_dirty.add(index)
        if old:
            image.metadata.discard(old)
            self._allocator.free(old)
