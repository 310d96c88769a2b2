"""What is done at once is done only where nothing is to be waited for, and past nobody who wants to see it."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.fleecing_world import CLUSTER, World
from tests.qcow2_world import checked, file_edge, guest, new_image, open_image

from fleecer.block.copier import Copier
from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import Qcow2Node, open_qcow2, read_header
from fleecer.block.nodes.raw import RawNode
from fleecer.errors import CorruptImage, IoError
from fleecer.formats.qcow2.tables import COPIED
from fleecer.ranges import Buffer, WriteAtOnce
from fleecer.testing.memory import FaultyStorage, MemoryNode, MemoryStorage
from fleecer.units import KiB, MiB


async def test_nothing_is_done_at_once_behind_a_closed_gate() -> None:
    edge = Edge(MemoryNode("disk", 4096), "guest", "disk", writable=True)
    assert edge.try_pwrite(0, b"x")
    assert edge.try_pread(0, 1) == b"x"
    edge.close_gate()
    assert edge.try_pread(0, 1) is None
    assert not edge.try_pwrite(0, b"y")
    edge.open_gate()
    assert edge.try_pread(0, 1) == b"x"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (4095, 2)])
async def test_what_is_to_be_refused_is_not_done_at_once(offset: int, length: int) -> None:
    edge = Edge(MemoryNode("disk", 4096), "guest", "disk", writable=True)
    assert edge.try_pread(offset, length) is None
    assert not edge.try_pwrite(offset, bytes(length))
    assert not Edge(edge.node, "reader", "disk").try_pwrite(0, b"x"), "it may only read"


async def test_who_overrides_an_operation_sees_every_request() -> None:
    seen: list[str] = []

    class Spy(RawNode):
        async def pread(self, offset: int, length: int) -> Buffer:
            seen.append("read")
            return await super().pread(offset, length)

    edge = Edge(
        Spy("spy", Edge(MemoryNode("disk", 4096), "spy", "file", writable=True)), "guest", "disk", writable=True
    )
    assert edge.try_pread(0, 1) is None
    assert await edge.pread(0, 1) == b"\0"
    assert seen == ["read"]
    assert edge.try_pwrite(0, b"x"), "what it leaves alone goes past it"


async def test_old_data_that_takes_no_wait_to_copy_is_copied_at_once() -> None:
    world = World()
    assert world.top.try_pwrite(0, b"x")
    taken = await world.take()
    assert world.top.try_pwrite(0, b"y")
    assert world.top.try_pwrite(CLUSTER - 1, b"zz")
    assert taken.fleece.snapshot.done.count() == 2
    await world.check_whole(taken)


@pytest.mark.parametrize("serialising", [False, True])
async def test_what_is_copied_at_once_is_written_as_the_snapshot_wants_it(*, serialising: bool) -> None:
    class Target(FileNode):
        """Has to be waited for by who wants to be alone."""

        def serialising_writer(self) -> WriteAtOnce | None:
            return None

    disk = MemoryNode("disk", b"o" * 64 * KiB)
    copier = Copier(Edge(disk, "copier", "file"), cluster_size_bytes=CLUSTER)
    target = Edge(Target("target", MemoryStorage(64 * KiB)), "copier", "target", writable=True)
    copier.take("s", target, serialising=serialising)
    assert copier.preserved_at_once(0, 1) is not serialising
    await copier.preserve(0, 1)
    assert await target.pread(0, CLUSTER) == b"o" * CLUSTER
    assert copier.preserved_at_once(0, 1)


async def test_what_a_snapshot_is_reading_from_the_disk_is_not_changed_at_once() -> None:
    world = World()
    taken = await world.take()
    copier, snapshot = taken.fleece.copier, taken.fleece.snapshot
    claim = copier.freeze(snapshot, CLUSTER + 512, 512)
    assert not world.top.try_pwrite(CLUSTER, b"x"), "it may be copied, but not changed"
    assert world.top.try_pwrite(CLUSTER - 1, b"x")
    assert world.top.try_pwrite(2 * CLUSTER, b"x")
    copier.thaw(snapshot, claim)
    assert world.top.try_pwrite(CLUSTER, b"x")
    await world.check_whole(taken)


async def test_no_cluster_is_read_or_written_at_once_while_somebody_has_it_alone() -> None:
    node = await open_image(await new_image(MiB))
    edge = guest(node)
    await edge.pwrite(0, b"x" * 64 * KiB)
    assert edge.try_pread(0, 1) == b"x"
    assert edge.try_pwrite(0, b"y")
    claim = node._in_flight.enter(0, 64 * KiB, serialising=True)
    assert edge.try_pread(0, 1) is None
    assert not edge.try_pwrite(0, b"z")
    reading = asyncio.ensure_future(edge.pread(0, 1))
    await asyncio.sleep(0)
    assert not reading.done()
    node._in_flight.leave(claim)
    assert await reading == b"y"
    shared = node._in_flight.enter(0, 64 * KiB)
    assert edge.try_pread(0, 1) == b"y", "a claim that is shared holds nobody up"
    node._in_flight.leave(shared)


async def test_a_read_at_once_puts_together_what_lies_in_several_places() -> None:
    cluster, size = 64 * KiB, MiB
    generator = random.Random(1)
    backing = MemoryStorage(generator.randbytes(size - 3 * cluster))
    node = await open_image(await new_image(size, cluster_size=cluster), backing=backing)
    edge = guest(node)
    for number in (5, 2, 9, 3, 4):
        await edge.pwrite(number * cluster, generator.randbytes(cluster))
    await edge.zero(7 * cluster, 2 * cluster)
    end_of_backing = size - 3 * cluster
    for _ in range(300):
        offset = generator.randrange(size)
        length = generator.randint(1, size - offset)
        data = edge.try_pread(offset, length)
        if data is None:  # what lies past the end of the backing file is for `pread`
            assert offset + length > end_of_backing
        else:
            assert data == await edge.pread(offset, length)
    assert edge.try_pread(0, end_of_backing) is not None


@pytest.mark.parametrize("extended", [False, True])
async def test_short_reads_of_an_overlay_at_once_are_of_what_is_on_top(*, extended: bool) -> None:
    cluster, size = 64 * KiB, MiB
    generator = random.Random(2)
    short = size - cluster - 1234
    backing = MemoryStorage(generator.randbytes(short), name="backing")
    node = await open_image(await new_image(size, cluster_size=cluster, extended_l2=extended), backing=backing)
    edge = guest(node)
    expected = bytearray(backing.data + bytes(size - short))

    async def check() -> None:
        at_once = 0
        for _ in range(300):
            length = generator.randint(1, 8 * KiB)
            offset = generator.randrange(size - length)
            data = edge.try_pread(offset, length)
            if data is None:
                assert offset + length > short, "past the end of the backing node it may take a wait, elsewhere none"
                data = await edge.pread(offset, length)
            else:
                at_once += 1
            assert data == expected[offset : offset + length], (offset, length)
        assert at_once > 200

    await check()  # there is no table yet
    for turn in range(16):
        length = (512, 2048, 4096, cluster)[turn % 4]
        offset = generator.randrange(size // length) * length
        if turn % 8 < 4:
            data = generator.randbytes(length)
            await edge.pwrite(offset, data)
        else:
            data = bytes(length)
            await edge.zero(offset, length)
        expected[offset : offset + length] = data
        await check()


async def test_what_a_drained_or_broken_backing_node_holds_is_not_read_at_once_past_that() -> None:
    backing = MemoryStorage(b"o" * MiB, name="backing")
    node = await open_image(await new_image(MiB), backing=backing)
    edge = guest(node)
    below = node.children[1]
    assert edge.try_pread(0, 1) == b"o"
    below.close_gate()
    assert edge.try_pread(0, 1) is None
    below.open_gate()
    assert edge.try_pread(0, 1) == b"o"

    def check() -> None:
        raise IoError(errno.EIO, "backing", "read")

    below.node.check = check
    assert edge.try_pread(0, 1) is None
    with pytest.raises(IoError, match="backing"):
        await edge.pread(0, 1)


@pytest.mark.parametrize("extended", [False, True])
async def test_an_entry_that_makes_no_sense_does_not_let_the_backing_node_show(*, extended: bool) -> None:
    node = await open_image(await new_image(MiB, extended_l2=extended), backing=MemoryStorage(b"o" * MiB))
    edge = guest(node)
    await edge.pwrite(512 * KiB, b"x")  # so that there is a table
    slice_ = await node._reader.slice(0)
    assert slice_ is not None
    slice_.data[0] = COPIED
    assert edge.try_pread(64 * KiB, 1) == b"o"
    with pytest.raises(CorruptImage, match="L2 entry"):
        await edge.pread(0, 1)


@pytest.mark.parametrize(
    ("entry", "bitmap", "problem"),
    [
        (0, 1 << 5, "a contradiction"),  # allocated nowhere
        (None, 1 << 5 | 1 << 37, "a contradiction"),  # allocated, and zeroes
        (COPIED | 1 << 40, 1 << 5, "past the file's end"),
    ],
)
async def test_a_bitmap_that_makes_no_sense_does_not_let_the_backing_node_show(
    entry: int | None, bitmap: int, problem: str
) -> None:
    node = await open_image(await new_image(MiB, extended_l2=True), backing=MemoryStorage(b"o" * MiB))
    edge = guest(node)
    await edge.pwrite(0, b"x" * 2048)
    assert edge.try_pread(2048, 1) == b"o"
    slice_ = await node._reader.slice(0)
    assert slice_ is not None
    slice_.data[0] = slice_.data[0] if entry is None else entry
    slice_.data[len(slice_.data) // 2] = bitmap
    with pytest.raises(CorruptImage, match=problem):
        edge.try_pread(2048, 1)


async def test_a_read_through_a_chain_asks_each_image_once_what_reads_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    node = await open_image(await new_image(MiB), backing=MemoryStorage(b"o" * MiB))
    for _ in range(4):
        below = Edge(node, "node 'disk'", "backing")
        file = file_edge(await new_image(MiB))
        header = await read_header(file, "disk")
        node = await open_qcow2(file, name="disk", header=header, backing=below, read_only=False)
    asked = 0
    real = Qcow2Node.reader

    def count(self: Qcow2Node) -> Any:
        nonlocal asked
        asked += 1
        return real(self)

    monkeypatch.setattr(Qcow2Node, "reader", count)
    for offset in (0, 64 * KiB - 2):
        asked = 0
        assert guest(node).try_pread(offset, 4) == b"oooo"
        assert asked == 5


@pytest.mark.peer
async def test_what_is_packed_or_not_in_memory_is_not_read_at_once(tmp_path: Path) -> None:
    raw, packed = tmp_path / "raw", tmp_path / "packed.qcow2"
    raw.write_bytes(b"x" * 256 * KiB)
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, packed], check=True)
    edge = guest(await open_image(MemoryStorage(packed.read_bytes())))
    assert edge.try_pread(0, 128 * KiB) is None, "the table is not in memory yet"
    assert await edge.pread(0, 128 * KiB) == b"x" * 128 * KiB
    assert edge.try_pread(0, 128 * KiB) is None, "unpacking takes its time"


async def test_nothing_of_a_range_is_done_at_once_while_somebody_has_a_part_of_it_alone() -> None:
    node = await open_image(await new_image(MiB))
    edge = guest(node)
    await edge.pwrite(0, b"x" * 256 * KiB)
    claim = node._in_flight.enter(128 * KiB, 64 * KiB, serialising=True)
    assert edge.try_pread(0, 256 * KiB) is None
    assert not edge.try_pwrite(0, b"z" * 256 * KiB)
    assert edge.try_pread(0, 128 * KiB) == b"x" * 128 * KiB
    assert edge.try_pwrite(1, b"y" * (128 * KiB - 1))
    node._in_flight.leave(claim)
    assert edge.try_pread(0, 256 * KiB) == b"x" + b"y" * (128 * KiB - 1) + b"x" * 128 * KiB
    assert edge.try_pwrite(0, b"z" * 256 * KiB)


async def test_a_write_at_once_needs_all_its_clusters_in_a_row_and_its_own() -> None:
    cluster = 64 * KiB
    node = await open_image(await new_image(MiB))
    edge = guest(node)
    for number in (0, 1, 3, 2):
        await edge.pwrite(number * cluster, b"x" * cluster)
    before = bytes(await edge.pread(0, MiB))
    assert not edge.try_pwrite(cluster, b"y" * 2 * cluster), "the second lies elsewhere"
    assert not edge.try_pwrite(3 * cluster, b"y" * 2 * cluster), "the second has no place yet"
    assert await edge.pread(0, MiB) == before
    node._image.metadata.add(node._slices[next(iter(node._slices))].data[1] & ~COPIED)
    assert not edge.try_pwrite(0, b"y" * 2 * cluster), "where metadata is"
    assert await edge.pread(0, MiB) == before


async def image_with_a_table(size: int = MiB, **options: Any) -> tuple[Qcow2Node, MemoryStorage]:
    """An image whose first cluster is written, so that its tables are there and in memory."""
    storage = await new_image(size)
    node = await open_image(storage, **options)
    await guest(node).pwrite(0, b"x" * 64 * KiB)
    return node, storage


@pytest.mark.parametrize("backed", [False, True])
async def test_new_clusters_are_written_at_once_with_what_was_there_around(*, backed: bool) -> None:
    cluster = 64 * KiB
    generator = random.Random(3)
    below = generator.randbytes(MiB)
    node, storage = await image_with_a_table(backing=MemoryStorage(below) if backed else None)
    edge = guest(node)
    expected = bytearray(below if backed else bytes(MiB))
    expected[:cluster] = b"x" * cluster
    for offset, length in [(cluster + 512, 100), (2 * cluster, cluster), (4 * cluster, 3 * cluster), (MiB - 1, 1)]:
        data = generator.randbytes(length)
        assert edge.try_pwrite(offset, data)
        expected[offset : offset + length] = data
    data = generator.randbytes(100)
    assert not edge.try_pwrite(9 * cluster - 50, data), "parts of two clusters"
    await edge.pwrite(9 * cluster - 50, data)
    expected[9 * cluster - 50 : 9 * cluster + 50] = data
    assert bytes(await edge.pread(0, MiB)) == bytes(expected)
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_a_new_cluster_is_not_written_at_once_while_anybody_uses_the_old_one() -> None:
    node, _ = await image_with_a_table(backing=MemoryStorage(b"o" * MiB))
    edge = guest(node)
    reader = node._in_flight.enter(64 * KiB, 64 * KiB)
    assert not edge.try_pwrite(64 * KiB, b"n")
    writing = asyncio.create_task(edge.pwrite(64 * KiB, b"n", serialising=True))
    await asyncio.sleep(0)
    assert not writing.done(), "it and the reader wait for each other"
    assert edge.try_pwrite(128 * KiB, b"n"), "another cluster is another matter"
    node._in_flight.leave(reader)
    await writing
    assert await edge.pread(64 * KiB, 2) == b"no"


async def test_a_serialising_write_to_new_clusters_needs_no_claim_where_it_is_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, _ = await image_with_a_table()
    edge = guest(node)
    with monkeypatch.context() as patched:
        patched.delattr(InFlight, "enter")
        await edge.pwrite(64 * KiB, b"n" * 128 * KiB, serialising=True)
    assert edge.try_pread(64 * KiB, 1) == b"n"


async def test_a_serialising_write_in_place_at_once_is_alone() -> None:
    node, _ = await image_with_a_table()
    edge = guest(node)
    assert edge.try_pwrite(0, b"y", serialising=True)
    reader = node._in_flight.enter(0, 64 * KiB)
    assert edge.try_pwrite(0, b"z"), "it shares the cluster"
    assert not edge.try_pwrite(0, b"z", serialising=True)
    node._in_flight.leave(reader)
    assert edge.try_pwrite(0, b"z", serialising=True)


@pytest.mark.parametrize("misplaced", [4 * KiB, 512])
async def test_a_table_that_lies_across_others_is_not_used_at_once(misplaced: int) -> None:
    node, _ = await image_with_a_table()
    edge = guest(node)
    node._l1[0] += misplaced
    for _ in range(2):  # as if its slice were in memory
        assert not edge.try_pwrite(0, b"y")
        assert not edge.try_pwrite(0, b"y" * 128 * KiB)
        assert not edge.try_pwrite(64 * KiB, b"y")
        with pytest.raises(CorruptImage):
            edge.try_pread(0, 1)
        node._slices[node._l1[0] & ~COPIED] = next(iter(node._slices.values()))


async def test_nothing_is_allocated_for_a_write_that_could_not_be_done_at_once() -> None:
    held = Held()
    below = MemoryStorage(b"o" * MiB, pause=held)
    node, storage = await image_with_a_table(backing=below)
    edge = guest(node)
    before = storage.size
    for _ in range(5):
        assert not edge.try_pwrite(64 * KiB, b"n"), "the backing node has to be waited for"
    below.pause = None
    assert edge.try_pwrite(64 * KiB, b"n")
    assert await edge.pread(64 * KiB, 2) == b"no"
    assert storage.size == before + 64 * KiB
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_a_write_at_once_that_fails_gives_its_clusters_back_and_leaves_nothing_to_be_seen() -> None:
    class Full(MemoryStorage):
        """Writes half of what is whole sectors, and fails."""

        fails = False

        def _put(self, offset: int, data: Buffer) -> None:
            if self.fails and len(data) >= 512:
                super()._put(offset, data[: len(data) // 2])
                raise IoError(errno.ENOSPC, self.name, "write", offset, len(data))
            super()._put(offset, data)

    storage = Full(0, name="image")
    await new_image(MiB, storage)
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, b"x" * 64 * KiB)
    storage.fails = True
    for data in (b"y" * 4096, b"y" * 64 * KiB, b"y" * 128 * KiB):
        with pytest.raises(IoError):
            edge.try_pwrite(64 * KiB, data)
    storage.fails = False
    assert not any(await edge.pread(64 * KiB, 256 * KiB))
    for number in range(1, 8):
        await edge.pwrite(number * 64 * KiB + 100, b"part")
    expected = (bytes(100) + b"part").ljust(64 * KiB, b"\0")
    assert bytes(await edge.pread(64 * KiB, 7 * 64 * KiB)) == expected * 7, "what was half written shows"
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_a_used_cluster_is_not_taken_for_blank_at_once() -> None:
    node, _ = await image_with_a_table()
    edge = guest(node)
    await edge.discard(0, 64 * KiB)
    await edge.flush()
    assert not edge.try_pwrite(64 * KiB, b"n"), "the rest of it would show what was there"
    await edge.pwrite(64 * KiB, b"n")
    assert bytes(await edge.pread(64 * KiB, 64 * KiB)) == b"n".ljust(64 * KiB, b"\0")


async def test_new_clusters_wait_for_tables_and_commits() -> None:
    node = await open_image(await new_image(MiB))
    edge = guest(node)
    assert not edge.try_pwrite(0, b"n"), "there is no table yet"
    await edge.pwrite(0, b"n")
    table = node._l1[0]
    node._l1[0] &= ~COPIED
    assert not edge.try_pwrite(64 * KiB, b"n"), "the table is shared with a snapshot"
    node._l1[0] = table
    node._commits._maps_dirty_max = 0
    assert not edge.try_pwrite(64 * KiB, b"n"), "so much is dirty that a commit comes first"
    node._commits._maps_dirty_max = MiB
    run = node._writer._allocator.find(1)
    assert run is not None
    node._image.metadata.add(run.offset)
    assert not edge.try_pwrite(64 * KiB, b"n"), "refcounts call free what is metadata"
    with pytest.raises(CorruptImage):
        await edge.pwrite(64 * KiB, b"n")


# What is begun without a coroutine.


class Held:
    """A pause that lasts until `go_on`, and who was told what at the end of reads."""

    def __init__(self) -> None:
        self.may_go = asyncio.Event()
        self.told: list[bytes | Exception] = []

    async def __call__(self) -> None:
        await self.may_go.wait()

    def ended(self, data: Buffer, error: Exception | None) -> None:
        self.told.append(bytes(data) if error is None else error)

    async def go_on(self) -> None:
        self.may_go.set()
        while not self.told:
            await asyncio.sleep(0)


async def test_a_read_that_was_begun_holds_a_drain_up_until_it_has_ended() -> None:
    held = Held()
    edge = Edge(RawNode("raw", Edge(MemoryNode("disk", b"x" * 4096, pause=held), "raw", "file")), "guest", "disk")
    assert edge.begin_pread(0, 4096, held.ended)
    assert edge.busy == 1
    edge.close_gate()
    assert not edge.begin_pread(0, 4096, held.ended), "the gate is closed"
    drained = asyncio.create_task(edge.idle())
    await asyncio.sleep(0)
    assert not drained.done()
    assert not held.told
    await held.go_on()
    await drained
    assert held.told == [b"x" * 4096]
    assert edge.busy == 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (4095, 2)])
async def test_what_is_to_be_refused_is_not_begun(offset: int, length: int) -> None:
    held = Held()
    edge = Edge(MemoryNode("disk", 4096, pause=held), "guest", "disk")
    assert not edge.begin_pread(offset, length, held.ended)
    assert edge.busy == 0


async def test_who_overrides_reading_sees_what_could_be_begun_past_it() -> None:
    class Spy(RawNode):
        async def pread(self, offset: int, length: int) -> Buffer:
            return await super().pread(offset, length)

    held = Held()
    edge = Edge(Spy("spy", Edge(MemoryNode("disk", 4096, pause=held), "spy", "file")), "guest", "disk")
    assert not edge.begin_pread(0, 1, held.ended)


async def test_what_has_become_untrue_meanwhile_is_not_read() -> None:
    held = Held()
    node = MemoryNode("disk", 4096, pause=held)
    edge = Edge(node, "guest", "disk")
    broken = IoError(5, "disk", "read")

    def check() -> None:
        raise broken

    assert edge.begin_pread(0, 1, held.ended)
    node.check = check
    await held.go_on()
    assert held.told == [broken]
    assert edge.busy == 0


async def test_a_read_that_was_begun_and_a_write_of_its_range_wait_for_each_other() -> None:
    held = Held()
    storage = MemoryStorage(b"o" * 4096, pause=held)
    edge = Edge(FileNode("disk", storage), "guest", "disk", writable=True)
    assert edge.begin_pread(0, 4096, held.ended)
    storage.pause = None
    assert not edge.try_pwrite(0, b"n"), "it is being read"
    storage.pause = held
    writing = asyncio.create_task(edge.pwrite(0, b"n" * 4096))
    await asyncio.sleep(0)
    assert not edge.begin_pread(0, 4096, held.ended), "the write is first"
    await held.go_on()
    await writing
    assert held.told == [b"o" * 4096]


async def test_a_flush_that_was_begun_holds_a_drain_up_until_it_has_ended() -> None:
    held = Held()
    storage = MemoryStorage(4096, pause=held)
    disk = FileNode("disk", storage)
    edge = Edge(RawNode("raw", Edge(disk, "raw", "file", writable=True)), "guest", "disk", writable=True)
    told: list[Exception | None] = []
    assert edge.begin_flush(told.append)
    assert edge.busy == 1
    edge.close_gate()
    assert not edge.begin_flush(told.append), "the gate is closed"
    drained = asyncio.create_task(edge.idle())
    await asyncio.sleep(0)
    assert not drained.done()
    assert not told
    held.may_go.set()
    await drained
    assert told == [None]
    assert edge.busy == 0
    edge.open_gate()
    assert not edge.begin_flush(told.append), "nothing is to be synced"
    assert edge.busy == 0


async def test_who_overrides_flushing_sees_what_could_be_begun_past_it() -> None:
    class Spy(RawNode):
        async def flush(self) -> None:
            await super().flush()

    edge = Edge(Spy("spy", Edge(FileNode("disk", MemoryStorage(4096)), "spy", "file", writable=True)), "guest", "disk")
    assert not edge.begin_flush(lambda _: None)
    assert edge.busy == 0


async def test_a_flush_of_an_image_is_begun_only_where_no_table_is_to_be_committed() -> None:
    storage = await new_image(MiB)
    node = await open_image(storage)
    edge = guest(node)
    told: list[Exception | None] = []
    await edge.pwrite(0, b"o" * 64 * KiB)
    assert not edge.begin_flush(told.append), "there is a table to be committed"
    await edge.flush()
    await edge.pwrite(0, b"n")
    synced = storage.sync_count
    assert edge.begin_flush(told.append)
    while not told:
        await asyncio.sleep(0)
    assert told == [None]
    assert storage.sync_count == synced + 1


async def test_a_flush_of_an_image_that_was_begun_and_fails_is_final() -> None:
    faulty = FaultyStorage(await new_image(MiB))
    edge = guest(await open_image(faulty))
    told: list[Exception | None] = []
    await edge.pwrite(0, b"o")
    await edge.flush()
    await edge.pwrite(0, b"n")
    faulty.fail("flush")
    assert edge.begin_flush(told.append)
    while not told:
        await asyncio.sleep(0)
    assert isinstance(told[0], IoError)
    assert not edge.begin_flush(told.append)
    for _ in range(2):
        with pytest.raises(IoError, match="reopen the image"):
            await edge.pwrite(0, b"x")
        with pytest.raises(IoError, match="reopen the image"):
            await edge.flush()


@pytest.mark.parametrize(("backed", "tabled"), [(False, True), (True, True), (True, False)])
async def test_a_read_of_an_image_that_was_begun_keeps_its_clusters_where_they_are(
    *, backed: bool, tabled: bool
) -> None:
    held = Held()
    held.may_go.set()
    storage = await new_image(MiB)
    below = MemoryStorage(b"o" * MiB, name="backing", pause=held)
    node = await open_image(storage, backing=below if backed else None)
    edge = guest(node)
    if tabled:
        await edge.pwrite(512 * KiB, b"x")
    if not backed:
        await edge.pwrite(0, b"o" * 4096)
    held.may_go.clear()
    storage.pause = None if backed else held
    assert edge.begin_pread(0, 4096, held.ended)
    emptied = asyncio.create_task(edge.zero(0, 64 * KiB))
    await asyncio.sleep(0)
    assert not emptied.done(), "the cluster could get another use while it is read"
    assert not edge.begin_pread(0, 4096, held.ended)
    await held.go_on()
    await emptied
    assert held.told == [b"o" * 4096]
    held.told.clear()
    assert not edge.begin_pread(0, 4096, held.ended), "zeroes are not read"
