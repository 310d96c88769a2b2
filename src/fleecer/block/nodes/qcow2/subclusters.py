"""Images with extended L2 entries: what is written, allocated and emptied by subclusters, of which a cluster has 32.

A write to a new cluster fills up the subclusters that it touches, not the cluster: nothing else is read or written, and
where it touches whole ones, as of 4 KiB in clusters of 64 KiB, nothing at all is filled up.

Invariants: those of node.py, and
- a bitmap says that a subcluster is allocated only after all of it has been written;
- claims are still on whole clusters, so that one entry is changed by one request at a time.
"""

from __future__ import annotations

from array import array

from fleecer.block.nodes.qcow2.allocator import Run
from fleecer.block.nodes.qcow2.metadata import Slice
from fleecer.block.nodes.qcow2.node import Qcow2Node
from fleecer.block.nodes.qcow2.writing import Writer
from fleecer.formats.qcow2.subclusters import ALL, SUBCLUSTERS, ExtendedMapping
from fleecer.formats.qcow2.tables import COMPRESSED, COPIED
from fleecer.ranges import Buffer, WriteAtOnce, zeroes


class SubclusterWriter(Writer):
    """As `Writer`, by subclusters."""

    mapping: ExtendedMapping

    # At once.

    def write_new_at_once(self, write: WriteAtOnce, slice_: Slice[array[int]], offset: int, data: Buffer) -> bool:
        """See `Writer`: whole subclusters, in one cluster of our own or in clusters that have none yet."""
        length, entries = len(data), slice_.data
        if (offset | length) & self.unit_bytes - 1:
            return False
        bits, half = self._cluster_bits, len(entries) // 2
        first = offset >> bits & self._reader.slice_mask
        stop = first + (offset + length - 1 >> bits) - (offset >> bits) + 1
        if entries[first]:
            return stop == first + 1 and self._add_at_once(write, slice_, first, offset, data)
        if any(entries[first:stop]) or any(bitmap & ALL for bitmap in entries[first + half : stop + half]):
            return False
        return self._allocate_at_once(write, slice_, stop - first, offset, data)

    def _fill_at_once(self, write: WriteAtOnce, run: Run, entries: array[int], offset: int, data: Buffer) -> bool:
        return write(run.offset + (offset & self._offset_in_cluster), data)

    def _add_at_once(
        self, write: WriteAtOnce, slice_: Slice[array[int]], index: int, offset: int, data: Buffer
    ) -> bool:
        entries = slice_.data
        host, bitmap = self._own_host(entries, index), entries[index + len(entries) // 2]
        if (
            not host
            or bitmap >> SUBCLUSTERS & bitmap
            or host in self._image.metadata
            or not self._may_change_at_once(offset, 1)
        ):
            return False
        inner = offset & self._offset_in_cluster
        if not write(host + inner, data):
            return False
        mask = self.mapping.mask(inner, len(data))
        entries[index + len(entries) // 2] = bitmap & ~(mask << SUBCLUSTERS) | mask
        self._reader.cache.mark_dirty(slice_)
        return True

    # With waits.

    async def _write_new(self, slice_: Slice[array[int]], offset: int, view: memoryview) -> int:
        bits, entries = self._cluster_bits, slice_.data
        first = offset >> bits & self._reader.slice_mask
        if not entries[first]:
            return await self._write_unallocated(slice_, offset, view)
        if not self._own_host(entries, first):
            return await self._replace(slice_, first, offset, view)
        view = view[: self._cluster_size - (offset & self._offset_in_cluster)]
        host = self.mapping.subclusters(entries, first, offset >> bits).host
        await self._image.check_overlap(host, 1)
        await self._fill_up(entries, host, offset, view)
        self._link(slice_, host, offset, len(view))
        return len(view)

    async def _write_unallocated(self, slice_: Slice[array[int]], offset: int, view: memoryview) -> int:
        bits, entries = self._cluster_bits, slice_.data
        cluster = offset >> bits
        first, count = cluster & self._reader.slice_mask, (offset + len(view) - 1 >> bits) - cluster + 1
        new = 0
        while new < count and not entries[first + new]:
            self.mapping.subclusters(entries, first + new, cluster + new)
            new += 1
        run = await self._allocator.allocate(new)
        view = view[: ((cluster + run.clusters) << bits) - offset]
        try:
            await self._fill_up(entries, run.offset, offset, view)
        except BaseException:
            self._allocator.free(run.offset, run.clusters)
            raise
        self._link(slice_, run.offset, offset, len(view))
        return len(view)

    async def _replace(self, slice_: Slice[array[int]], first: int, offset: int, view: memoryview) -> int:
        """Writes to a new cluster in place of one that is packed or not ours alone: all of its content moves there."""
        entries, cluster = slice_.data, offset >> self._cluster_bits
        view = view[: self._cluster_size - (offset & self._offset_in_cluster)]
        gone = self.mapping.host_clusters(entries, first, cluster, self._file.size)
        run = await self._allocator.allocate(1)
        try:
            await self._fill(run, entries, first, offset, view)
        except BaseException:
            self._allocator.free(run.offset)
            raise
        entries[first], entries[first + len(entries) // 2] = run.offset | COPIED, ALL
        self._reader.cache.mark_dirty(slice_)
        if gone is not None:
            self._allocator.free(gone.first << self._cluster_bits, gone.clusters)
        return len(view)

    async def _fill_up(self, entries: array[int], host: int, offset: int, view: memoryview) -> None:
        """Writes `view` into clusters in a row from `host` on, and the old content of what it touches a part of."""
        unit, in_cluster = self.unit_bytes, self._offset_in_cluster
        end = offset + len(view)
        start, stop = offset & -unit, end + unit - 1 & -unit
        last = (end - 1 >> self._cluster_bits & self._reader.slice_mask) + len(entries) // 2
        if entries[last] & self.mapping.mask(end - 1 & in_cluster, 1):
            stop = end  # the rest of that subcluster is there already
        place = host + (start & in_cluster)
        if start == offset and stop == end:
            await self._file.pwrite(place, view)
            return
        # Bytes past the image's end are zeroes, whatever the backing node holds there.
        visible = max(min(stop, self._size), end)
        before = await self._reader.read(start, offset - start) if start < offset else b""
        after = await self._reader.read(end, visible - end) if end < visible else b""
        await self._file.pwrite(place, b"".join((before, view, after, zeroes(stop - visible))))

    def _own_host(self, entries: array[int], index: int) -> int:
        """Where the cluster is, if it is in the file and ours alone, so that it may be written to; else 0."""
        host = entries[index] - COPIED
        return host if 0 < host < self._file.size and not host & self.mapping.odd_bits else 0

    def _link(self, slice_: Slice[array[int]], host: int, offset: int, length: int) -> None:
        """See `Writer._link`: the subclusters of the range."""
        entries, size = slice_.data, self._cluster_size
        index, half = offset >> self._cluster_bits & self._reader.slice_mask, len(entries) // 2
        inner = offset & self._offset_in_cluster
        while length:
            part = min(length, size - inner)
            mask = self.mapping.mask(inner, part)
            entries[index] = host | COPIED
            entries[index + half] = entries[index + half] & ~(mask << SUBCLUSTERS) | mask
            host, index, inner, length = host + size, index + 1, 0, length - part
        self._reader.cache.mark_dirty(slice_)

    # Emptied.

    async def _empty_in_slice(self, slice_: Slice[array[int]], offset: int, end: int, *, unmap: bool) -> None:
        bits, entries = self._cluster_bits, slice_.data
        slice_.pins += 1
        try:
            while offset < end:
                index = offset >> bits & self._reader.slice_mask
                inner = offset & self._offset_in_cluster
                stop = min(end, offset - inner + self._cluster_size)
                if not inner and (stop == self._size or not stop & self._offset_in_cluster):
                    self._empty_cluster(slice_, index, offset >> bits, unmap=unmap)
                elif entries[index] & COMPRESSED:
                    await self._write_in_slice(slice_, offset, memoryview(zeroes(stop - offset)))
                else:
                    self._empty_subclusters(slice_, index, offset, stop, unmap=unmap)
                offset = stop
        finally:
            slice_.pins -= 1

    def _empty_cluster(self, slice_: Slice[array[int]], index: int, cluster: int, *, unmap: bool) -> None:
        entry = slice_.data[index]
        if not self.backed and (unmap or not entry):
            self._set(slice_, index, cluster, 0, 0)
        elif unmap or entry & COMPRESSED:
            self._set(slice_, index, cluster, 0, ALL << SUBCLUSTERS)
        else:
            self._set(slice_, index, cluster, entry, ALL << SUBCLUSTERS)

    def _empty_subclusters(self, slice_: Slice[array[int]], index: int, offset: int, end: int, *, unmap: bool) -> None:
        cluster = offset >> self._cluster_bits
        mask = self.mapping.mask(offset & self._offset_in_cluster, end - offset)
        _, allocated, zero = self.mapping.subclusters(slice_.data, index, cluster)
        entry = slice_.data[index]
        allocated &= ~mask
        if not allocated and unmap:
            entry = 0  # nothing of it is left
        zero = zero | mask if entry or self.backed else 0
        self._set(slice_, index, cluster, entry, zero << SUBCLUSTERS | allocated)

    def _set(self, slice_: Slice[array[int]], index: int, cluster: int, entry: int, bitmap: int) -> None:
        """Changes what an entry says. A host cluster that it gives up is freed."""
        entries = slice_.data
        half = len(entries) // 2
        if entries[index] == entry and entries[index + half] == bitmap:
            return
        gone = self.mapping.host_clusters(entries, index, cluster, self._file.size)
        entries[index], entries[index + half] = entry, bitmap
        self._reader.cache.mark_dirty(slice_)
        if gone is not None and not entry:
            self._allocator.free(gone.first << self._cluster_bits, gone.clusters)


class ExtendedQcow2Node(Qcow2Node):
    """An open qcow2 image with extended L2 entries. Made by `open_qcow2` (opening.py)."""

    __slots__ = ()

    writer_class = SubclusterWriter
    _writer: SubclusterWriter

    def _place(self, offset: int, length: int) -> int:
        inner = offset & self._offset_in_cluster
        if inner + length > self._cluster_size:
            return 0
        cluster = offset >> self._cluster_bits
        slice_ = self._reader.slice_in_memory(cluster)
        if slice_ is None:
            return 0 if self._l1[cluster >> self._l2_bits] else self._in_backing(offset + length)
        slice_.used = True
        mapping, index = self._writer.mapping, cluster & self._slice_mask
        place = mapping.stored(slice_.data, index, inner, length)
        if not place:
            is_absent = mapping.is_absent(slice_.data, index, cluster, inner, length, self._file.size)
            return self._in_backing(offset + length) if is_absent else 0
        return place if place + length <= self._file_end or self._is_in_file(place + length) else 0

    def _write_at_once(self, write: WriteAtOnce, offset: int, data: Buffer) -> bool:
        cluster, length = offset >> self._cluster_bits, len(data)
        slice_ = self._reader.slice_in_memory(cluster)
        if slice_ is None or not self._image.accepts_writes:
            return False
        slice_.used = True
        inner = offset & self._offset_in_cluster
        if inner + length > self._cluster_size:
            return self._write_run_at_once(write, slice_, offset, data)
        index = cluster & self._slice_mask
        place = self._writer.mapping.stored(slice_.data, index, inner, length) if slice_.data[index] & COPIED else 0
        if (
            not place
            or (place + length > self._file_end and not self._is_in_file(place + length))
            or place - inner in self._image.metadata
        ):
            return self._writer.write_new_at_once(write, slice_, offset, data)
        return not self._in_flight.would_wait(cluster << self._cluster_bits, self._cluster_size) and write(place, data)
