"""What a qcow2 image says of guest bytes, and those bytes read: look-ups in the tables, and plans carried out.

Whoever calls holds a claim on the clusters, or does not give way meanwhile (what is done "at once").

Invariant: a slice that is used was read from where its L1 entry points now, not from where the table was before.
"""

from __future__ import annotations

import asyncio
from array import array

from fleecer.block.edge import Edge
from fleecer.block.nodes.qcow2.backing import read_backing
from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.metadata import Slice, SliceCache
from fleecer.formats.qcow2.tables import COPIED, Backing, Compressed, Data, Plan, Zero, join_backing
from fleecer.ranges import Buffer, ReadAtOnce, ends_piece, zeroes

SLICE_BYTES_MAX = 4096
PLANS_MAX = 4096
"""Where a plan may stop, it does with the slice after so many parts: an entry with subclusters can make 32."""
_OTHER_BITS = COPIED - 1


class Reader:
    """Look-ups in one image, and reads of what they find.

    A slice is a part of an L2 table: of the entry of guest cluster c it is number `c & slice_mask`. It begins
    `c << entry_bits & slice_start_mask` bytes into the table, which covers `1 << l2_bits` clusters.
    """

    def __init__(self, image: Image, backing: Edge | None, l2_cache_bytes: int) -> None:
        header, mapping = image.header, image.mapping
        self._image = image
        self._file = image.file
        self._backing = backing
        self._l1 = image.l1
        self._cluster_bits = header.cluster_bits
        self._offset_in_cluster = header.cluster_size - 1
        slice_bytes = min(SLICE_BYTES_MAX, header.cluster_size)
        self._odd_bits = mapping.odd_bits
        self.entry_bits = mapping.entry_bits
        self.l2_bits = header.cluster_bits - mapping.entry_bits
        self.slice_bits = (slice_bytes >> mapping.entry_bits).bit_length() - 1
        self.slice_mask = (1 << self.slice_bits) - 1
        self.slice_start_mask = header.cluster_size - slice_bytes
        self.cache: SliceCache[array[int]] = SliceCache(slice_bytes, l2_cache_bytes, self._load_slice)

    # Look-up.

    async def _load_slice(self, offset: int) -> array[int]:
        return self._image.mapping.decode(await self._image.read(offset, self.cache.slice_bytes))

    async def slice(self, cluster: int) -> Slice[array[int]] | None:
        """The slice with the entry of a guest cluster, None if there is no L2 table. It is current until a wait."""
        index = cluster >> self.l2_bits
        while True:
            entry = self._l1[index]
            table = self._image.mapping.table_offset(entry, index, self._file.size)
            if not table:
                return None
            slice_ = await self.cache.fetch(table + (cluster << self.entry_bits & self.slice_start_mask))
            # While it was read the table may have moved, and its old place may have got another use.
            if self._l1[index] == entry:
                return slice_

    def slice_in_memory(self, cluster: int) -> Slice[array[int]] | None:
        """The slice with the entry of a guest cluster, where it need not be read."""
        table = self._l1[cluster >> self.l2_bits] & _OTHER_BITS
        if table & self._odd_bits:
            return None  # what is there may be a slice of another table
        return self.cache.slices.get(table + (cluster << self.entry_bits & self.slice_start_mask))

    async def plan(self, offset: int, length: int, entries_max: int | None = None) -> list[Plan]:
        """What the range consists of, or the first part of it where `entries_max` entries were not enough."""
        bits = self._cluster_bits
        plans: list[Plan] = []
        end = offset + length
        seen = 0
        while offset < end and (entries_max is None or (seen < entries_max and len(plans) < PLANS_MAX)):
            slice_ = await self.slice(offset >> bits)
            stop = self._plan_part(plans, slice_, offset, end)
            seen += (stop - offset >> bits) + 1 if slice_ is not None else 1
            offset = stop
        return plans

    def plan_at_once(self, offset: int, length: int) -> list[Plan] | None:
        """As `plan`; None where a slice is not in memory."""
        plans: list[Plan] = []
        end = offset + length
        while offset < end:
            cluster = offset >> self._cluster_bits
            index = cluster >> self.l2_bits
            slice_ = None
            if self._image.mapping.table_offset(self._l1[index], index, self._file.size):
                slice_ = self.slice_in_memory(cluster)
                if slice_ is None:
                    return None
                slice_.used = True
            offset = self._plan_part(plans, slice_, offset, end)
        return plans

    def _plan_part(self, plans: list[Plan], slice_: Slice[array[int]] | None, offset: int, end: int) -> int:
        """Plans up to the end of the slice that `offset` is in, None if it has no L2 table; returns where that is."""
        bits = self._cluster_bits
        cluster = offset >> bits
        if slice_ is None:
            stop = min(((cluster >> self.l2_bits) + 1) << self.l2_bits + bits, end)
            join_backing(plans, stop - offset)
        else:
            first = cluster & self.slice_mask
            stop = min((cluster - first + (1 << self.slice_bits)) << bits, end)
            inner = offset & self._offset_in_cluster
            mapping, file_end = self._image.mapping, self._file.size
            mapping.plan(plans, slice_.data, first, cluster, inner, stop - offset, file_end)
        return stop

    # Reading.

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes, from wherever they are."""
        plans = await self.plan(offset, length)
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

    def read_at_once(self, read: ReadAtOnce, read_backing: ReadAtOnce, offset: int, into: memoryview) -> bool:
        """As `read`, where nothing of it has to wait, by what reads the file and the backing node; see `ReadAtOnce`."""
        plans = self.plan_at_once(offset, len(into))
        if plans is not None and len(plans) == 1:
            return self._carry_out_at_once(read, read_backing, plans[0], offset, into)
        at = 0
        for plan in plans or ():
            if not self._carry_out_at_once(read, read_backing, plan, offset + at, into[at : at + plan.length]):
                return False
            at += plan.length
        return plans is not None

    def _carry_out_at_once(
        self, read: ReadAtOnce, read_backing: ReadAtOnce, plan: Plan, offset: int, into: memoryview
    ) -> bool:
        if isinstance(plan, Data):
            return plan.host_offset + plan.length <= self._file.size and read(plan.host_offset, into)
        if isinstance(plan, Backing) and self._backing is not None:
            return offset + plan.length <= self._backing.size and read_backing(offset, into)
        if isinstance(plan, Compressed):
            return False
        into[:] = zeroes(plan.length)
        return True
