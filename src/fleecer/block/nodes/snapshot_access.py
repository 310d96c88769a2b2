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
from typing import NamedTuple

from fleecer.block.copier import FREEZE_MAX_BYTES, Copier, Snapshot
from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, merge_extents
from fleecer.errors import IoError
from fleecer.ranges import PIECE_BYTES, Buffer, ReadAtOnce, align_down, align_up, ends_piece

_STATUS_RUNS_MAX = 64
"""Runs told of at once: each is little work, but there may be thousands of them."""
PRESERVED = 1
"""Flag in `preserved_status`: the old data is in a scratch; without it the range is still shared with the disk."""


class _Run(NamedTuple):
    """Bytes from `start` to `end` that are in one place: with the status `flags` in a scratch; None: on the disk."""

    start: int
    end: int
    flags: int | None


class SnapshotAccessNode(Node):
    """One snapshot of one disk. `filter_edge` leads to the copy-before-write node and keeps it alive."""

    driver = "snapshot-access"

    __slots__ = ("_copier", "_in_flight", "snapshot")

    def __init__(
        self, name: str, filter_edge: Edge, copier: Copier, snapshot: Snapshot, *, may_discard: bool = False
    ) -> None:
        limits = Limits(
            preferred_bytes=max(copier.cluster_size_bytes, copier.source.node.limits.preferred_bytes),
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

    def _read_at_once(self, offset: int, into: memoryview) -> bool:
        length = len(into)
        holder, run = self._locate(offset, length)
        if run == length:
            return self._side(holder).try_pread_into(offset, into)
        if length > PIECE_BYTES:
            return False
        position = 0
        while self._side(holder).try_pread_into(offset + position, into[position : position + run]):
            position += run
            if position == length:
                return True
            holder, run = self._locate(offset + position, length - position)
        return False

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
        """What the range held at the instant. It may stop early."""
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
        runs = self._status_runs(offset, length)
        on_disk = [run for run in runs if run.flags is None]
        if not on_disk:
            return merge_extents([Extent(run.end - run.start, run.flags or 0) for run in runs])
        start, end = on_disk[0].start, on_disk[-1].end
        claim = self._copier.freeze(self.snapshot, start, end - start)
        try:
            found = await self._copier.source.block_status(start, end - start)
        finally:
            self._copier.thaw(self.snapshot, claim)
        self.snapshot.check()
        return merge_extents(_status_of(runs, start, found))

    def _status_runs(self, offset: int, length: int) -> list[_Run]:
        """Runs from `offset` on, in order, as many as are told of at once: what a scratch holds, and what the disk."""
        runs: list[_Run] = []
        end = offset + self._readable_length(offset, length)
        while offset < end and len(runs) < _STATUS_RUNS_MAX:
            holder, run = self._locate(offset, end - offset, run_max=end - offset)
            flags = None
            if holder is not None:
                run, flags = self._held_status(holder, offset, run)
            runs.append(_Run(offset, offset + run, flags))
            offset += run
        return runs

    def _held_status(self, holder: Snapshot, offset: int, length: int) -> Extent:
        """What a scratch holds there, of one kind. Known without asking it, which would take as long as a read."""
        blank, end = holder.blank.run(*self._copier.clusters(offset, length))
        return Extent(min(length, end * self._copier.cluster_size_bytes - offset), HOLE | ZERO if blank else 0)

    def _readable_length(self, offset: int, length: int) -> int:
        """How much from `offset` on, which is readable, has not been discarded by a reader."""
        if self.snapshot.revoked is None:
            return length
        _, end = self.snapshot.revoked.run(*self._copier.clusters(offset, length))
        return min(length, end * self._copier.cluster_size_bytes - offset)

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


def _status_of(runs: list[_Run], start: int, on_disk: list[Extent]) -> list[Extent]:
    """The extents of `runs`, given those of the disk from `start` on; up to where these go."""
    extents: list[Extent] = []
    index, stop = 0, start + on_disk[0].length
    for run in runs:
        at = run.start
        while at < run.end:
            if run.flags is not None:
                extents.append(Extent(run.end - at, run.flags))
                break
            while stop <= at:
                index += 1
                if index == len(on_disk):
                    return extents
                stop += on_disk[index].length
            extents.append(Extent(min(run.end, stop) - at, on_disk[index].flags))
            at += extents[-1].length
    return extents
