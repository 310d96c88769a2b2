"""The qcow2 node, rule by rule: who waits for whom, what is written when, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import struct
from array import array
from collections.abc import Awaitable
from typing import Any

import pytest
from tests.qcow2_world import HeldStorage, checked, guest, new_image, open_image, settle

from fleecer.block.node import HOLE, ZERO, Extent
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import Qcow2Node
from fleecer.block.nodes.qcow2.reading import PLANS_MAX
from fleecer.errors import CorruptImage, FleecerError, IoError
from fleecer.formats.qcow2.header import AUTOCLEAR_FIELD, CORRUPT, DIRTY, INCOMPATIBLE_FIELD
from fleecer.formats.qcow2.tables import COPIED, OFFSET_MASK, ZERO_FLAG
from fleecer.ranges import Buffer, ReadAtOnce
from fleecer.storage.api import StorageLimits
from fleecer.testing.memory import FaultyStorage, MemoryStorage, random_turns
from fleecer.units import GiB, KiB, MiB, TiB

CLUSTER = 64 * KiB
OLD, NEW = b"\x11" * CLUSTER, b"\x22" * CLUSTER


async def held_image(size: int = 16 * CLUSTER, **options: Any) -> HeldStorage:
    return HeldStorage(bytes((await new_image(size, **options)).data), name="image")


def l2_entry(node: Qcow2Node, cluster: int) -> int:
    """The entry in memory of a cluster whose slice is cached."""
    table = node._l1[cluster >> node._reader.l2_bits] & OFFSET_MASK
    per_slice = node._reader.cache.slice_bytes // 8
    number, at = divmod(cluster & (1 << node._reader.l2_bits) - 1, per_slice)
    return node._reader.cache.slices[table + number * node._reader.cache.slice_bytes].data[at]


def patched(storage: MemoryStorage, offset: int, value: int) -> None:
    struct.pack_into(">Q", storage.data, offset, value)


# Who waits for whom.


@pytest.mark.parametrize("serialise", [True, False])
async def test_a_serialising_write_waits_for_a_reader_that_went_to_the_backing_node(serialise: bool) -> None:
    """The race of QEMU's commit f8d59dfb40; without serialising it must show, or this test proves nothing."""
    active = HeldStorage(OLD * 4, name="active")
    scratch = await new_image(4 * CLUSTER, backing_file="active", backing_format="raw")
    edge = guest(await open_image(scratch, backing=active, serialise=serialise))
    hold = active.hold("read")
    reader = asyncio.ensure_future(edge.pread(0, CLUSTER))
    await hold.reached.wait()
    copy = asyncio.ensure_future(edge.pwrite(0, OLD, serialising=True))
    await settle()
    assert copy.done() is not serialise
    if copy.done():
        active.data[:CLUSTER] = NEW
    hold.released.set()
    assert await reader == (OLD if serialise else NEW)
    await copy
    active.data[:CLUSTER] = NEW
    assert await edge.pread(0, CLUSTER) == OLD


async def test_a_serialising_write_in_place_keeps_readers_out() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, OLD)
    hold = storage.hold("write")
    write = asyncio.ensure_future(edge.pwrite(4096, b"new", serialising=True))
    await hold.reached.wait()
    reader = asyncio.ensure_future(edge.pread(CLUSTER - 512, 512))
    await settle()
    assert not reader.done()
    hold.released.set()
    await asyncio.gather(write, reader)


async def test_reads_and_writes_in_place_share_a_cluster() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, OLD)
    hold = storage.hold("write")
    write = asyncio.ensure_future(edge.pwrite(0, b"new"))
    await hold.reached.wait()
    assert await asyncio.wait_for(edge.pread(4096, 512), 10) == OLD[:512]
    await asyncio.wait_for(edge.pwrite(8192, b"other"), 10)
    hold.released.set()
    await write


async def test_allocating_writes_to_different_clusters_do_not_wait_for_each_other() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, b"makes the L2 table")
    hold = storage.hold("write")
    first = asyncio.ensure_future(edge.pwrite(CLUSTER, OLD))
    await hold.reached.wait()
    await asyncio.wait_for(edge.pwrite(2 * CLUSTER, NEW), 10)
    assert not first.done()
    hold.released.set()
    await first
    assert await edge.pread(CLUSTER, 2 * CLUSTER) == OLD + NEW


