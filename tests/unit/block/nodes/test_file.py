"""The file node: what runs inline and what must not, what a flush covers, poison, and growth."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest

from fleecer import eager
from fleecer.block.edge import Edge
from fleecer.block.node import HOLE, ZERO, Extent, Node, Problem
from fleecer.block.nodes.file import FileNode
from fleecer.errors import IoError, UsageError
from fleecer.ranges import Buffer, is_zero
from fleecer.storage.api import Ended, StorageLimits
from fleecer.storage.file import FileStorage, create_file
from fleecer.storage.pool import running_pool
from fleecer.testing.memory import PAGE_BYTES, FaultyStorage, MemoryNode, MemoryStorage, random_turns


class HalfInline(MemoryStorage):
    """Asynchronous requests go sector by sector with a turn of the loop between; inline ones are done when allowed."""

    def __init__(self, content: int | bytes) -> None:
        async def turn() -> None:
            await asyncio.sleep(0)

        super().__init__(content, pause=turn)
        self.reads_inline = True
        self.writes_inline = True

    @property
    def reads_wait(self) -> bool:
        return not self.reads_inline

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        if self.reads_inline:
            into[:] = self.data[offset : offset + len(into)]
        return self.reads_inline

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if self.writes_inline:
            self.data[offset : offset + len(data)] = data
        return self.writes_inline


class GatedSync(MemoryStorage):
    """Each sync waits for `go_on`."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.started = 0
        super().__init__(8192, pause=None)

    async def sync(self) -> None:
        self.started += 1
        await self.go_on.wait()
        await super().sync()


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def image(tmp_path: Path) -> AsyncIterator[FileStorage]:
    storage = await create_file(str(tmp_path / "disk0.raw"), size=1 << 20)
    yield storage
    await storage.close()
    await running_pool().close()


async def test_an_inline_write_does_not_tear_a_read_that_is_under_way() -> None:
    storage = HalfInline(b"o" * 4096)
    node = FileNode("disk0", storage)
    storage.reads_inline = False
    read = asyncio.create_task(node.pread(0, 4096))
    await turns(4)
    write = asyncio.create_task(node.pwrite(0, b"n" * 4096))
    assert await read == b"o" * 4096
    await write
    assert storage.data == b"n" * 4096


async def test_an_inline_read_does_not_see_half_of_a_write_that_is_under_way() -> None:
    storage = HalfInline(b"o" * 4096)
    node = FileNode("disk0", storage)
    storage.writes_inline = False
    write = asyncio.create_task(node.pwrite(0, b"n" * 4096))
    await turns(4)
    assert storage.data[:512] == b"n" * 512
    assert await node.pread(0, 4096) == b"n" * 4096
    await write


@pytest.mark.parametrize("change", ["zero", "discard"])
async def test_zero_and_discard_keep_overlapping_requests_waiting(change: str) -> None:
    storage = HalfInline(b"o" * 8192)
    node = FileNode("disk0", storage)
    running = asyncio.create_task(node.zero(0, 8192) if change == "zero" else node.discard(0, 8192))
    await turns(4)
    overlapping = asyncio.create_task(node.pwrite(4096, b"n" * 100))
    assert is_zero(await node.pread(0, 4096))
    assert running.done(), "the read did not wait"
    await overlapping
    assert storage.data[4096:4196] == b"n" * 100


@pytest.mark.parametrize("operation", ["discard", "zero"])
async def test_a_run_of_data_is_looked_up_once_until_something_is_emptied(operation: str) -> None:
    storage = MemoryStorage(b"x" * 8 * PAGE_BYTES)
    look = storage.extents
    asked: list[int] = []

    async def extents(offset: int, length: int) -> list[tuple[int, bool]]:
        asked.append(offset)
        return await look(offset, length) if emptied else [(storage.size - offset, True)]

    emptied = False
    storage.extents = extents  # type: ignore[method-assign]
    door = Edge(FileNode("disk0", storage), "test", "file", writable=True)
    for offset in (2 * PAGE_BYTES, 7 * PAGE_BYTES, 2 * PAGE_BYTES):
        assert await door.block_status(offset, PAGE_BYTES) == [Extent(PAGE_BYTES, 0)]
    assert asked == [2 * PAGE_BYTES], "the run was told to its end"
    emptied = True
    await getattr(door, operation)(3 * PAGE_BYTES, PAGE_BYTES)
    assert await door.block_status(3 * PAGE_BYTES, PAGE_BYTES) == [Extent(PAGE_BYTES, HOLE | ZERO)]


