"""Changes to a qcow2 image: bytes written in place and to new clusters, clusters emptied, L2 tables made.

Whoever calls holds a claim on the clusters, alone but for `write_in_place`; or nobody has one there and nothing gives
way meanwhile (`write_new_at_once`).

Invariants: see node.py. Entries are changed in the same step in which their slice is marked dirty.
"""

from __future__ import annotations

import asyncio
from array import array

from fleecer import spares
from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.nodes.qcow2.allocator import Allocator, Run
from fleecer.block.nodes.qcow2.commit import Committer
from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.metadata import SingleFlight, Slice
from fleecer.block.nodes.qcow2.reading import Reader
from fleecer.formats.qcow2.tables import COMPRESSED, COPIED, ZERO_FLAG, Backing, Plan, Zero
from fleecer.ranges import PIECE_BYTES, Buffer, WriteAtOnce, ends_piece, zeroes

_SLICES_BETWEEN_TURNS = 64


class Writer:
    """All that changes the content or the mapping of one image. `empty` works on whole multiples of `unit_bytes`."""

    def __init__(
        self,
        image: Image,
        reader: Reader,
        backing: Edge | None,
        allocator: Allocator,
        commits: Committer,
        in_flight: InFlight,
    ) -> None:
        header = image.header
        self.unit_bytes = header.subcluster_size
        # What is not allocated may be the backing file's, now, or when the image is next opened over it.
        self.backed = backing is not None or header.backing_file is not None
        self._image = image
        self.mapping = image.mapping
        self._file = image.file
        self._reader = reader
        self._backing = backing
        self._allocator = allocator
        self._commits = commits
        self._in_flight = in_flight
        self._tables = SingleFlight()
        self._size = header.disk_size
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._offset_in_cluster = header.cluster_size - 1
        self._without_host = (0, ZERO_FLAG) if image.mapping.has_zero_flag else (0,)

    # At once.

    def write_new_at_once(self, write: WriteAtOnce, slice_: Slice[array[int]], offset: int, data: Buffer) -> bool:
        """Writes `data`, which ends in the slice, to new clusters in a row, if that takes no wait; see `WriteAtOnce`.

        Only where nobody uses the guest's clusters, and these have no host clusters yet. `write` is the file's.
        """
        bits, entries = self._cluster_bits, slice_.data
        first = offset >> bits & self._reader.slice_mask
        count = (offset + len(data) - 1 >> bits) - (offset >> bits) + 1
        if any(entry not in self._without_host for entry in entries[first : first + count]):
            return False
        return self._allocate_at_once(write, slice_, count, offset, data)

    def _allocate_at_once(
        self, write: WriteAtOnce, slice_: Slice[array[int]], count: int, offset: int, data: Buffer
    ) -> bool:
        """Finds host clusters for the `count` clusters that `data` touches, fills and links them, if nobody uses these
        and nothing has to wait."""
        if not self._may_change_at_once(offset, count):
            return False
        run = self._allocator.find(count)
        if run is None or run.clusters < count:
            return False
        hosts = range(run.offset, run.offset + (count << self._cluster_bits), self._cluster_size)
        if not self._image.metadata.isdisjoint(hosts):
            return False
        try:
            if not self._fill_at_once(write, run, slice_.data, offset, data):
                return False
        except BaseException:
            # What is there now is not known, so it is not fresh any more.
            self._allocator.take(run)
            self._allocator.free(run.offset, count)
            raise
        self._allocator.take(run)
        self._link(slice_, run.offset, offset, len(data))
        return True

    def _may_change_at_once(self, offset: int, count: int) -> bool:
        """Whether nobody uses so many clusters from that of `offset` on, and their L2 table is ours to change now."""
        bits = self._cluster_bits
        cluster = offset >> bits
        return (
            self._image.l1[cluster >> self._reader.l2_bits] & (COPIED | self.mapping.odd_bits) == COPIED
            and not self._in_flight.overlaps(cluster << bits, count << bits)
            and not self._commits.pressing
        )

    def _fill_at_once(self, write: WriteAtOnce, run: Run, entries: array[int], offset: int, data: Buffer) -> bool:
        """As `_fill`, for whole clusters or inside of one."""
        size = self._cluster_size
        head = offset & self._offset_in_cluster
        start, end = offset - head, offset + len(data)
        stop = start + run.clusters * size
        if not head and end == stop:
            return write(run.offset, data)
        if run.clusters > 1 or stop > self._size:
            return False
        if self._blank(entries[offset >> self._cluster_bits & self._reader.slice_mask]):
            blank = run.fresh and self._file.node.limits.reads_zero_when_new
            return blank and write(run.offset + head, data)
        assert self._backing is not None, "an entry without a host cluster is blank where there is no backing node"
        whole = spares.take(size)
        view = memoryview(whole)
        filled = self._backing.try_pread_into(start, view)
        if filled:
            view[head : end - start] = data
            filled = write(run.offset, whole)
        spares.give(whole)
        return filled

    # With waits.

    async def write_in_place(self, offset: int, data: Buffer) -> bool:
        """Writes `data` if all of it can be written where it is; else writes nothing and returns False."""
        bits, reader = self._cluster_bits, self._reader
        runs: list[tuple[int, int]] = []
        position, end = offset, offset + len(data)
        while position < end:
            cluster = position >> bits
            slice_ = await reader.slice(cluster)
            if slice_ is None:
                return False
            first = cluster & reader.slice_mask
            stop = min(end, (cluster - first + (1 << reader.slice_bits)) << bits)
            inner = position & self._offset_in_cluster
            run = self.mapping.in_place(slice_.data, first, inner, stop - position, self._file.size)
            if not run[1]:
                return False
            runs.append(run)
            position += run[1]
        view = memoryview(data)
        at = 0
        for host, length in runs:
            await self._image.check_overlap(host, length)
            await self._file.pwrite(host, view[at : at + length])
            if ends_piece(at, length):
                await asyncio.sleep(0)
            at += length
        return True

    async def write(self, offset: int, view: memoryview) -> None:
        """Writes in place where that may be, to new clusters elsewhere; slice by slice."""
        bits, reader = self._cluster_bits, self._reader
        while view:
            cluster = offset >> bits
            slice_ = await self._own_slice(cluster)
            slice_.pins += 1
            try:
                first = cluster & reader.slice_mask
                length = min(len(view), ((cluster - first + (1 << reader.slice_bits)) << bits) - offset)
                await self._write_in_slice(slice_, offset, view[:length])
            finally:
                slice_.pins -= 1
            offset += length
            view = view[length:]

    async def _write_in_slice(self, slice_: Slice[array[int]], offset: int, view: memoryview) -> None:
        bits, in_cluster, slice_mask = self._cluster_bits, self._offset_in_cluster, self._reader.slice_mask
        while view:
            first, inner = offset >> bits & slice_mask, offset & in_cluster
            host, length = self.mapping.in_place(slice_.data, first, inner, len(view), self._file.size)
            if length:
                await self._image.check_overlap(host, length)
                await self._file.pwrite(host, view[:length])
            else:
                length = await self._write_new(slice_, offset, view)
            offset += length
            view = view[length:]

    async def _write_new(self, slice_: Slice[array[int]], offset: int, view: memoryview) -> int:
        """Writes the start of `view` to new clusters and links them; returns the bytes written."""
        bits, entries = self._cluster_bits, slice_.data
        cluster = offset >> bits
        first, count = cluster & self._reader.slice_mask, (offset + len(view) - 1 >> bits) - cluster + 1
        mapping, file_end = self.mapping, self._file.size
        # What cannot be written in place, up to where it can again. Bad entries are found before anything is written.
        new = 1
        while new < count and not mapping.in_place(entries, first + new, 0, 1, file_end)[1]:
            new += 1
        old = [mapping.host_clusters(entries, first + at, cluster + at, file_end) for at in range(new)]
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
        self._link(slice_, run.offset, offset, length)
        for gone in old[: run.clusters]:
            if gone is not None:
                self._allocator.free(gone.first << bits, gone.clusters)
        return length

    def _link(self, slice_: Slice[array[int]], host: int, offset: int, length: int) -> None:
        """Has the entries say that a range is in the clusters from `host` on, which are ours alone."""
        index, end = offset >> self._cluster_bits, offset + length - 1 >> self._cluster_bits
        for at in range(index, end + 1):
            slice_.data[at & self._reader.slice_mask] = host | COPIED
            host += self._cluster_size
        self._reader.cache.mark_dirty(slice_)

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
            visible = min(stop, self._size)
            if run.clusters == 1 and not blank:
                whole = await self._reader.read(start, visible - start)
                if visible < stop or not (type(whole) is bytearray or spares.is_spare(whole)):
                    whole = bytearray(whole) + zeroes(stop - visible)
                # What was read is ours alone, but for constants and what is kept: it need not be copied once more.
                memoryview(whole)[head : end - start] = view
                await self._file.pwrite(run.offset, whole)
                spares.give(whole)
                return
            before = await self._reader.read(start, head) if head else b""
            after = await self._reader.read(end, visible - end) if end < visible else b""
            parts = [before, view, after, zeroes(stop - max(visible, end))]
        await self._file.pwrite(run.offset, b"".join(parts) if parts else view)

    def _blank(self, entry: int) -> bool:
        """Whether a cluster with that entry reads as zeroes, as far as that is known without a look at other nodes."""
        if entry & COMPRESSED:
            return False
        return bool(entry & ZERO_FLAG) or (not entry and self._backing is None)

    async def write_zeroes(self, offset: int, end: int) -> None:
        """Writes zeroes one by one, but not where there are some by the tables' word; piece by piece."""
        while offset < end:
            length = min(end - offset, PIECE_BYTES)
            plans = await self._reader.plan(offset, length)
            if not all(self._reads_zero(plan) for plan in plans):
                await self.write(offset, memoryview(zeroes(length)))
            offset += length
            if offset < end:
                await asyncio.sleep(0)

    def _reads_zero(self, plan: Plan) -> bool:
        return isinstance(plan, Zero) or (isinstance(plan, Backing) and not self.backed)

    async def empty(self, offset: int, end: int, *, unmap: bool) -> None:
        """Makes whole units read as zeroes by their entries alone; with `unmap` host clusters are freed.

        `end` is a multiple of the unit, or the end of the image.
        """
        bits, reader = self._cluster_bits, self._reader
        slices = 0
        while offset < end:
            cluster = offset >> bits
            if not self.backed and not self._image.l1[cluster >> reader.l2_bits]:
                offset = ((cluster >> reader.l2_bits) + 1) << reader.l2_bits + bits
                continue
            slice_ = await self._own_slice(cluster)
            stop = min(end, ((cluster | reader.slice_mask) + 1) << bits)
            await self._empty_in_slice(slice_, offset, stop, unmap=unmap)
            offset = stop
            slices += 1
            if slices % _SLICES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)

    async def _empty_in_slice(self, slice_: Slice[array[int]], offset: int, end: int, *, unmap: bool) -> None:
        bits, entries, file_end = self._cluster_bits, slice_.data, self._file.size
        cluster = offset >> bits
        first, count = cluster & self._reader.slice_mask, (end - 1 >> bits) - cluster + 1
        for at in range(count):
            entry = entries[first + at]
            emptied = self._emptied(entry, unmap)
            if emptied != entry:
                gone = self.mapping.host_clusters(entries, first + at, cluster + at, file_end)
                entries[first + at] = emptied
                self._reader.cache.mark_dirty(slice_)
                if gone is not None and emptied <= ZERO_FLAG:
                    self._allocator.free(gone.first << bits, gone.clusters)

    def _emptied(self, entry: int, unmap: bool) -> int:
        """What becomes of an entry whose cluster shall read as zeroes."""
        if not self.backed and (unmap or not entry):
            return 0
        if unmap or entry & COMPRESSED:
            return ZERO_FLAG
        return entry | ZERO_FLAG

    # L2 tables.

    async def _own_slice(self, cluster: int) -> Slice[array[int]]:
        """The slice with a guest cluster's entry, in an L2 table that is ours alone; made if there was none.

        It is in the cache until a wait. Where too much is dirty it waits for a commit first.
        """
        if self._commits.pressing:
            await self._commits.flush()
        index = cluster >> self._reader.l2_bits
        while True:
            if not self._image.l1[index] & COPIED:
                await self._tables.run(index, lambda: self._make_table(index))
                continue
            slice_ = await self._reader.slice(cluster)
            if slice_ is not None:
                return slice_

    async def _make_table(self, index: int) -> None:
        """Gives an L1 entry a table of its own: empty, or a copy of one that is shared with a snapshot."""
        image = self._image
        entry = image.l1[index]
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
        self._reader.cache.forget(run.offset, size)
        image.metadata.add(run.offset)
        image.l1[index] = run.offset | COPIED
        image.l1_dirty.add(index)
        if old:
            image.metadata.discard(old)
            self._allocator.free(old)