async def test_allocating_writes_to_one_cluster_wait_and_both_survive() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    hold = storage.hold("write")
    first = asyncio.ensure_future(edge.pwrite(0, b"A" * 512))
    await hold.reached.wait()
    second = asyncio.ensure_future(edge.pwrite(512, b"B" * 512))
    await settle()
    assert not second.done()
    hold.released.set()
    await asyncio.gather(first, second)
    assert await edge.pread(0, 1024) == b"A" * 512 + b"B" * 512


@pytest.mark.parametrize("request_in_flight", ["read", "write"])
@pytest.mark.parametrize("change", ["discard", "zero"])
async def test_discard_and_zero_wait_for_requests_in_the_cluster(change: str, request_in_flight: str) -> None:
    storage = await held_image()
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    hold = storage.hold(request_in_flight)
    held: Awaitable[object] = edge.pread(0, 512) if request_in_flight == "read" else edge.pwrite(0, b"new")
    running = asyncio.ensure_future(held)
    await hold.reached.wait()
    changing = asyncio.ensure_future(edge.discard(0, CLUSTER) if change == "discard" else edge.zero(0, CLUSTER))
    await settle()
    assert not changing.done()
    assert l2_entry(node, 0)
    hold.released.set()
    await asyncio.gather(running, changing)
    assert not l2_entry(node, 0)


async def test_a_table_that_moves_while_a_reader_loads_it_is_looked_up_again() -> None:
    storage, l2 = await image_with_data()
    header = (await open_image(storage))._image.header
    patched(storage, header.l1_table_offset, l2)  # not COPIED: the next write moves the table
    node = await open_image(storage)
    edge = guest(node)
    load, reached, released = node._reader.cache._read, asyncio.Event(), asyncio.Event()

    async def late(offset: int) -> array[int]:
        if offset == l2 and not released.is_set():
            reached.set()
            await released.wait()
        return await load(offset)

    node._reader.cache._read = late
    reader = asyncio.ensure_future(edge.pread(0, CLUSTER))
    await reached.wait()
    await edge.pwrite(CLUSTER, NEW, serialising=True)
    await edge.flush()
    await edge.pwrite(2 * CLUSTER, NEW)
    assert l2_entry(node, 2) & OFFSET_MASK == l2, "the old place of the table was not used again"
    released.set()
    assert await reader == OLD


async def test_a_place_that_held_a_table_before_is_not_read_as_that_table() -> None:
    storage, l2 = await image_with_data()
    header = (await open_image(storage))._image.header
    patched(storage, header.l1_table_offset, l2)
    header_size = 2 * 8192 * CLUSTER
    struct.pack_into(">Q", storage.data, 24, header_size)  # two L2 tables: there is room in the L1 table's cluster
    struct.pack_into(">I", storage.data, 36, 2)
    await storage.truncate(storage.size + CLUSTER)
    node = await open_image(storage)
    edge = guest(node)
    assert await edge.pread(0, CLUSTER) == OLD
    await edge.pwrite(CLUSTER, NEW)
    await edge.flush()
    second = 8192 * CLUSTER
    await edge.pwrite(second + CLUSTER, NEW)
    assert node._l1[1] & OFFSET_MASK == l2, "the old place of the table was not used again"
    assert await edge.pread(second, 2 * CLUSTER) == bytes(CLUSTER) + NEW


async def test_clusters_are_handed_out_once_while_the_refcount_structure_grows() -> None:
    storage = await held_image(4 * MiB, cluster_size=512, refcount_bits=64)
    storage.pause = random_turns(3, 2)
    node = await open_image(storage)
    await guest(node).pwrite(0, b"first")
    tasks = [node._writer._allocator.allocate(1) for _ in range(300)]
    offsets = [run.offset for run in await asyncio.gather(*tasks)]
    assert len(set(offsets)) == 300
    assert not node._image.metadata.intersection(offsets)
    blocks = [offset for offset in node._image.refcount_table if offset][1:]
    assert len(blocks) >= 4
    assert [storage.written.count((block, 512)) for block in blocks] == [1] * len(blocks)
    for offset in offsets:
        node._writer._allocator.free(offset)
    await node.close()
    storage.pause = None
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages


async def test_readers_of_one_slice_share_one_read() -> None:
    storage = await held_image()
    node = await open_image(storage)
    await guest(node).pwrite(0, OLD * 2)
    await node.close()
    node = await open_image(storage)
    before = storage.counts["read"]
    hold = storage.hold("read")
    readers = [asyncio.ensure_future(guest(node).pread(at * 512, 512)) for at in range(8)]
    await hold.reached.wait()
    await settle()
    assert storage.counts["read"] == before + 1
    hold.released.set()
    assert await asyncio.gather(*readers) == [OLD[:512]] * 8
    assert storage.counts["read"] == before + 9


async def test_a_read_of_an_allocated_cluster_has_the_file_fill_the_readers_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = await open_image(await new_image(4 * CLUSTER))
    await guest(node).pwrite(0, OLD)
    filled: list[object] = []
    reader = FileNode.reader

    def spied(self: FileNode) -> ReadAtOnce:
        read = reader(self)
        assert read is not None

        def spy(offset: int, into: memoryview) -> bool:
            filled.append(into.obj)
            return read(offset, into)

        return spy

    monkeypatch.setattr(FileNode, "reader", spied)
    assert guest(node).try_pread(4096, 4096) is filled[-1]
    assert await node.pread(4096, 4096) is filled[-1]


# Flush and commit.


async def test_a_flush_without_changed_tables_is_one_flush_of_the_file() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, OLD)
    await edge.flush()
    await edge.pwrite(0, NEW)
    before = dict(storage.counts)
    await edge.flush()
    assert (storage.counts["write"], storage.counts["flush"]) == (before["write"], before["flush"] + 1)


async def test_flushes_share_a_commit_that_starts_after_them_and_never_an_earlier_one() -> None:
    storage = await held_image()
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    hold = storage.hold("flush")
    first = asyncio.ensure_future(edge.flush())
    await hold.reached.wait()
    await edge.pwrite(CLUSTER, NEW)
    begun = node._commits._begun
    later = [asyncio.ensure_future(edge.flush()) for _ in range(5)]
    await settle()
    assert not any(flush.done() for flush in later)
    hold.released.set()
    await asyncio.gather(first, *later)
    assert node._commits._begun == begun + 1
    again = await open_image(MemoryStorage(bytes(storage.data)), read_only=True)
    assert await guest(again).pread(CLUSTER, CLUSTER) == NEW


async def test_a_slice_changed_during_a_commit_is_stored_by_the_next() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, OLD)
    hold = storage.hold("flush")
    first = asyncio.ensure_future(edge.flush())
    await hold.reached.wait()
    await edge.pwrite(CLUSTER, NEW)
    hold.released.set()
    await first
    after_first = await open_image(MemoryStorage(bytes(storage.data)), read_only=True)
    assert not any(await guest(after_first).pread(CLUSTER, CLUSTER))
    await edge.flush()
    after_second = await open_image(MemoryStorage(bytes(storage.data)), read_only=True)
    assert await guest(after_second).pread(CLUSTER, CLUSTER) == NEW


async def test_close_leaves_no_leaks() -> None:
    storage = await new_image(16 * CLUSTER)
    node = await open_image(storage)
    await guest(node).pwrite(0, OLD * 8)
    await guest(node).flush()
    await guest(node).discard(0, 4 * CLUSTER)
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_a_freed_cluster_is_used_again_only_after_the_commit() -> None:
    storage = await new_image(16 * CLUSTER)
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    freed = l2_entry(node, 0) & OFFSET_MASK
    await edge.discard(0, CLUSTER)
    await edge.pwrite(CLUSTER, NEW)
    assert l2_entry(node, 1) & OFFSET_MASK != freed
    await edge.flush()
    await edge.pwrite(2 * CLUSTER, NEW)
    assert l2_entry(node, 2) & OFFSET_MASK == freed


async def test_a_file_that_fails_to_discard_a_freed_cluster_keeps_the_image_in_use() -> None:
    storage = FaultyStorage(await new_image(16 * CLUSTER))
    node = await open_image(storage, discard_freed=True)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    freed = l2_entry(node, 0) & OFFSET_MASK
    await edge.discard(0, CLUSTER)
    failure = storage.fail("discard")
    await edge.flush()
    assert failure.hits == 1
    await edge.pwrite(CLUSTER, NEW)
    assert l2_entry(node, 1) & OFFSET_MASK == freed, "it is free all the same"
    await edge.flush()