async def test_what_is_emptied_while_it_is_looked_up_is_not_remembered_as_data() -> None:
    storage = MemoryStorage(b"x" * 4 * PAGE_BYTES)
    look = storage.extents
    held = asyncio.Event()

    async def extents(offset: int, length: int) -> list[tuple[int, bool]]:
        runs = await look(offset, length)
        await held.wait()
        return runs

    storage.extents = extents  # type: ignore[method-assign]
    door = Edge(FileNode("disk0", storage), "test", "file", writable=True)
    late = asyncio.create_task(door.block_status(0, 4 * PAGE_BYTES))
    await turns(2)
    await door.discard(PAGE_BYTES, PAGE_BYTES)
    held.set()
    await late
    assert await door.block_status(PAGE_BYTES, PAGE_BYTES) == [Extent(PAGE_BYTES, HOLE | ZERO)]


async def test_requests_on_other_ranges_run_inline_beside_one_that_waits() -> None:
    storage = HalfInline(8192)
    node = FileNode("disk0", storage)
    door = Edge(node, "test", "file", writable=True)
    storage.reads_inline = False
    read = asyncio.create_task(node.pread(0, 4096))
    await turns(2)
    assert door.try_pwrite(4096, b"n")
    storage.reads_inline = True
    assert door.try_pread(4096, 4096) is not None
    assert door.try_pread(0, 4096) is not None, "a thread reads that range too, which is no harm"
    assert not door.try_pwrite(4095, b"nn"), "it must not see half of this"
    write = asyncio.create_task(node.pwrite(0, b"n" * 4096))
    await turns(1)
    assert door.try_pread(4096, 4096) is not None
    assert door.try_pread(4095, 2) is None, "that range is about to be changed by a thread"
    assert not read.done()
    await asyncio.gather(read, write)


@pytest.mark.parametrize("seed", range(8))
async def test_overlapping_requests_on_a_slow_storage_never_tear(seed: int) -> None:
    node = MemoryNode("disk0", b"\x00" * 4096, pause=random_turns(seed, 2))
    requests = [node.pwrite(0, bytes([i]) * 4096) for i in range(1, 9)]
    reads = [asyncio.create_task(node.pread(0, 4096)) for _ in range(8)]
    await asyncio.gather(*requests)
    for read in reads:
        data = await read
        assert len(set(data)) == 1
    assert len(set(node.data)) == 1


async def test_a_request_on_cached_pages_ends_without_waiting(image: FileStorage) -> None:
    node = FileNode("disk0", image)
    edge = Edge(node, "the test", "disk", writable=True)
    assert eager.start(edge.pwrite(4096, b"x" * 4096)) is None
    found: list[Buffer] = []

    async def read() -> None:
        found.append(await edge.pread(4096, 4096))

    waiting = eager.start(read())
    if waiting is not None:  # a page may be written back, and dropped, at any time
        await waiting
    assert found == [b"x" * 4096]


async def test_what_says_that_its_reads_wait_has_no_reader() -> None:
    storage = HalfInline(8192)
    node = FileNode("disk0", storage)
    for inline in (True, False, True):
        storage.reads_inline = inline
        assert (node.reader() is not None) is inline


async def test_threads_do_not_tear_requests_on_a_real_file(image: FileStorage) -> None:
    node = FileNode("disk0", image)
    length = 64 * 1024
    await node.pwrite(0, b"\x01" * length)

    async def read() -> None:
        data = bytes(await node.pread(0, length))
        assert data == data[:1] * length

    def never(storage: FileStorage, *request: object) -> bool:
        return False

    with mock.patch.object(FileStorage, "try_pread_into", never):
        for step in range(100):
            with mock.patch.object(FileStorage, "try_pwrite", never if step % 2 else FileStorage.try_pwrite):
                await asyncio.gather(read(), node.pwrite(0, bytes([step + 2]) * length), read(), read())


async def test_flush_syncs_what_was_there_before_and_then_only_after_changes() -> None:
    storage = MemoryStorage(8192)
    node = FileNode("disk0", storage)
    await node.flush()
    await node.flush()
    assert storage.sync_count == 1
    for change in (node.pwrite(0, b"x"), node.zero(0, 1), node.discard(0, 4096)):
        before = storage.sync_count
        await change
        await node.flush()
        await node.flush()
        assert storage.sync_count == before + 1
    reader = FileNode("disk1", MemoryStorage(8192, read_only=True))
    await reader.flush()
    assert reader.read_only


async def test_a_change_that_ends_while_a_sync_runs_is_not_taken_for_durable() -> None:
    storage = GatedSync()
    node = FileNode("disk0", storage)
    first = asyncio.create_task(node.flush())
    await turns()
    await node.pwrite(0, b"x")
    storage.go_on.set()
    await first
    await node.flush()
    assert storage.started == 2


async def test_a_write_that_began_before_a_flush_and_ended_after_it_needs_another() -> None:
    storage = HalfInline(8192)
    storage.writes_inline = False
    node = FileNode("disk0", storage)
    write = asyncio.create_task(node.pwrite(0, b"x" * 8192))
    await turns(2)
    await node.flush()
    await write
    assert storage.sync_count == 1
    await node.flush()
    assert storage.sync_count == 2


