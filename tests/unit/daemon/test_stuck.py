"""Scratches, readers and targets that never answer: they hold up no other snapshot, no guest, no shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from tests.serving_world import turns

from fleecer.block.fleecing import Fleece
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.daemon import Daemon, SnapshotSet
from fleecer.errors import InUse, IoError, NotFound, SnapshotBroken, UsageError
from fleecer.jobs import BackupRequest
from fleecer.net.nbd_client import NbdClient
from fleecer.ranges import Buffer
from fleecer.storage.api import Storage
from fleecer.storage.file import FileStorage, open_unlinked
from fleecer.storage.pool import running_pool
from fleecer.testing.memory import FaultyStorage, MemoryNode, MemoryStorage
from fleecer.testing.streams import memory_streams
from fleecer.units import KiB

SIZE = 256 * KiB


class StuckStorage(FaultyStorage):
    """A storage on a file server that is gone: nothing ends until `back` is set."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.back, self.busy = asyncio.Event(), asyncio.Event()

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return False

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.busy.set()
        await self.back.wait()
        await super().pwrite(offset, data)

    async def pread(self, offset: int, length: int) -> Buffer:
        self.busy.set()
        await self.back.wait()
        return await super().pread(offset, length)

    async def sync(self) -> None:
        self.busy.set()
        await self.back.wait()
        await super().sync()


class World:
    """A daemon with one disk, whose scratches can be made to hang."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.daemon = Daemon(raise_internal_errors=True)
        memory = MemoryNode("memory", b"old" * (SIZE // 3) + b"x")
        self.daemon.graph.add(memory, named=False)
        self.disk = FaultNode("disk", self.daemon.graph.attach(memory, "node 'disk'", "file", writable=True))
        self.daemon.graph.add(self.disk, named=True)
        self.guest = self.daemon.export(self.disk, "disk", writable=True).edge
        self.stuck: list[StuckStorage] = []

    async def create(self, name: str, *, copy_timeout_s: float = 15.0) -> SnapshotSet:
        return await self.daemon.snapshots.create(
            name=name, scratch_directory=self.directory, copy_timeout_s=copy_timeout_s
        )

    def hang(self, fleece: Fleece) -> StuckStorage:
        """From now on the snapshot's scratch does not answer."""
        scratch = fleece.snapshot.scratch.node
        assert isinstance(scratch, FileNode)
        scratch.storage = storage = StuckStorage(scratch.storage)
        self.stuck.append(storage)
        return storage

    async def reader(self, name: str) -> NbdClient:
        ours, theirs = memory_streams()
        self.daemon.server.serve(theirs)
        return await NbdClient.connect(ours, name)

    async def settle(self) -> None:
        here = asyncio.current_task()
        while left := asyncio.all_tasks() - {here}:
            await asyncio.wait(left)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for module in ("block.graph", "daemon.snapshots", "daemon.daemon", "jobs.backup"):
        monkeypatch.setattr(f"fleecer.{module}.LEAVE_TIMEOUT_S", 0.02)
    monkeypatch.setattr("fleecer.daemon.snapshots.READERS_TIMEOUT_S", 0.02)
    made = World(tmp_path)
    yield made
    for storage in made.stuck:
        storage.back.set()
    await made.settle()
    await made.daemon.close()
    await made.settle()
    assert not made.daemon.graph.nodes()
    await running_pool().close()


async def test_a_scratch_that_never_answers_holds_up_neither_its_end_nor_other_snapshots(world: World) -> None:
    taken = await world.create("stuck", copy_timeout_s=0.01)
    storage = world.hang(taken.parts[0].fleece)
    await world.guest.pwrite(0, b"new")  # its copy is given up, and stays in flight
    assert storage.busy.is_set()
    await world.daemon.snapshots.delete("stuck")
    assert world.guest.node is world.disk, "the filter is gone"
    assert "took longer than 0.01 s" in taken.parts[0].cause
    for name in ("stuck", "other"):  # its name is free again
        await world.create(name)
        await world.guest.pwrite(100_000, b"new")
    await world.daemon.snapshots.delete("stuck")
    await world.daemon.snapshots.delete("other")
    assert len([node for node in world.daemon.graph.nodes() if node.name.startswith("#")]) == 1, "the stuck scratch"
    storage.back.set()
    await world.settle()
    assert [node.name for node in world.daemon.graph.nodes()] == ["memory", "disk"], "it went once it answered"


async def test_an_end_with_a_copy_in_flight_is_bounded_too_and_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    taken = await world.create("s")
    storage = world.hang(taken.parts[0].fleece)
    writing = asyncio.ensure_future(world.guest.pwrite(0, b"new"))
    await storage.busy.wait()
    await world.daemon.snapshots.delete("s")  # nobody needs the copy any more: the write goes on
    await writing
    assert world.guest.node is world.disk
    held = "snapshot disk@s has ended, but what it used is still held after 0.02 s: requests are in flight, or the file"
    assert held in caplog.text


async def test_a_reader_that_never_ends_gets_an_error_and_holds_up_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    taken = await world.create("s")
    await world.guest.pwrite(0, b"new")
    storage = world.hang(taken.parts[0].fleece)
    edge = taken.parts[0].export.edge
    reading = asyncio.ensure_future(edge.pread(0, 512))
    client = await world.reader("disk@s")
    asking = asyncio.ensure_future(client.pread(0, 512))
    await storage.busy.wait()
    await turns()
    await world.daemon.snapshots.delete("s")
    assert "snapshot disk@s ends while its readers wait" in caplog.text
    assert world.guest.node is world.disk
    await world.create("other")
    await world.daemon.snapshots.delete("other")
    storage.back.set()
    with pytest.raises(SnapshotBroken, match="it has ended"):
        await reading
    with pytest.raises(IoError):
        await asking
    await client.close()