async def test_freed_clusters_are_discarded_in_the_file_before_they_can_be_used() -> None:
    storage = await held_image()
    node = await open_image(storage, discard_freed=True)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    freed = l2_entry(node, 0) & OFFSET_MASK
    await edge.discard(0, CLUSTER)
    hold = storage.hold("discard")
    flush = asyncio.ensure_future(edge.flush())
    await hold.reached.wait()
    await edge.pwrite(CLUSTER, NEW)
    assert l2_entry(node, 1) & OFFSET_MASK != freed
    hold.released.set()
    await flush
    assert not any(storage.data[freed : freed + CLUSTER])
    assert await edge.pread(CLUSTER, CLUSTER) == NEW


async def test_too_much_dirty_metadata_forces_a_commit() -> None:
    storage = await new_image(4 * MiB, cluster_size=512)
    node = await open_image(storage, l2_cache_bytes=16 * KiB, refcount_cache_bytes=16 * KiB)
    for cluster in range(0, 4 * MiB, 32 * KiB):
        await guest(node).pwrite(cluster, b"x" * 512)
        assert len(node._reader.cache.dirty) * node._reader.cache.slice_bytes <= 5 * KiB
        assert len(node._reader.cache.slices) <= 32
    await node.close()
    assert not (await checked(storage)).corruptions


# Failures.


async def faulty_image(size: int = 16 * CLUSTER) -> tuple[MemoryStorage, FaultyStorage]:
    memory = await new_image(size)
    return memory, FaultyStorage(memory)


@pytest.mark.parametrize("operation", ["write", "flush"])
async def test_the_first_failure_of_a_commit_is_final(operation: str) -> None:
    memory, faulty = await faulty_image()
    node = await open_image(faulty)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    rule = faulty.fail(operation)  # type: ignore[arg-type]
    with pytest.raises(IoError):
        await edge.flush()
    assert rule.hits == 1
    before = bytes(memory.data)
    for _ in range(3):
        with pytest.raises(IoError, match="reopen the image"):
            await edge.flush()
        with pytest.raises(IoError, match="reopen the image"):
            await edge.pwrite(0, NEW)
        with pytest.raises(IoError, match="reopen the image"):
            await edge.zero(0, CLUSTER)
        with pytest.raises(IoError, match="reopen the image"):
            await edge.discard(0, CLUSTER)
    assert await edge.pread(0, CLUSTER) == OLD
    await node.close()
    assert bytes(memory.data) == before
    assert not (await checked(memory)).corruptions


async def test_flushes_that_wait_for_a_failing_commit_fail_too() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, OLD)
    hold = storage.hold("flush")
    first = asyncio.ensure_future(edge.flush())
    await hold.reached.wait()
    second = asyncio.ensure_future(edge.flush())
    await settle()

    async def broken() -> None:
        raise IoError(errno.EIO, "image", "flush")

    storage.sync = broken  # type: ignore[method-assign]
    hold.released.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [IoError, IoError]


async def test_a_failed_data_write_changes_nothing_and_gives_its_clusters_back() -> None:
    memory, faulty = await faulty_image()
    node = await open_image(faulty)
    edge = guest(node)
    await edge.pwrite(0, b"makes the L2 table")
    await edge.pwrite(CLUSTER, OLD)
    faulty.fail("write", errno=errno.ENOSPC, written_bytes=CLUSTER)
    with pytest.raises(IoError) as caught:
        await edge.pwrite(2 * CLUSTER, NEW * 4)
    assert caught.value.errno == errno.ENOSPC
    assert await edge.pread(CLUSTER, 5 * CLUSTER) == OLD + bytes(4 * CLUSTER)
    # What was half written must not show through a later write of a part.
    for cluster in range(2, 8):
        await edge.pwrite(cluster * CLUSTER + 512, b"part")
    for cluster in range(2, 8):
        assert await edge.pread(cluster * CLUSTER, CLUSTER) == (bytes(512) + b"part").ljust(CLUSTER, b"\0")
    await node.close()
    report = await checked(memory)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_a_failed_table_write_fails_only_that_request() -> None:
    memory, faulty = await faulty_image()
    node = await open_image(faulty)
    faulty.fail("write")
    with pytest.raises(IoError):
        await guest(node).pwrite(0, OLD)
    await guest(node).pwrite(0, NEW)
    assert await guest(node).pread(0, CLUSTER) == NEW
    await node.close()
    report = await checked(memory)
    assert (report.corruptions, report.leaks) == (0, 0)