async def test_flushes_that_come_during_a_sync_share_the_next_one() -> None:
    storage = GatedSync()
    node = FileNode("disk0", storage)
    flushes = [asyncio.create_task(node.flush())]
    await turns()
    await node.pwrite(0, b"x")
    flushes += [asyncio.create_task(node.flush()) for _ in range(10)]
    await turns()
    storage.go_on.set()
    await asyncio.gather(*flushes)
    assert storage.started == 2


async def test_the_first_failed_flush_is_final() -> None:
    storage = FaultyStorage(MemoryStorage(8192))
    node = FileNode("disk0", storage)
    storage.fail("flush", errno=errno.ENOSPC)
    with pytest.raises(
        IoError, match="flush on 'disk0': No space left on device; what was written may be lost"
    ) as first:
        await node.flush()
    await storage.sync()  # the kernel would say that all is well now
    for _ in range(100):
        with pytest.raises(IoError) as later:
            await node.flush()
        assert (later.value.errno, str(later.value)) == (errno.ENOSPC, str(first.value))
        assert isinstance(later.value.__cause__, IoError)
    with pytest.raises(IoError):
        await Edge(node, "the test", "disk", writable=True).pwrite(0, b"x", fua=True)
    assert await node.pread(0, 1) == b"x"


async def test_a_node_whose_flush_failed_tells_once_why_it_was_given_up() -> None:
    storage = FaultyStorage(MemoryStorage(8192))
    storage.fail("flush", times=None)
    node = FileNode("disk0", storage)
    told: list[Node] = []
    node.on_problem = told.append
    assert node.problem is None
    for _ in range(2):
        with pytest.raises(IoError) as caught:
            await node.flush()
    node.give_up(Problem("something that came of it"))
    assert told == [node]
    assert node.problem == Problem(str(caught.value))


async def test_every_flush_that_waited_for_a_failed_sync_fails() -> None:
    inner = GatedSync()
    storage = FaultyStorage(inner)
    node = FileNode("disk0", storage)
    running = asyncio.create_task(node.flush())
    await turns()
    await node.pwrite(0, b"x")
    storage.fail("flush")
    waiting = [asyncio.create_task(node.flush()) for _ in range(3)]
    inner.go_on.set()
    await running
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [IoError] * 3


async def test_a_cancelled_flush_does_not_take_the_failure_with_it() -> None:
    class FailsOnce(GatedSync):
        async def sync(self) -> None:
            await super().sync()
            if self.sync_count == 1:
                raise IoError(errno.EIO, "memory", "flush")

    storage = FailsOnce()
    node = FileNode("disk0", storage)
    cancelled = asyncio.create_task(node.flush())
    await turns()
    cancelled.cancel()
    await turns()
    assert cancelled.cancelled()
    storage.go_on.set()
    with pytest.raises(IoError):
        await node.flush()
    assert storage.started == 1


async def test_a_cancelled_flush_leaves_the_others_waiting_for_their_sync() -> None:
    storage = GatedSync()
    node = FileNode("disk0", storage)
    flushes = [asyncio.create_task(node.flush()) for _ in range(3)]
    await turns()
    flushes[0].cancel()
    flushes[2].cancel()
    await turns()
    assert [flush.done() for flush in flushes] == [True, False, True]
    storage.go_on.set()
    await flushes[1]
    assert storage.started == 1


async def test_a_flush_is_begun_where_there_is_something_to_sync_and_told_of_the_end() -> None:
    storage = GatedSync()
    node = FileNode("disk0", storage)
    told: list[Exception | None] = []
    assert node.begin_flush(told.append)
    await node.pwrite(0, b"x")
    assert node.begin_flush(told.append), "what ended meanwhile needs another sync"
    await turns()
    assert (storage.started, told) == (1, [])
    storage.go_on.set()
    while len(told) < 2:
        await asyncio.sleep(0)
    assert told == [None, None]
    assert storage.started == 2
    assert not node.begin_flush(told.append), "there is nothing to sync"
    assert len(told) == 2


async def test_a_flush_that_was_begun_and_fails_is_as_final_as_any() -> None:
    storage = FaultyStorage(MemoryStorage(8192))
    node = FileNode("disk0", storage)
    storage.fail("flush", errno=errno.ENOSPC)
    told: list[Exception | None] = []
    assert node.begin_flush(told.append)
    await turns()
    (error,) = told
    assert isinstance(error, IoError)
    assert error.errno == errno.ENOSPC
    assert node.problem is not None
    assert not node.begin_flush(told.append)
    with pytest.raises(IoError, match="what was written may be lost"):
        await node.flush()


