"""Storages and nodes in memory: quick, or slow in ways that a test chooses.

With a `pause` nothing happens inline: each request goes sector by sector and awaits the pause before, between and
after. So reads and writes of one range tear each other as they do on a real file, unless somebody keeps them apart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno as _errno
import functools
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Literal

from fleecer.block.nodes.file import FileNode
from fleecer.errors import IoError
from fleecer.ranges import Buffer, align_down, align_up, is_zero
from fleecer.storage.api import Ended, ReadEnded, Storage, StorageLimits
from fleecer.storage.lanes import tell

Pause = Callable[[], Awaitable[None]]
StorageOperation = Literal["read", "write", "write zeroes", "discard", "flush", "block status", "resize"]

SECTOR_BYTES = 512
PAGE_BYTES = 4096

_identities = itertools.count(1)


def random_turns(seed: int, turns_max: int = 3) -> Pause:
    """A pause of 0 to `turns_max` turns of the event loop, drawn from `seed`."""
    generator = random.Random(seed)  # noqa: S311 - not for secrets

    async def pause() -> None:
        for _ in range(generator.randint(0, turns_max)):
            await asyncio.sleep(0)

    return pause


def begin(read: Coroutine[Any, Any, Buffer], ended: ReadEnded) -> None:
    """Lets a read go on by itself, and tells `ended` of its end, as `Storage.begin_pread` does."""
    asyncio.get_running_loop().create_task(read).add_done_callback(functools.partial(tell, ended))


class MemoryStorage:
    """A storage in memory. `content` is its bytes, or how many zeroes. `data` is what it holds now.

    Whole pages of zeroes are told as holes. `sync_count` counts the calls of `sync` that ended.
    """

    def __init__(
        self,
        content: int | bytes,
        *,
        name: str = "memory",
        read_only: bool = False,
        limits: StorageLimits = StorageLimits(),  # noqa: B008 - frozen
        pause: Pause | None = None,
    ) -> None:
        self.data = bytearray(content)
        self.name = name
        self.read_only = read_only
        self.size = len(self.data)
        self.identity = (0, next(_identities))
        self.is_block_device = False
        self.limits = limits
        self.pause = pause
        self.sync_count = 0

    @property
    def reads_wait(self) -> bool:
        """See `Storage.reads_wait`: with a pause."""
        return self.pause is not None

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        """See `Storage.try_pread_into`: False where the range passes the end, and always with a pause."""
        end = offset + len(into)
        if self.pause is not None or end > len(self.data):
            return False
        into[:] = self.data[offset:end]
        return True

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """See `Storage.try_pwrite`: False with a pause."""
        if self.pause is not None:
            return False
        self._put(offset, data)
        self.size = max(self.size, offset + len(data))
        return True

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Storage.begin_pread`: with a pause."""
        if self.pause is None:
            return False
        begin(self.pread(offset, length), ended)
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Storage.pread`."""
        data = bytearray(length)
        for start, stop in self._pieces(offset, length):
            await self._paused()
            found = self.data[start:stop]
            data[start - offset : start - offset + len(found)] = found
        await self._paused()
        return data

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """See `Storage.pwrite`."""
        view = memoryview(data)
        for start, stop in self._pieces(offset, len(view)):
            await self._paused()
            self._put(start, view[start - offset : stop - offset])
        await self._paused()
        self.size = max(self.size, offset + len(view))

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        """See `Storage.zero`."""
        await self.pwrite(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        """See `Storage.discard`: whole pages inside the range become zero, the rest stays."""
        start, stop = align_up(offset, PAGE_BYTES), align_down(offset + length, PAGE_BYTES)
        if start < stop:
            await self.pwrite(start, bytes(stop - start))

    async def sync(self) -> None:
        """See `Storage.sync`."""
        await self._paused()
        self.sync_count += 1

    def begin_sync(self, ended: Ended) -> bool:
        """See `Storage.begin_sync`: never."""
        return False

    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See `Storage.extents`."""
        await self._paused()
        return [(stop - start, not is_zero(self.data[start:stop])) for start, stop in _cut(offset, length, PAGE_BYTES)]

    async def truncate(self, size: int) -> None:
        """See `Storage.truncate`."""
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size

    async def close(self) -> None:
        """See `Storage.close`."""

    def _put(self, offset: int, data: Buffer) -> None:
        if offset + len(data) > len(self.data):
            if not self.limits.growable:
                raise IoError(_errno.ENOSPC, self.name, "write", offset, len(data))
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return _cut(offset, length, length if self.pause is None else SECTOR_BYTES)

    async def _paused(self) -> None:
        if self.pause is not None:
            await self.pause()


def _cut(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """The range cut at multiples of `unit`, as [start, stop)."""
    end = offset + length
    while offset < end:
        stop = min(align_down(offset, unit) + unit, end)
        yield offset, stop
        offset = stop


class MemoryNode(FileNode):
    """A node over a `MemoryStorage`. `data` is what it holds now."""

    driver = "memory"

    def __init__(
        self,
        name: str,
        content: int | bytes,
        *,
        read_only: bool = False,
        limits: StorageLimits = StorageLimits(),  # noqa: B008 - frozen
        pause: Pause | None = None,
    ) -> None:
        memory = MemoryStorage(content, name=name, read_only=read_only, limits=limits, pause=pause)
        super().__init__(name, memory)
        self.data = memory.data


@dataclasses.dataclass(slots=True)
class StorageFailure:
    """A rule of a `FaultyStorage`. `hits` counts the operations that failed by it."""

    operation: StorageOperation
    errno: int
    after: int
    times: int | None
    written_bytes: int
    hits: int = 0


class FaultyStorage:
    """Hands everything on to `inner`, but for what `fail` says."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.failures: list[StorageFailure] = []

    def fail(
        self,
        operation: StorageOperation,
        *,
        errno: int = _errno.EIO,
        after: int = 0,
        times: int | None = 1,
        written_bytes: int = 0,
    ) -> StorageFailure:
        """Lets the first `after` operations of the kind pass, then fails `times` of them (None: all from there on).

        A write that fails has written its first `written_bytes`, as one that runs out of space does.
        """
        failure = StorageFailure(operation, errno, after, times, written_bytes)
        self.failures.append(failure)
        return failure

    @property
    def name(self) -> str:
        """As `inner`."""
        return self.inner.name

    @property
    def size(self) -> int:
        """As `inner`."""
        return self.inner.size

    @property
    def read_only(self) -> bool:
        """As `inner`."""
        return self.inner.read_only

    @property
    def identity(self) -> tuple[int, int]:
        """As `inner`."""
        return self.inner.identity

    @property
    def is_block_device(self) -> bool:
        """As `inner`."""
        return self.inner.is_block_device

    @property
    def limits(self) -> StorageLimits:
        """As `inner`."""
        return self.inner.limits

    @property
    def reads_wait(self) -> bool:
        """As `inner`."""
        return self.inner.reads_wait

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        """False while reads may fail, so that `pread` has the say."""
        if any(failure.operation == "read" for failure in self.failures):
            return False
        return self.inner.try_pread_into(offset, into)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """False while writes may fail, so that `pwrite` has the say."""
        if any(failure.operation == "write" for failure in self.failures):
            return False
        return self.inner.try_pwrite(offset, data)

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Storage.begin_pread`. What fails does so later, as in `pread`."""
        begin(self.pread(offset, length), ended)
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Storage.pread`."""
        self._raise(self._due("read"), offset, length)
        return await self.inner.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """See `Storage.pwrite`."""
        failure = self._due("write")
        if failure is not None and failure.written_bytes:
            await self.inner.pwrite(offset, memoryview(data)[: failure.written_bytes])
        self._raise(failure, offset, len(data))
        await self.inner.pwrite(offset, data)

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        """See `Storage.zero`."""
        failure = self._due("write zeroes")
        if failure is not None and failure.written_bytes:
            await self.inner.zero(offset, min(failure.written_bytes, length), unmap)
        self._raise(failure, offset, length)
        await self.inner.zero(offset, length, unmap)

    async def discard(self, offset: int, length: int) -> None:
        """See `Storage.discard`."""
        self._raise(self._due("discard"), offset, length)
        await self.inner.discard(offset, length)

    async def sync(self) -> None:
        """See `Storage.sync`. As on Linux, a failure may be followed by success, with nothing saved."""
        self._raise(self._due("flush"), 0, 0)
        await self.inner.sync()

    def begin_sync(self, ended: Ended) -> bool:
        """See `Storage.begin_sync`: never."""
        return False

    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See `Storage.extents`."""
        self._raise(self._due("block status"), offset, length)
        return await self.inner.extents(offset, length)

    async def truncate(self, size: int) -> None:
        """See `Storage.truncate`."""
        self._raise(self._due("resize"), 0, 0)
        await self.inner.truncate(size)

    async def close(self) -> None:
        """See `Storage.close`."""
        await self.inner.close()

    def _due(self, operation: StorageOperation) -> StorageFailure | None:
        """The rule by which this operation fails, if one says so."""
        for failure in self.failures:
            if failure.operation != operation:
                continue
            if failure.after:
                failure.after -= 1
                continue
            failure.hits += 1
            if failure.times is not None:
                failure.times -= 1
                if not failure.times:
                    self.failures.remove(failure)
            return failure
        return None

    def _raise(self, failure: StorageFailure | None, offset: int, length: int) -> None:
        if failure is not None:
            raise IoError(failure.errno, self.name, failure.operation, offset, length)