class FlakyStorage(MemoryStorage):
    """Fails one write of whole sectors, after as many as `left` says."""

    left = 1 << 30

    def _put(self, offset: int, data: Buffer) -> None:
        self.left -= len(data) >= 512
        if not self.left:
            raise IoError(errno.ENOSPC, self.name, "write", offset, len(data))
        super()._put(offset, data)


async def test_failed_writes_while_the_refcount_structure_grows_can_be_tried_again() -> None:
    storage = FlakyStorage(bytes((await new_image(4 * MiB, cluster_size=512, refcount_bits=64)).data))
    node = await open_image(storage)
    edge = guest(node)
    failures = 0
    for at, start in enumerate(range(0, 4 * MiB, 16 * KiB)):
        cache = node._writer._allocator.cache
        storage.left = 1 + at % 11 if len(cache.dirty) * cache.slice_bytes < 256 * KiB else 1 << 30
        data = struct.pack("<Q", start + 1) * (2 * KiB)
        try:
            await edge.pwrite(start, data)
        except IoError:
            failures += 1
            await edge.pwrite(start, data)
    assert failures > 10
    assert len(node._image.refcount_table) > 64, "the table did not move"
    storage.left = 1 << 30
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    again = guest(await open_image(storage, read_only=True))
    for start in range(0, 4 * MiB, 16 * KiB):
        assert await again.pread(start, 8) == struct.pack("<Q", start + 1)


# Corruption met on the way.


async def image_with_data() -> tuple[MemoryStorage, int]:
    """An image of 16 clusters whose first holds OLD, and where its L2 table stands."""
    storage = await new_image(16 * CLUSTER)
    node = await open_image(storage)
    await guest(node).pwrite(0, OLD)
    await node.close()
    return storage, node._l1[0] & OFFSET_MASK


@pytest.mark.parametrize("where", ["header", "L1 table", "refcount table", "refcount block", "L2 table"])
async def test_a_write_over_metadata_marks_the_image_corrupt_and_is_refused(where: str) -> None:
    storage, l2 = await image_with_data()
    header = (await open_image(storage))._image.header
    block = struct.unpack_from(">Q", storage.data, header.refcount_table_offset)[0]
    target = {
        "header": 0,
        "L1 table": header.l1_table_offset,
        "refcount table": header.refcount_table_offset,
        "refcount block": block,
        "L2 table": l2,
    }[where]
    patched(storage, l2, target | COPIED)
    node = await open_image(storage)
    edge = guest(node)
    before = bytes(storage.data[104:])
    with pytest.raises(CorruptImage):
        await edge.pwrite(0, b"data over metadata")
    assert bytes(storage.data[104:]) == before
    if where == "header":
        return  # an entry that names offset 0 is refused by itself
    assert struct.unpack_from(">Q", storage.data, INCOMPATIBLE_FIELD)[0] & CORRUPT
    with pytest.raises(CorruptImage, match="repair"):
        await edge.pwrite(CLUSTER, b"later")
    with pytest.raises(CorruptImage):
        await edge.flush()
    with pytest.raises(CorruptImage, match="open it read-only"):
        await open_image(storage)
    await open_image(storage, read_only=True)


