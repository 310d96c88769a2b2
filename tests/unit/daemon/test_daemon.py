"""The daemon: images in, exports out, snapshots of both, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.serving_world import turns

from fleecer.block.fleecing import Fleece, uncut
from fleecer.block.graph import Graph
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.null import NullNode
from fleecer.daemon import Daemon, Events
from fleecer.daemon.daemon import format_of
from fleecer.errors import CorruptImage, FleecerError, InUse, IoError, NotFound, PermissionConflict, UsageError
from fleecer.export.server import WAY_TURN_BYTES
from fleecer.jobs import BackupRequest
from fleecer.net.nbd_client import ALLOCATION, NbdClient
from fleecer.ranges import Buffer
from fleecer.storage.api import Storage
from fleecer.storage.pool import running_pool
from fleecer.testing.memory import FaultyStorage, MemoryNode, random_turns
from fleecer.testing.streams import memory_streams
from fleecer.units import KiB

SIZE = 512 * KiB + 700


class World(Daemon):
    """A daemon with memory for disks; `told` is every event."""

    def __init__(self, **options: Any) -> None:
        super().__init__(raise_internal_errors=True, **options)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.events.follow(lambda name, data: self.told.append((name, data)))

    def disk(self, name: str, *, seed: int | None = None) -> tuple[MemoryNode, FaultNode]:
        """A disk in memory below a fault node, exported writable under its name."""
        pause = None if seed is None else random_turns(seed)
        memory = MemoryNode(f"{name}-memory", random.Random(name).randbytes(SIZE), pause=pause)
        self.graph.add(memory, named=False)
        fault = FaultNode(name, self.graph.attach(memory, f"node '{name}'", "file", writable=True))
        self.graph.add(fault, named=True)
        self.export(fault, name, writable=True)
        return memory, fault

    async def client(self, name: str, *, contexts: tuple[str, ...] = (ALLOCATION,)) -> NbdClient:
        ours, theirs = memory_streams()
        self.server.serve(theirs)
        return await NbdClient.connect(ours, name, contexts=contexts)


@pytest.fixture
async def daemon() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.close()
    await turns()
    assert not made.graph.nodes()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"tasks were left: {left}"
    await running_pool().close()


# Images.


async def test_an_image_is_served_whole_whatever_its_size_and_written_through(daemon: World, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(SIZE)
    (tmp_path / "disk.raw").write_bytes(content)
    export = await daemon.serve_image("disk", str(tmp_path / "disk.raw"))
    assert export.edge.size == SIZE
    client = await daemon.client("disk")
    assert bytes(await client.pread(0, SIZE)) == content
    await client.pwrite(SIZE - 3, b"end")
    await client.close()
    await daemon.remove_export("disk")
    assert daemon.told[-1] == ("BLOCK_EXPORT_DELETED", {"id": "disk"})
    await daemon.graph.remove("disk")
    assert (tmp_path / "disk.raw").read_bytes() == content[:-3] + b"end"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.raw", "raw"), ("a.img", "raw"), ("a.QCOW2", "qcow2"), ("x.raw.qcow2", "qcow2")]
)
def test_the_ending_tells_the_format(name: str, kind: str) -> None:
    assert format_of(name) == kind


async def test_what_cannot_be_served_is_refused_in_words_and_nothing_is_left(daemon: World, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    (tmp_path / "disk.qcow2").write_bytes(bytes(512))
    (tmp_path / "disk.raw").write_bytes(bytes(512))

    async def refused(name: str, path: str, kind: type[FleecerError], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            await daemon.serve_image(name, str(tmp_path / path), **options)
        assert not daemon.graph.nodes()
        assert not daemon.server.exports()
        return str(caught.value)

    assert await refused("disk", "disk", UsageError) == (
        f"image '{tmp_path}/disk': format not given, and its ending tells none; refusing to guess, because a guest can "
        "forge a header. Use --format raw or --format qcow2"
    )
    assert await refused("disk", "disk.qcow2", CorruptImage) == (
        f"image '{tmp_path}/disk.qcow2': magic number 0x00000000 is not that of qcow2, 0x514649fb"
    )
    assert await refused("disk", "absent.raw", IoError) == f"image '{tmp_path}/absent.raw' does not exist"
    assert "no NBD string" in await refused("d" * 5000, "disk.raw", UsageError)
    await daemon.serve_image("disk", str(tmp_path / "disk.raw"))  # its lock was given back each time
    with pytest.raises(UsageError, match="is taken"):
        await daemon.serve_image("disk", str(tmp_path / "disk"), format="raw")
    with pytest.raises(PermissionConflict, match="is open in this daemon already"):
        await daemon.serve_image("again", str(tmp_path / "disk.raw"))


async def test_a_disk_served_read_only_refuses_writers_and_leaves_the_image_to_readers(
    daemon: World, tmp_path: Path
) -> None:
    (tmp_path / "disk.raw").write_bytes(b"r" * 4096)
    await daemon.serve_image("disk", str(tmp_path / "disk.raw"), read_only=True)
    client = await daemon.client("disk")
    assert client.info.read_only
    taken = await daemon.snapshots.create(name="s")
    assert bytes(await (await daemon.client("disk@s")).pread(0, 4096)) == b"r" * 4096
    assert taken.parts[0].bytes_preserved == 0
    await daemon.snapshots.delete("s")
    assert bytes(await client.pread(0, 4)) == b"rrrr"
    await client.close()
    async with World() as other:
        await other.serve_image("disk", str(tmp_path / "disk.raw"), read_only=True)


async def test_leaving_the_context_closes_it_and_flushes(tmp_path: Path) -> None:
    async with World() as made:
        _, fault = made.disk("disk")
        flushes = fault.fail("flush", after=0)
        client = await made.client("disk")
        await client.pwrite(0, b"x")
        with pytest.raises(IoError, match="flush"):
            await made.close()
        assert flushes.hits == 1
        assert not made.graph.nodes()
        with pytest.raises(IoError):
            await client.pread(0, 1)


async def test_closing_ends_jobs_snapshots_and_clients_with_requests_in_flight(daemon: World) -> None:
    memory, fault = daemon.disk("disk")
    await daemon.snapshots.create(name="s", scratch_directory="/dev/shm")
    client, past = await daemon.client("disk"), await daemon.client("disk@s")
    held = fault.hold("write", 0, 512)
    writing = asyncio.ensure_future(client.pwrite(0, b"last" * 128))
    await held.reached()
    closing = asyncio.ensure_future(daemon.close())
    await turns()
    assert not closing.done()
    held.release()
    await closing
    await writing
    assert memory.data[:4] == b"last"
    with pytest.raises(IoError):
        await past.pread(0, 1)


# Exports.


async def test_a_protected_node_is_exported_through_its_filter(daemon: World) -> None:
    memory, fault = daemon.disk("disk")
    await daemon.snapshots.create(name="s", scratch_directory="/dev/shm")
    second = daemon.export(fault, "second", writable=True)
    client = await daemon.client("second")
    before = bytes(memory.data)
    await client.pwrite(0, bytes(SIZE))
    past = await daemon.client("disk@s")
    assert bytes(await past.pread(0, SIZE)) == before
    assert second.edge.node is not fault
    await client.close()
    await past.close()


async def test_an_export_that_cannot_be_leaves_no_edge(daemon: World) -> None:
    _, fault = daemon.disk("disk")
    before = daemon.graph.parents(fault)
    for name in ("disk", "d" * 5000):
        with pytest.raises(UsageError):
            daemon.export(fault, name)
    assert daemon.graph.parents(fault) == before


async def test_removing_an_export_flushes_it_and_is_announced_even_if_that_fails(daemon: World) -> None:
    _, fault = daemon.disk("disk")
    fault.fail("flush", errno=errno.ENOSPC)
    with pytest.raises(IoError, match="No space left"):
        await daemon.remove_export("disk")
    assert daemon.told == [("BLOCK_EXPORT_DELETED", {"id": "disk"})]
    assert not daemon.graph.parents(fault)
    with pytest.raises(NotFound):
        await daemon.remove_export("disk")


async def test_an_export_may_be_removed_while_its_disk_is_being_cut(daemon: World) -> None:
    _, fault = daemon.disk("disk")
    daemon.export(fault, "second", writable=True)
    client = await daemon.client("second")
    held = fault.hold("write")
    writing = asyncio.ensure_future(client.pwrite(0, b"x"))
    await held.reached()
    cutting = asyncio.ensure_future(daemon.snapshots.create(["disk"], name="s", scratch_directory="/dev/shm"))
    while daemon.server.export("disk").edge._gate is None:  # the cut waits for the write
        await asyncio.sleep(0)
    removing = asyncio.ensure_future(daemon.remove_export("disk"))
    await turns()
    held.release()
    await writing
    await cutting
    await removing
    await client.pwrite(0, b"y")
    await client.close()


# Snapshots.


@pytest.mark.parametrize("seed", range(6))
async def test_snapshots_over_two_disks_are_of_one_instant_under_load(daemon: World, seed: int) -> None:
    disks = {name: daemon.disk(name, seed=seed)[0] for name in ("one", "two")}
    clients = {name: await daemon.client(name) for name in disks}
    stop = False

    async def count() -> None:
        """What it writes to the second disk it has written to the first before."""
        number = 0
        while not stop:
            number += 1
            for name in ("one", "two"):
                await clients[name].pwrite(0, number.to_bytes(8, "big"))

    for client in clients.values():
        await client.pwrite(0, bytes(8))
    counting = asyncio.ensure_future(count())
    for at in range(4):
        await turns(seed * 7 + at * 13)
        await daemon.snapshots.create(name=f"s{at}", scratch_directory="/dev/shm")
    await turns(200)
    stop = True
    await counting
    for at in range(4):
        numbers = []
        for name in disks:
            past = await daemon.client(f"{name}@s{at}")
            numbers.append(int.from_bytes(await past.pread(0, 8), "big"))
            await past.close()
        assert numbers[0] - 1 <= numbers[1] <= numbers[0], f"the disks are of two instants: {numbers}"
    for client in clients.values():
        await client.close()


async def test_one_disk_under_two_names_is_cut_once(daemon: World) -> None:
    memory, fault = daemon.disk("disk")
    daemon.export(fault, "alias", writable=True)
    before = bytes(memory.data)
    taken = await daemon.snapshots.create(name="s", scratch_directory="/dev/shm")
    filters = {part.fleece.filter for part in taken.parts}
    assert len(filters) == 1
    client = await daemon.client("alias")
    await client.pwrite(0, bytes(SIZE))
    for name in ("disk", "alias"):
        past = await daemon.client(f"{name}@s")
        assert bytes(await past.pread(0, SIZE)) == before
        await past.close()
    await client.close()
    await daemon.snapshots.delete("s")
    assert daemon.server.export("disk").edge.node is fault


async def test_snapshots_share_one_copy_and_are_deleted_in_any_order(daemon: World) -> None:
    memory, _ = daemon.disk("disk")
    client = await daemon.client("disk")
    images: dict[str, bytes] = {}
    for at in range(4):
        name = f"s{at}"
        await daemon.snapshots.create(name=name, scratch_directory="/dev/shm")
        images[name] = bytes(memory.data)
        await client.pwrite(at * 100_000, os.urandom(150_000))
    order = random.Random(3).sample(sorted(images), 4)
    for name in order:
        for other in images:
            past = await daemon.client(f"disk@{other}")
            assert bytes(await past.pread(0, SIZE)) == images[other]
            await past.close()
        await daemon.snapshots.delete(name)
        del images[name]
        await client.pwrite(random.Random(name).randrange(SIZE - 5000), os.urandom(5000))
    await client.close()


async def test_what_fails_half_way_through_a_snapshot_is_undone(daemon: World) -> None:
    _, first = daemon.disk("one")
    _, second = daemon.disk("two")
    daemon.export(first, "two@s", export_id="other")  # the name that the second part would get
    nodes = daemon.graph.nodes()
    with pytest.raises(UsageError, match=r"^export name 'two@s' is taken; choose another$"):
        await daemon.snapshots.create(["one", "two"], name="s", scratch_directory="/dev/shm")
    assert daemon.graph.nodes() == nodes
    assert daemon.server.export("one").edge.node is first
    assert daemon.server.export("two").edge.node is second
    assert not daemon.snapshots.sets()
    assert [export.name for export in daemon.server.exports()] == ["one", "two", "two@s"]


async def test_a_disk_that_does_not_come_to_rest_is_not_cut_and_goes_on(daemon: World) -> None:
    _, fault = daemon.disk("disk")
    client = await daemon.client("disk")
    held = fault.hold("write")
    writing = asyncio.ensure_future(client.pwrite(0, b"x"))
    await held.reached()
    nodes = daemon.graph.nodes()
    with pytest.raises(IoError, match=r"1 requests of export 'disk' \(nbd\) did not end in 0\.01 s"):
        await daemon.snapshots.create(scratch_directory="/dev/shm", drain_timeout_s=0.01)
    assert daemon.graph.nodes() == nodes
    assert bytes(await client.pread(512, 1))
    held.release()
    await writing
    await client.close()


async def test_a_scratch_needs_a_place(daemon: World, tmp_path: Path) -> None:
    null = NullNode("null", 4096)
    daemon.graph.add(null, named=True)
    daemon.export(null, "disk")
    with pytest.raises(UsageError, match="is no local image file, so name a place for its scratch: --scratch-dir"):
        await daemon.snapshots.create()
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    await daemon.serve_image("local", str(tmp_path / "disk.raw"))
    await daemon.snapshots.create(["local"])
    assert os.listdir(tmp_path) == ["disk.raw"], "the scratch has a name"


@pytest.mark.parametrize("what", ["a snapshot", "a backup"])
async def test_guests_who_ask_for_much_make_way_for_a_cut(daemon: World, tmp_path: Path, what: str) -> None:
    _, disk = daemon.disk("a")
    assert daemon.server.turn_bytes > WAY_TURN_BYTES
    if what == "a snapshot":
        await daemon.snapshots.create(["a"], scratch_directory=str(tmp_path))
    else:
        target = MemoryNode("target", bytes(SIZE))
        daemon.graph.add(target, named=True)
        await daemon.start_backups([BackupRequest("job", disk, target, "none")])
    assert daemon.server.turn_bytes == WAY_TURN_BYTES


async def test_where_no_scratch_can_be_made_another_place_is_asked_for(
    daemon: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: str, sizes: Sequence[int]) -> asyncio.Future[list[Storage]]:
        refused: asyncio.Future[list[Storage]] = asyncio.get_running_loop().create_future()
        refused.set_exception(IoError(errno.EROFS, directory, "create a scratch file"))
        return refused

    monkeypatch.setattr("fleecer.daemon.scratches.open_unlinked", refuse)
    daemon.disk("a")
    with pytest.raises(IoError, match=r"Read-only file system; choose another place with --scratch-dir") as caught:
        await daemon.snapshots.create(["a"], scratch_directory=str(tmp_path))
    assert caught.value.errno == errno.EROFS
    assert daemon.snapshots.sets() == []


async def test_names_of_snapshots_are_made_where_none_is_given(daemon: World) -> None:
    daemon.disk("disk")
    made = [await daemon.snapshots.create(scratch_directory="/dev/shm") for _ in range(3)]
    assert len({taken.name for taken in made}) == 3
    assert made[0].created <= made[1].created
    assert daemon.snapshots.sets() == made


async def test_deleting_a_snapshot_waits_for_its_readers_requests_in_flight(daemon: World) -> None:
    memory, fault = daemon.disk("disk")
    await daemon.snapshots.create(name="s", scratch_directory="/dev/shm")
    past = await daemon.client("disk@s")
    held = fault.hold("read")
    reading = asyncio.ensure_future(past.pread(0, 512))
    await held.reached()
    deleting = asyncio.ensure_future(daemon.snapshots.delete("s"))
    await turns()
    assert not deleting.done()
    with pytest.raises(NotFound, match="snapshot 's' does not exist"):
        daemon.snapshots.find("s")
    held.release()
    assert bytes(await reading) == memory.data[:512]
    await deleting
    assert daemon.told[-1] == ("SNAPSHOT_DELETED", {"name": "s"})


async def test_a_disk_may_leave_before_its_snapshot(daemon: World) -> None:
    memory, _ = daemon.disk("disk")
    before = bytes(memory.data)
    await daemon.snapshots.create(name="s", scratch_directory="/dev/shm")
    await daemon.remove_export("disk")
    with pytest.raises(InUse):
        await daemon.graph.remove("disk")
    past = await daemon.client("disk@s")
    assert bytes(await past.pread(0, SIZE)) == before
    await past.close()
    await daemon.snapshots.delete("s")
    await daemon.graph.remove("disk")


class SlowStorage(FaultyStorage):
    """Its writes wait until `go` is set; `busy` tells that one does."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.go, self.busy = asyncio.Event(), asyncio.Event()

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.busy.set()
        await self.go.wait()
        await super().pwrite(offset, data)