async def test_a_sync_that_cannot_even_begin_is_told_and_tried_anew() -> None:
    class Unable(MemoryStorage):
        def begin_sync(self, ended: Ended) -> bool:
            if self.sync_count:
                return False
            self.sync_count = 1
            raise OSError(errno.EMFILE, "Too many open files")

    node = FileNode("disk0", Unable(8192))
    edge = Edge(node, "the test", "disk", writable=True)
    told: list[Exception | None] = []
    assert edge.begin_flush(told.append)
    assert [type(error) for error in told] == [OSError]
    assert edge.busy == 0
    await edge.flush()


async def test_a_bug_in_one_who_is_told_at_once_is_no_failed_sync() -> None:
    class Quick(MemoryStorage):
        def begin_sync(self, ended: Ended) -> bool:
            ended(None)
            return True

    node = FileNode("disk0", Quick(8192))
    told: list[Exception | None] = []

    def listen(error: Exception | None) -> None:
        told.append(error)
        raise IoError(errno.EIO, "listener", "flush")

    with pytest.raises(IoError, match="listener"):
        node.begin_flush(listen)
    assert told == [None]
    assert node.problem is None
    await node.pwrite(0, b"x")
    await node.flush()


async def test_a_sync_that_ends_in_a_bug_is_told_and_tried_anew() -> None:
    class Buggy(MemoryStorage):
        async def sync(self) -> None:
            self.sync_count += 1
            if self.sync_count == 1:
                raise ZeroDivisionError

    storage = Buggy(8192)
    node = FileNode("disk0", storage)
    with pytest.raises(ZeroDivisionError):
        await node.flush()
    await node.flush()
    assert storage.sync_count == 2


async def test_a_failed_write_may_have_changed_something_so_the_next_flush_syncs() -> None:
    storage = FaultyStorage(MemoryStorage(b"o" * 8192))
    inner = storage.inner
    assert isinstance(inner, MemoryStorage)
    node = FileNode("disk0", storage)
    await node.flush()
    storage.fail("write", errno=errno.ENOSPC, written_bytes=512)
    with pytest.raises(IoError) as caught:
        await node.pwrite(0, b"n" * 1024)
    assert caught.value.errno == errno.ENOSPC
    assert inner.data[:1024] == b"n" * 512 + b"o" * 512
    await node.flush()
    assert inner.sync_count == 2
    await node.pwrite(0, b"n" * 1024)
    assert inner.data[:1024] == b"n" * 1024


async def test_the_size_follows_writes_and_zeroes_past_the_end(image: FileStorage) -> None:
    node = FileNode("disk0", image)
    edge = Edge(node, "qcow2", "file", writable=True, may_grow=True)
    assert node.limits.growable
    await edge.pwrite((1 << 20) + 5, b"abc")
    assert (node.size, os.stat(image.name).st_size) == ((1 << 20) + 8,) * 2
    await edge.pwrite(2 << 20, bytes(2 << 20))  # too long to be done inline
    assert node.size == 4 << 20
    await edge.zero(4 << 20, 100_000)
    assert (node.size, os.stat(image.name).st_size) == ((4 << 20) + 100_000,) * 2
    assert is_zero(await edge.pread((1 << 20) + 8, 4096))
    await edge.zero(node.size, 10, unmap=False)
    assert (node.size, os.stat(image.name).st_size) == ((4 << 20) + 100_010,) * 2


async def test_status_tells_holes_of_a_real_file(image: FileStorage) -> None:
    node = FileNode("disk0", image)
    await node.pwrite(65536, b"x" * 65536)
    assert await node.block_status(0, 1 << 20) == [
        Extent(65536, HOLE | ZERO),
        Extent(65536, 0),
        Extent((1 << 20) - 131072, HOLE | ZERO),
    ]
    await node.zero(65536, 65536)
    assert await node.block_status(0, 1 << 20) == [Extent(1 << 20, HOLE | ZERO)]


async def test_a_writable_image_whose_end_is_not_aligned_is_refused() -> None:
    limits = StorageLimits(alignment_bytes=4096)
    with pytest.raises(UsageError, match="image 'memory': its size of 5000 bytes is not a multiple of 4096"):
        FileNode("disk0", MemoryStorage(5000, limits=limits))
    reader = FileNode("disk0", MemoryStorage(b"x" * 5000, limits=limits, read_only=True))
    assert await Edge(reader, "the test", "disk").pread(4990, 10) == b"x" * 10


async def test_closing_the_node_closes_the_storage(tmp_path: Path) -> None:
    storage = await create_file(str(tmp_path / "disk0.raw"), size=4096)
    node = FileNode("disk0", storage)
    await node.close()
    with pytest.raises(IoError) as caught:
        await node.pread(0, 1)
    assert caught.value.errno == errno.EBADF
    await node.close()
    await running_pool().close()