async def test_metadata_that_refcounts_call_free_is_never_handed_out() -> None:
    storage, l2 = await image_with_data()
    header = (await open_image(storage))._image.header
    block = struct.unpack_from(">Q", storage.data, header.refcount_table_offset)[0]
    struct.pack_into(">H", storage.data, block + l2 // CLUSTER * 2, 0)
    edge = guest(await open_image(storage))
    with pytest.raises(CorruptImage, match="free"):
        await edge.pwrite(CLUSTER, NEW * 15)
    assert bytes(storage.data[l2 + 8 : l2 + CLUSTER]) == bytes(CLUSTER - 8)
    assert struct.unpack_from(">Q", storage.data, INCOMPATIBLE_FIELD)[0] & CORRUPT


@pytest.mark.parametrize(
    "entry",
    [COPIED | 1 << 40, COPIED | 0x12345 << 9 | 512, COPIED | 2, COPIED | 1 << 57, COPIED, 1 << 62, 1 << 62 | 1 << 45],
)
async def test_a_bad_l2_entry_fails_the_requests_that_meet_it_and_no_others(entry: int) -> None:
    storage, l2 = await image_with_data()
    patched(storage, l2 + 8, entry)
    edge = guest(await open_image(storage))
    with pytest.raises(CorruptImage):
        await edge.pread(CLUSTER, 512)
    with pytest.raises(CorruptImage):
        await edge.block_status(0, 16 * CLUSTER)
    with pytest.raises(CorruptImage):
        await edge.pwrite(CLUSTER, b"x")
    with pytest.raises(CorruptImage):
        await edge.zero(CLUSTER, CLUSTER)
    with pytest.raises(CorruptImage):
        await edge.discard(CLUSTER, CLUSTER)
    assert await edge.pread(0, CLUSTER) == OLD
    await edge.pwrite(2 * CLUSTER, NEW)
    await edge.flush()


@pytest.mark.parametrize("entry", [COPIED | 1 << 40, COPIED | 512, 1, COPIED | 1 << 60])
async def test_a_bad_l1_entry_fails_the_requests_that_meet_it(entry: int) -> None:
    storage, _ = await image_with_data()
    header = (await open_image(storage))._image.header
    patched(storage, header.l1_table_offset, entry)
    edge = guest(await open_image(storage))
    with pytest.raises(CorruptImage):
        await edge.pread(0, 512)
    with pytest.raises(CorruptImage):
        await edge.block_status(0, CLUSTER)
    with pytest.raises(CorruptImage):
        await edge.pwrite(0, b"x")
    with pytest.raises(CorruptImage):
        await edge.zero(0, CLUSTER)


@pytest.mark.parametrize("entry", [1 << 45, CLUSTER + 512])
async def test_a_bad_refcount_table_entry_fails_allocation(entry: int) -> None:
    storage, _ = await image_with_data()
    header = (await open_image(storage))._image.header
    patched(storage, header.refcount_table_offset, entry)
    edge = guest(await open_image(storage))
    with pytest.raises(CorruptImage):
        await edge.pwrite(CLUSTER, NEW)
    assert await edge.pread(0, CLUSTER) == OLD


async def test_a_cluster_freed_more_often_than_used_gives_the_image_up() -> None:
    storage, l2 = await image_with_data()
    patched(storage, l2 + 8, struct.unpack_from(">Q", storage.data, l2)[0])
    edge = guest(await open_image(storage))
    await edge.discard(0, 2 * CLUSTER)
    with pytest.raises(CorruptImage, match="freed more often"):
        await edge.flush()
    assert struct.unpack_from(">Q", storage.data, INCOMPATIBLE_FIELD)[0] & CORRUPT


# The header's bits.


async def test_autoclear_bits_are_cleared_durably_before_the_first_write_and_not_by_reading() -> None:
    plain = await new_image(16 * CLUSTER)
    patched(plain, AUTOCLEAR_FIELD, 1 << 40 | 1)
    storage = HeldStorage(bytes(plain.data), name="image")
    edge = guest(await open_image(storage))
    await edge.pread(0, CLUSTER)
    await edge.flush()
    assert struct.unpack_from(">Q", storage.data, AUTOCLEAR_FIELD)[0] == 1 << 40 | 1
    hold = storage.hold("flush")
    writes = [asyncio.ensure_future(edge.pwrite(at * CLUSTER, b"x")) for at in range(3)]
    await hold.reached.wait()
    await settle()
    assert storage.written == [(AUTOCLEAR_FIELD, 8)]
    hold.released.set()
    await asyncio.gather(*writes)
    assert storage.written.count((AUTOCLEAR_FIELD, 8)) == 1
    assert struct.unpack_from(">Q", storage.data, AUTOCLEAR_FIELD)[0] == 0


async def test_a_dirty_image_gets_its_refcounts_rebuilt_when_opened_for_writing() -> None:
    storage = await new_image(64 * 4096, cluster_size=4096, lazy_refcounts=True)
    node = await open_image(storage)
    content = random.Random(1).randbytes(40 * 4096)
    await guest(node).pwrite(0, content)
    await node.close()
    header = node._image.header
    block = struct.unpack_from(">Q", storage.data, header.refcount_table_offset)[0]
    storage.data[block : block + 4096] = bytes(4096)
    patched(storage, INCOMPATIBLE_FIELD, DIRTY)
    assert (await checked(storage)).corruptions
    before = bytes(storage.data)
    assert await guest(await open_image(storage, read_only=True)).pread(0, len(content)) == content
    assert bytes(storage.data) == before
    node = await open_image(storage)
    assert not struct.unpack_from(">Q", storage.data, INCOMPATIBLE_FIELD)[0]
    await guest(node).pwrite(50 * 4096, b"more")
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    assert await guest(await open_image(storage)).pread(0, len(content)) == content


async def test_a_dirty_image_with_a_damaged_table_is_refused_and_not_changed() -> None:
    storage, l2 = await image_with_data()
    patched(storage, l2 + 16, COPIED | 1 << 44 | 512)
    patched(storage, INCOMPATIBLE_FIELD, DIRTY)
    before = bytes(storage.data)
    with pytest.raises(CorruptImage, match="cannot be rebuilt"):
        await open_image(storage)
    assert bytes(storage.data) == before


# Zero, discard, holes, status.


async def test_a_part_of_a_fresh_cluster_leaves_the_rest_a_hole() -> None:
    storage = await held_image()
    edge = guest(await open_image(storage))
    await edge.pwrite(0, b"makes the L2 table")
    storage.written.clear()
    await edge.pwrite(CLUSTER + 4096, b"x" * 512)
    assert [length for _, length in storage.written] == [512]
    assert await edge.pread(CLUSTER, CLUSTER) == (bytes(4096) + b"x" * 512).ljust(CLUSTER, b"\0")


async def test_on_a_device_every_new_cluster_is_written_whole() -> None:
    image = await new_image(4 * CLUSTER)
    device = HeldStorage(
        bytes(image.data) + b"\xee" * 16 * CLUSTER,
        name="device",
        limits=StorageLimits(growable=False, reads_zero_when_new=False),
    )
    edge = guest(await open_image(device))
    await edge.pwrite(4096, b"x" * 512)
    assert await edge.pread(0, CLUSTER) == (bytes(4096) + b"x" * 512).ljust(CLUSTER, b"\0")


async def test_a_full_device_fails_writes_with_no_space_and_keeps_the_rest() -> None:
    image = await new_image(32 * CLUSTER)
    device = MemoryStorage(
        bytes(image.data).ljust(8 * CLUSTER, b"\0"), limits=StorageLimits(growable=False, reads_zero_when_new=False)
    )
    node = await open_image(device)
    for written in range(32):
        try:
            await guest(node).pwrite(written * CLUSTER, OLD)
        except IoError as error:
            failure = error.errno
            break
    assert 0 < written < 31
    assert failure == errno.ENOSPC
    with contextlib.suppress(IoError):
        await guest(node).pwrite(31 * CLUSTER, OLD)
    await node.close()
    assert not (await checked(device)).corruptions
    assert await guest(await open_image(device)).pread(0, written * CLUSTER) == OLD * written


@pytest.mark.parametrize("unmap", [True, False])
async def test_zero_keeps_the_host_cluster_only_without_unmap(unmap: bool) -> None:
    storage = await new_image(16 * CLUSTER)
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, OLD)
    host = l2_entry(node, 0)
    await edge.zero(0, CLUSTER, unmap=unmap)
    assert l2_entry(node, 0) == (0 if unmap else host | ZERO_FLAG)
    assert await edge.block_status(0, CLUSTER) == [Extent(CLUSTER, HOLE | ZERO if unmap else ZERO)]
    await edge.pwrite(512, b"x" * 512)
    assert await edge.pread(0, CLUSTER) == (bytes(512) + b"x" * 512).ljust(CLUSTER, b"\0")
    if not unmap:
        assert l2_entry(node, 0) == host
    await node.close()
    assert (await checked(storage)).leaks == 0


