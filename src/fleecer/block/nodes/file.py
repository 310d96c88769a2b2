"""file: the bottom of the graph, one regular file or block device (QEMU's drivers file and host_device).

Reads and writes that need not wait happen inside the call; the rest goes to the storage's threads.

Invariants:
- pread(2) and pwrite(2) are not atomic towards each other on all file systems. So whatever goes to a thread or to the
  ring claims its range, reads shared and changes serialising. Nothing is changed inline on a range that is claimed, nor
  read on one that is being changed. Looking and doing are one step, with no await between.
- A flush covers what had returned when it began; what ends while it runs waits for the next. Flushes that come while
  one runs share the next one, and a flush after which nothing changed does nothing.
- The first failed flush is final: the kernel may have thrown the data away, and would say "done" next time. Every later
  flush fails with the same error number until the image is opened anew.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os

from fleecer import eager
from fleecer.block.inflight import InFlight
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, Problem, merge_extents
from fleecer.errors import IoError, UsageError, quoted, told
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce
from fleecer.storage.api import Ended, ReadEnded, Storage
from fleecer.storage.lanes import settle


class FileNode(Node):
    """A storage as a node. It owns the storage and closes it.

    Raises UsageError for a writable storage whose end is not aligned as its requests must be: padding would grow it.
    """

    driver = "file"

    __slots__ = (
        "_changes",
        "_flushes",
        "_is_syncing",
        "_known_data",
        "_poison",
        "_pooled",
        "_synced",
        "_times_emptied",
        "storage",
    )

    def __init__(self, name: str, storage: Storage) -> None:
        limits = storage.limits
        if not storage.read_only and storage.size % limits.alignment_bytes:
            raise UsageError(
                f"image {quoted(storage.name)}: its size of {storage.size} bytes is not a multiple of"
                f" {limits.alignment_bytes}, as writing here needs; resize it, or open it read-only"
            )
        super().__init__(
            name,
            storage.size,
            limits=Limits(
                request_alignment_bytes=limits.alignment_bytes,
                preferred_bytes=limits.preferred_bytes,
                zero_is_fast=limits.zero_is_fast,
                can_discard=limits.can_discard,
                growable=limits.growable,
                reads_zero_when_new=limits.reads_zero_when_new,
            ),
            read_only=storage.read_only,
        )
        self.storage = storage
        self._pooled = InFlight()
        # Changes ended so far, and how many of them are durable. What was there at the start may not be either.
        self._changes = 0 if storage.read_only else 1
        self._synced = 0
        self._is_syncing = False
        self._flushes: list[tuple[int, Ended]] = []  # who waits, and for how many changes
        self._poison: IoError | None = None
        # The run of data found last. Finding out again can cost as much as the run is long, and the file is locked
        # meanwhile. Where somebody else empties a part, it is still no mistake to call that data.
        self._known_data = (0, 0)
        self._times_emptied = 0

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`."""
        if self.storage.reads_wait:
            return None
        return self._read_at_once if self._pooled.changing() else self.storage.try_pread_into

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`."""
        return self._write_at_once

    def serialising_writer(self) -> WriteAtOnce | None:
        """See `Node.serialising_writer`."""
        return self._write_at_once

    def _read_at_once(self, offset: int, into: memoryview) -> bool:
        return not self._pooled.would_wait(offset, len(into)) and self.storage.try_pread_into(offset, into)

    def _write_at_once(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if self._pooled.overlaps(offset, length):
            return False
        try:
            done = self.storage.try_pwrite(offset, data)
        except IoError:
            self._changed(offset + length)
            raise
        if done:
            self._changes += 1
            if offset + length > self.size:
                self._changed(offset + length)
        return done

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Node.begin_pread`."""
        return self._pooled.begin_read(offset, offset + length, self.storage.begin_pread, offset, length, ended)

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`. Past the end of the file, up to the alignment, there are zeroes."""
        pooled = self._pooled
        claim = pooled.enter(offset, length)
        try:
            if claim.blockers:
                await claim.granted()
            return await self.storage.pread(offset, length)
        finally:
            pooled.leave(claim)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`. Overlapping requests wait for each other where it matters, `serialising` or not."""
        pooled = self._pooled
        length = len(data)
        claim = pooled.enter(offset, length, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self.storage.pwrite(offset, data)
        finally:
            self._changed(offset + length)
            pooled.leave(claim)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        claim = self._pooled.enter(offset, length, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self.storage.zero(offset, length, unmap)
        finally:
            self._emptied()
            self._changed(offset + length)
            self._pooled.leave(claim)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        claim = self._pooled.enter(offset, length, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
            await self.storage.discard(offset, length)
        finally:
            self._emptied()
            self._changed(0)
            self._pooled.leave(claim)

    async def flush(self) -> None:
        """See `Node.flush`."""
        if self._poison is not None:
            raise self._poisoned(self._poison)
        if self._synced < self._changes:
            # Who is cancelled takes neither the sync nor its outcome along.
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._await_sync(functools.partial(settle, done, None))
            await done

    def begin_flush(self, ended: Ended) -> bool:
        """See `Node.begin_flush`."""
        if self._poison is not None or self._synced >= self._changes:
            return False
        self._await_sync(ended)
        return True

    def _await_sync(self, ended: Ended) -> None:
        """Has `ended` told once all changes that have ended are durable, or cannot be made so."""
        self._flushes.append((self._changes, ended))
        if not self._is_syncing:
            self._begin_sync()

    def _begin_sync(self) -> None:
        self._is_syncing = True
        covered = self._changes
        try:
            begun = self.storage.begin_sync(functools.partial(self._sync_ended, covered))
        except Exception as error:
            if not self._is_syncing:
                raise  # by one who was told: the sync has ended
            self._sync_ended(covered, error)
            return
        if not begun:
            eager.start(self._sync(covered))

    async def _sync(self, covered: int) -> None:
        try:
            await self.storage.sync()
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            self._sync_ended(covered, error)
        except asyncio.CancelledError:
            self._sync_ended(covered, IoError(errno.ECANCELED, self.name, "flush", detail="it was given up"))
            raise
        else:
            self._sync_ended(covered, None)

    def _sync_ended(self, covered: int, error: Exception | None) -> None:
        self._is_syncing = False
        if error is None:
            self._synced = covered
        else:
            covered = self._changes  # whoever waits hears of it
            if isinstance(error, IoError):
                self._poison = error
                error = self._poisoned(error)
                self.give_up(Problem(told(error)))
        heard = [ended for wanted, ended in self._flushes if wanted <= covered]
        del self._flushes[: len(heard)]  # later ones never want less
        if self._flushes:
            self._begin_sync()
        for ended in heard:
            ended(error)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`."""
        start, stop = self._known_data
        if start <= offset and offset + length <= stop:
            return [Extent(length, 0)]
        times_emptied = self._times_emptied
        runs = await self.storage.extents(offset, length)
        extents = []
        position, end = offset, offset + length
        for run, is_data in runs:
            if is_data and times_emptied == self._times_emptied:
                self._known_data = (position, position + run)
            extents.append(Extent(min(run, end - position), 0 if is_data else HOLE | ZERO))
            position += run
        return merge_extents(extents)

    async def close(self) -> None:
        """See `Node.close`."""
        await self.storage.close()

    def _emptied(self) -> None:
        """Notes that data may have become a hole."""
        self._known_data = (0, 0)
        self._times_emptied += 1

    def _changed(self, end: int) -> None:
        """Notes a change that has ended, failed or not: a failed one may have changed a part."""
        self._changes += 1
        if end > self.size:
            self.size = max(self.size, self.storage.size)

    def _poisoned(self, cause: IoError) -> IoError:
        detail = f"{os.strerror(cause.errno)}; what was written may be lost: check it, and open the image anew"
        error = IoError(cause.errno, self.name, "flush", detail=detail)
        error.__cause__ = cause
        return error
