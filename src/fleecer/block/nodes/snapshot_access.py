"""snapshot-access: a disk as it was at a snapshot's instant, read-only (QEMU's driver of that name).

A read goes run by run: what was preserved comes from a scratch; what was not is frozen on the disk, read there, and
thawed. Choosing the side and freezing are one step. A broken snapshot is noticed after the read, before its data is
used: what is returned is the past, or an error, never new or mixed data.

A reader may discard what it is through with (`may_discard`): whole clusters inside the range then read as an error, are
no longer copied for this snapshot, and their scratch is freed once no other snapshot reads it.
"""

from __future__ import annotations

import asyncio
import errno

from fleecer import spares
from fleecer.block.copier import FREEZE_MAX_BYTES, Copier, Snapshot
from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, ReadAtOnce, merge_extents
from fleecer.errors import IoError
from fleecer.ranges import PIECE_BYTES, Buffer, align_down, align_up, ends_piece

_STATUS_RUNS_MAX = 64
PRESERVED = 1
"""Flag in `preserved_status`: the old data is in a scratch; without it the range is still shared with the disk."""


class SnapshotAccessNode(Node):
    """One snapshot of one disk. `filter_edge` leads to the copy-before-write node and keeps it alive."""

    driver = "snapshot-access"

    __slots__ = ("_copier", "_in_flight", "snapshot")

    def __init__(
        self, name: str, filter_edge: Edge, copier: Copier, snapshot: Snapshot, *, may_discard: bool = False
    ) -> None:
        limits = Limits(
            preferred_bytes=copier.cluster_size_bytes,
            cluster_size_bytes=copier.cluster_size_bytes,
            zero_is_fast=False,
            can_discard=may_discard,
        )
        super().__init__(name, copier.source.size, limits=limits, read_only=not may_discard)
        self.children = (filter_edge,)
        self.snapshot = snapshot
        self._copier = copier
        # A discard and what reads its range wait for each other, lest a scratch is found emptied.
        self._in_flight = InFlight() if may_discard else None

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`. What is over at once needs no frozen range."""
        return self._read_at_once if self._in_flight is None else None

    def _read_at_once(self, offset: int, length: int) -> Buffer | None:
        holder, run = self._locate(offset, length)
        if run == length:
            return self._side(holder).try_pread(offset, length)
        if length > PIECE_BYTES:
            return None
        data = spares.take(length)
        position = 0
        while True:
            piece = self._side(holder).try_pread(offset + position, run)
            if piece is None:
                spares.give(data)
                return None
            data[position : position + run] = piece
            spares.give(piece)
            position += run
            if position == length:
                return data
            holder, run = self._locate(offset + position, length - position)

    def _side(self, holder: Snapshot | None) -> Edge:
        """Where what `_locate` found is: a scratch, or the disk."""
        return self._copier.source if holder is None else holder.scratch

    async def pread(self, offset: int, length: int) -> Buffer:
        """The bytes as they were. Raises SnapshotBroken, or IoError (EACCES) where the reader discarded the range."""
        if self._in_flight is None:
            return await self._pread(offset, length)
        claim = self._in_flight.enter(offset, length)
        try:
            if claim.blockers:
                await claim.granted()
            return await self._pread(offset, length)
        finally:
            self._in_flight.leave(claim)

    async def _pread(self, offset: int, length: int) -> Buffer:
        holder, run = self._locate(offset, length)
        if run == length:
            return await self._read_run(holder, offset, length)
        data = bytearray(length)
        position = 0
        while position < length:
            holder, run = self._locate(offset + position, length - position)
            data[position : position + run] = await self._read_run(holder, offset + position, run)
            if ends_piece(position, run):
                await asyncio.sleep(0)
            position += run
        return data

    async def _read_run(self, holder: Snapshot | None, offset: int, length: int) -> Buffer:
        """Reads one run. Nothing may be awaited between the `_locate` that found it and this call's first step."""
        if holder is not None:
            data = await holder.scratch.pread(offset, length)
        else:
            claim = self._copier.freeze(self.snapshot, offset, length)
            try:
                data = await self._copier.source.pread(offset, length)
            finally:
                self._copier.thaw(self.snapshot, claim)
        self.snapshot.check()
        return data

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """What the range held at the instant: of one run, so the answer may stop early."""
        if self._in_flight is None:
            return await self._block_status(offset, length)
        claim = self._in_flight.enter(offset, length)
        try:
            if claim.blockers:
                await claim.granted()
            return await self._block_status(offset, length)
        finally:
            self._in_flight.leave(claim)

    async def _block_status(self, offset: int, length: int) -> list[Extent]:
        holder, run = self._locate(offset, length, run_max=length)
        if holder is not None:
            # What a scratch holds is known without asking it: that is a question for each cluster a guest has touched.
            cluster = self._copier.cluster_size_bytes
            blank, end = holder.blank.run(offset // cluster, (offset + run - 1) // cluster + 1)
            extents = [Extent(min(run, end * cluster - offset), HOLE | ZERO if blank else 0)]
        else:
            claim = self._copier.freeze(self.snapshot, offset, run)
            try:
                extents = await self._copier.source.block_status(offset, run)
            finally:
                self._copier.thaw(self.snapshot, claim)
        self.snapshot.check()
        return extents

    async def preserved_status(self, offset: int, length: int) -> list[Extent]:
        """Which of the range is preserved (flag PRESERVED) and which still shared with the disk (0); may stop early."""
        extents: list[Extent] = []
        end = offset + length
        while offset < end and len(extents) < _STATUS_RUNS_MAX:
            holder, run = self._locate(offset, end - offset, run_max=length)
            extents.append(Extent(run, PRESERVED if holder is not None else 0))
            offset += run
        return merge_extents(extents)

    async def discard(self, offset: int, length: int) -> None:
        """Gives whole clusters inside the range back. A partial one at either end is kept, but for the disk's last."""
        cluster = self._copier.cluster_size_bytes
        start = align_up(offset, cluster)
        end = (
            align_up(offset + length, cluster) if offset + length == self.size else align_down(offset + length, cluster)
        )
        if start >= end or self._in_flight is None:
            return
        claim = self._in_flight.enter(start, end - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            first, last = start // cluster, end // cluster
            await self._copier.copies_ended(first, last)
            for holder, begin, stop in self._copier.revoke(self.snapshot, first, last):
                at = begin * cluster
                await holder.scratch.discard(at, min(stop * cluster, holder.scratch.size) - at)
        finally:
            self._in_flight.leave(claim)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """Refused: the past does not change."""
        raise IoError(errno.EPERM, self.name, "write", offset, len(data), "a snapshot cannot be written to")

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """Refused: the past does not change."""
        raise IoError(errno.EPERM, self.name, "write zeroes", offset, length, "a snapshot cannot be written to")

    async def flush(self) -> None:
        """Nothing to do: nothing is ever written through this node."""

    def _locate(self, offset: int, length: int, run_max: int = FREEZE_MAX_BYTES) -> tuple[Snapshot | None, int]:
        """Whose scratch holds `offset` (None: the disk), and for how many bytes, at most `length`."""
        cluster = self._copier.cluster_size_bytes
        first = offset // cluster
        holder, end = self._copier.locate(self.snapshot, first, (offset + length - 1) // cluster + 1)
        run = min(end * cluster, offset + length) - offset
        return holder, run if holder is not None else min(run, run_max)