@pytest.mark.parametrize("version", [2, 3])
async def test_discard_over_a_backing_node_never_lets_old_data_show(version: int) -> None:
    backing = MemoryStorage(OLD * 4, name="backing", read_only=True)
    storage = await new_image(4 * CLUSTER, version=version, backing_file="base", backing_format="raw")
    edge = guest(await open_image(storage, backing=backing))
    await edge.pwrite(0, NEW)
    await edge.discard(0, 2 * CLUSTER)
    found = await edge.pread(0, 2 * CLUSTER)
    assert found == (NEW + OLD if version == 2 else bytes(2 * CLUSTER))
    await edge.zero(0, 2 * CLUSTER)
    assert await edge.pread(0, 2 * CLUSTER) == bytes(2 * CLUSTER)


async def test_discard_keeps_parts_of_clusters_but_frees_the_short_last_one() -> None:
    size = 3 * CLUSTER + 1000
    storage = await new_image(size)
    edge = guest(await open_image(storage))
    await edge.pwrite(0, (OLD * 4)[:size])
    await edge.discard(512, size - 512)
    assert await edge.pread(0, size) == OLD + bytes(size - CLUSTER)


async def test_an_image_that_names_a_backing_file_but_has_none_attached_keeps_its_zeroes() -> None:
    storage = await new_image(4 * CLUSTER, backing_file="base", backing_format="raw")
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, NEW)
    await edge.discard(0, CLUSTER)
    await edge.zero(CLUSTER, CLUSTER)
    await node.close()
    backing = MemoryStorage(OLD * 4, name="backing", read_only=True)
    again = guest(await open_image(storage, backing=backing))
    assert await again.pread(0, 4 * CLUSTER) == bytes(2 * CLUSTER) + OLD * 2