async def test_the_daemon_ends_all_the_same_and_says_what_it_left(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    taken = await world.create("s", copy_timeout_s=0.01)
    await world.guest.pwrite(0, b"new")
    storage = world.hang(taken.parts[0].fleece)
    client = await world.reader("disk@s")
    asking = asyncio.ensure_future(client.pread(0, 512))
    await storage.busy.wait()
    broken = await world.create("broken", copy_timeout_s=0.01)
    world.hang(broken.parts[0].fleece)
    await world.guest.pwrite(100_000, b"new")
    async with asyncio.timeout(10):
        await world.daemon.close()
    assert not world.daemon.graph.nodes()
    left = [record.getMessage() for record in caplog.records if "is not closed" in record.getMessage()]
    assert sorted(message.partition(": ")[2] for message in left) == [
        "1 requests of export 'disk@s' (nbd) do not end",
        "1 requests of snapshot 'broken' of disk (scratch) do not end",
        "2 requests of snapshot 's' of disk (scratch) do not end",  # a read, and the copy once the newer one broke
    ]
    assert caplog.records[0].levelno == logging.WARNING
    storage.back.set()
    with pytest.raises(IoError):
        await asking
    for one in world.stuck:
        one.back.set()
    await world.settle()
    await storage.close()  # what the daemon left to the end of the process
    await world.stuck[1].close()


async def test_a_file_server_that_does_not_even_open_holds_up_only_who_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    back, asked = asyncio.Event(), asyncio.Event()

    async def stuck(directory: str, sizes: Sequence[int]) -> list[FileStorage]:
        if directory.endswith("dead"):
            asked.set()
            await back.wait()
        return await open_unlinked(world.directory, sizes)

    monkeypatch.setattr("fleecer.daemon.scratches.open_unlinked", lambda *where: asyncio.ensure_future(stuck(*where)))
    create = world.daemon.snapshots.create
    making = asyncio.ensure_future(create(name="late", scratch_directory=f"{world.directory}/dead"))
    await asked.wait()
    await world.create("other")
    await world.daemon.snapshots.delete("other")
    with pytest.raises(UsageError, match="snapshot name 'late' is taken"):
        await world.create("late")
    with pytest.raises(NotFound):
        await world.daemon.snapshots.delete("late")
    async with asyncio.timeout(10):
        await world.daemon.snapshots.delete_all()
    back.set()
    with pytest.raises(UsageError, match="the daemon is shutting down"):
        await making
    await world.settle()
    assert [node.name for node in world.daemon.graph.nodes()] == ["memory", "disk"]


@pytest.mark.parametrize("sync", ["none", "full"])
async def test_a_job_ends_whose_target_never_answers_and_the_target_tells_who_holds_it(world: World, sync: str) -> None:
    storage = StuckStorage(MemoryStorage(SIZE, name="target"))
    world.stuck.append(storage)
    target = FileNode("target", storage)
    graph = world.daemon.graph
    graph.add(target, named=True)
    request = BackupRequest("job", world.disk, target, "none" if sync == "none" else "full", auto_dismiss=False)
    (job,) = await world.daemon.start_backups([request])
    writing = asyncio.ensure_future(world.guest.pwrite(0, b"new"))
    await storage.busy.wait()
    async with asyncio.timeout(10):
        await job.cancel()
    await writing
    assert (job.state, job.error) == ("concluded", "")
    assert world.guest.node is world.disk
    with pytest.raises(InUse, match=r"^node 'target' is in use by job 'job' \(target\); remove that first$"):
        await graph.remove("target")
    storage.back.set()
    await world.settle()
    await graph.remove("target")


async def test_a_job_ends_whose_target_answers_no_flush(world: World) -> None:
    storage = StuckStorage(MemoryStorage(SIZE, name="target"))
    target = FileNode("target", storage)
    graph = world.daemon.graph
    graph.add(target, named=True)
    fault = FaultNode("fault", graph.attach(target, "node 'fault'", "file", writable=True))
    graph.add(fault, named=True)
    storage.back.set()
    held = fault.hold("flush")
    (job,) = await world.daemon.start_backups([BackupRequest("job", world.disk, fault, "full", auto_dismiss=False)])
    await held.reached()
    async with asyncio.timeout(10):
        await job.cancel()
    assert job.state == "concluded"
    assert world.guest.node is world.disk
    held.release()


async def test_a_cut_behind_a_slow_request_fails_soon_in_words_that_help(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    held = world.disk.hold("write")
    writing = asyncio.ensure_future(world.guest.pwrite(0, b"slow"))
    await held.reached()
    making = asyncio.ensure_future(world.create("s"))
    while world.guest._gate is None:
        await asyncio.sleep(0)
    waiting = asyncio.ensure_future(world.guest.pread(0, 1))
    at_s = loop.time() + 5.5  # a sixth of what guests put up with
    monkeypatch.setattr(loop, "time", lambda: at_s)
    text = (
        r"1 requests of export 'disk' \(nbd\) did not end in 5 s, so no snapshot was taken; try again, or allow it more"
    )
    with pytest.raises(IoError, match=rf"{text} by drain-timeout$"):
        await making
    monkeypatch.undo()
    await waiting
    held.release()
    await writing