async def test_closing_waits_for_the_scratch_of_a_snapshot_that_broke(daemon: World) -> None:
    daemon.disk("disk")
    taken = await daemon.snapshots.create(name="s", scratch_directory="/dev/shm", copy_timeout_s=0.01)
    scratch = taken.parts[0].fleece.snapshot.scratch.node
    assert isinstance(scratch, FileNode)
    scratch.storage = slow = SlowStorage(scratch.storage)
    client = await daemon.client("disk")
    await client.pwrite(0, b"x")  # given up: the snapshot breaks, the copy is still under way
    assert slow.busy.is_set()
    assert "took longer than 0.01 s" in taken.parts[0].cause
    closing = asyncio.ensure_future(daemon.close())
    await turns()
    assert not closing.done()
    slow.go.set()
    await closing
    assert not daemon.snapshots._kept


async def test_a_snapshot_that_is_being_made_ends_with_all_others(daemon: World) -> None:
    _, fault = daemon.disk("disk")
    await daemon.snapshots.create(name="first", scratch_directory="/dev/shm")
    held = fault.hold("write")
    late = asyncio.ensure_future(daemon.server.export("disk").edge.pwrite(0, b"x"))
    await held.reached()
    making = asyncio.ensure_future(daemon.snapshots.create(name="second", scratch_directory="/dev/shm"))
    deleting = asyncio.ensure_future(daemon.snapshots.delete("first"))
    await turns()
    ending = asyncio.ensure_future(daemon.snapshots.delete_all())
    await turns()
    assert not ending.done()
    held.release()
    await late
    await making
    await deleting
    await ending
    assert not daemon.snapshots.sets()
    assert daemon.server.export("disk").edge.node is fault


async def test_a_snapshot_that_cannot_be_ended_keeps_no_other_from_its_end(
    daemon: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.disk("disk")
    for name in ("first", "second"):
        await daemon.snapshots.create(name=name, scratch_directory="/dev/shm")
    failures = [IoError(errno.ETIMEDOUT, "disk", "drain")]

    async def fail_once(graph: Graph, fleece: Fleece, *, leave_timeout_s: float) -> None:
        await uncut(graph, fleece, leave_timeout_s=leave_timeout_s)
        if failures:
            raise failures.pop()

    monkeypatch.setattr("fleecer.daemon.snapshots.uncut", fail_once)
    with pytest.raises(IoError, match=r"^drain on 'disk': Connection timed out$"):
        await daemon.snapshots.delete_all()
    assert not daemon.snapshots.sets()


# Events.


def test_events_are_told_to_those_who_follow_until_they_leave() -> None:
    events, heard = Events(), list[str]()
    leave = events.follow(lambda name, data: heard.append(name))
    events.announce("ONE", {})
    leave()
    leave()
    events.announce("TWO", {})
    assert heard == ["ONE"]