async def test_the_status_of_a_huge_sparse_image_costs_one_table() -> None:
    storage = HeldStorage(bytes((await new_image(4 * TiB)).data), name="image")
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(3 * TiB, OLD)
    before = storage.counts["read"]
    extents: list[Extent] = []
    position, calls = 0, 0
    while position < 4 * TiB:
        answer = await edge.block_status(position, 4 * TiB - position)
        extents += answer
        position += sum(extent.length for extent in answer)
        calls += 1
    assert calls <= 2
    assert storage.counts["read"] - before <= 512 * MiB // CLUSTER // 512
    assert extents[0] == Extent(3 * TiB, HOLE | ZERO)
    assert extents[1] == Extent(CLUSTER, 0)
    await edge.zero(0, 2 * TiB)
    assert storage.counts["read"] - before <= 512 * MiB // CLUSTER // 512
    await edge.discard(GiB, 2 * TiB)
    assert await edge.pread(3 * TiB, CLUSTER) == OLD


async def test_status_stops_after_a_bounded_number_of_entries() -> None:
    storage = await new_image(64 * MiB, cluster_size=512)
    node = await open_image(storage)
    edge = guest(node)
    for start in range(0, 20 * MiB, 4 * MiB):
        await edge.pwrite(start, random.Random(start).randbytes(4 * MiB))
    answer = await edge.block_status(0, 64 * MiB)
    assert 0 < sum(extent.length for extent in answer) < 18 * MiB


async def test_status_stops_after_a_bounded_number_of_subclusters() -> None:
    cluster = 16 * KiB
    storage = await new_image(2048 * cluster, cluster_size=cluster, extended_l2=True)
    node = await open_image(storage)
    for at in range(2048):
        if at % 1024 == 0:
            await guest(node).pwrite(at * cluster, b"x")  # makes the table
        slice_ = await node._reader.slice(at)
        assert slice_ is not None
        slice_.data[at & 255] = 0
        slice_.data[(at & 255) + 256] = 0x55555555 << 32  # every second subcluster
    assert PLANS_MAX <= len(await node._reader.plan(0, node.size, 1 << 20)) <= PLANS_MAX + 256 * 32
    extents = await guest(node).block_status(0, node.size)
    assert 0 < len(extents) <= PLANS_MAX + 256 * 32


async def test_status_takes_what_is_not_allocated_from_the_backing_node() -> None:
    backing = MemoryStorage(bytes(CLUSTER) + OLD, name="backing", read_only=True)
    storage = await new_image(5 * CLUSTER, backing_file="base", backing_format="raw")
    edge = guest(await open_image(storage, backing=backing))
    await edge.pwrite(3 * CLUSTER, NEW)
    assert [extent.length for extent in await edge.block_status(0, 5 * CLUSTER)] == [CLUSTER] * 5
    assert [bool(extent.flags & ZERO) for extent in await edge.block_status(0, 5 * CLUSTER)] == [
        True,
        False,
        True,
        False,
        True,
    ]


async def test_a_large_write_to_a_new_image_is_one_write_to_the_file() -> None:
    storage = await held_image(64 * CLUSTER)
    edge = guest(await open_image(storage))
    await edge.pwrite(0, b"makes the L2 table")
    storage.written.clear()
    await edge.pwrite(CLUSTER, OLD * 32)
    assert [length for _, length in storage.written] == [32 * CLUSTER]


async def test_a_read_only_image_is_never_changed() -> None:
    storage, _ = await image_with_data()
    before = bytes(storage.data)
    node = await open_image(storage, read_only=True)
    with pytest.raises(FleecerError):
        await guest(node).pwrite(0, NEW)
    await guest(node).flush()
    await node.close()
    assert bytes(storage.data) == before
