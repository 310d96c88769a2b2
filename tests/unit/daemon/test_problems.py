"""Damage and failing requests: told at once, once, on the monitor's events, in the log, and to whoever asks later."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.monitor_world import Monitored
from tests.serving_world import turns

from fleecer.block.edge import Edge
from fleecer.block.node import Problem
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import create_qcow2
from fleecer.daemon.problems import Problems
from fleecer.errors import CorruptImage, IoError
from fleecer.formats.qcow2.header import REFCOUNT_TABLE_FIELD
from fleecer.formats.qcow2.tables import COPIED, OFFSET_MASK
from fleecer.net.nbd_client import NbdClient
from fleecer.storage.file import create_file
from fleecer.testing.memory import FaultyStorage, MemoryNode, MemoryStorage
from fleecer.units import KiB, MiB

SIZE = 1 * MiB
CLUSTER = 64 * KiB


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Monitored]:
    made = Monitored(tmp_path)
    yield made
    await made.close()


def with_clock(world: Monitored) -> Clock:
    clock = Clock()
    world.daemon.problems = Problems(world.daemon, clock)
    return clock


def faulty_disk(world: Monitored, name: str = "disk") -> FaultNode:
    graph = world.daemon.graph
    memory = MemoryNode(f"{name}-memory", SIZE)
    graph.add(memory, named=False)
    fault = FaultNode(name, graph.attach(memory, f"node '{name}'", "file", writable=True))
    graph.add(fault, named=True)
    world.daemon.export(fault, name, writable=True)
    return fault


async def corruptible(path: Path, version: int = 3) -> int:
    """A qcow2 image whose first cluster lies on the refcount block: writing to it would destroy that. Where it is."""
    file = FileNode("new", await create_file(str(path)))
    edge = Edge(file, "test", "file", writable=True, may_grow=True)
    header = await create_qcow2(edge, SIZE, version=version)
    await edge.pwrite(4 * CLUSTER, bytes(CLUSTER))
    data = bytearray(path.read_bytes())
    block = int(struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, REFCOUNT_TABLE_FIELD)[0])[0])
    struct.pack_into(">Q", data, header.l1_table_offset, 4 * CLUSTER | COPIED)
    struct.pack_into(">Q", data, 4 * CLUSTER, block & OFFSET_MASK | COPIED)
    struct.pack_into(">H", data, block + 4 * 2, 1)
    await edge.pwrite(0, bytes(data))
    await file.close()
    return block


async def disk_of(world: Monitored) -> dict[str, Any]:
    (disk,) = await (await world.client()).run("query-disks")
    assert isinstance(disk, dict)
    return disk


async def fails(work: Any) -> IoError:
    with pytest.raises(IoError) as caught:
        await work
    return caught.value


@pytest.mark.parametrize("version", [2, 3])
async def test_an_image_that_a_guests_write_shows_to_be_corrupt_is_told_at_once(
    world: Monitored, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = world.directory / "disk.qcow2"
    block = await corruptible(path, version)
    await world.daemon.serve_image("disk", str(path))
    client = await world.client()
    guest = await world.nbd("disk")
    assert "problem" not in await disk_of(world)
    await fails(guest.pwrite(0, b"over metadata"))
    text = (
        f"image '{path}': data was to be written over metadata at {block}; "
        "repair the image with qemu-img check -r all before writing to it"
    )
    await turns()
    assert client.events("BLOCK_IMAGE_CORRUPTED") == [
        {"device": "disk", "node-name": "disk", "msg": text, "fatal": True, "offset": block, "size": CLUSTER}
    ]
    await fails(guest.pwrite(CLUSTER, b"later"))
    assert len(client.events("BLOCK_IMAGE_CORRUPTED")) == 1
    assert f"node disk is given up: {text}" in [record.getMessage() for record in caplog.records]
    assert (await disk_of(world))["problem"] == text
    (described,) = [node for node in await client.run("query-named-block-nodes") if node["drv"] == "qcow2"]
    specific = described["image"]["format-specific"]
    assert specific["type"] == "qcow2"
    assert specific["data"].get("corrupt", "absent") == (True if version == 3 else "absent")
    await guest.close()
    with pytest.raises(CorruptImage):
        await world.daemon.close()  # what was written may not be in the file


async def test_an_image_that_is_marked_corrupt_and_opened_to_read_says_so_to_who_asks(world: Monitored) -> None:
    path = world.directory / "disk.qcow2"
    await corruptible(path)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\2")
    await world.daemon.serve_image("disk", str(path), read_only=True)
    text = f"image '{path}': it is marked corrupt; repair it with qemu-img check -r all"
    assert (await disk_of(world))["problem"] == text


async def test_the_description_of_a_sound_image_is_that_of_qemu(world: Monitored) -> None:
    path = world.directory / "disk.qcow2"
    await corruptible(path)
    await world.daemon.serve_image("disk", str(path))
    client = await world.client()
    nodes = {node["drv"]: node for node in await client.run("query-named-block-nodes")}
    assert nodes["qcow2"]["image"]["format-specific"]["data"] == {
        "compat": "1.1",
        "compression-type": "zlib",
        "lazy-refcounts": False,
        "refcount-bits": 16,
        "corrupt": False,
        "extended-l2": False,
    }
    assert "format-specific" not in nodes["file"]["image"]


async def test_a_broken_disk_is_told_of_at_once_and_then_once_a_second(
    world: Monitored, caplog: pytest.LogCaptureFixture
) -> None:
    clock = with_clock(world)
    disk = faulty_disk(world)
    client = await world.client()
    guest = await world.nbd("disk")
    disk.fail("read", errno=errno.EIO, times=None)
    disk.fail("write", errno=errno.ENOSPC, times=None)
    await fails(guest.pread(0, 512))
    assert (await disk_of(world))["problem"].startswith("1 read request failed, the last: ")
    await fails(guest.pwrite(0, b"x" * 512))
    for _ in range(49):
        await fails(guest.pread(0, 512))
        await fails(guest.pwrite(0, b"x" * 512))
    await turns()
    events = client.events("BLOCK_IO_ERROR")
    common = {"device": "disk", "node-name": "disk", "action": "report"}
    assert events == [
        common | {"operation": "read", "nospace": False, "reason": events[0]["reason"]},
        common | {"operation": "write", "nospace": True, "reason": events[1]["reason"]},
    ]
    assert events[0]["reason"] == "read of 512 bytes at 0 on 'disk': Input/output error"
    clock.now_s = 1.0
    for _ in range(50):
        await fails(guest.pread(4096, 512))
    await turns()
    assert [event["operation"] for event in client.events("BLOCK_IO_ERROR")] == ["read", "write", "read"]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 3
    assert lines[2].endswith("(49 more failed since the last such line)")
    problem = (await disk_of(world))["problem"]
    assert problem.startswith("100 read requests failed, the last: read of 512 bytes at 4096 on 'disk': ")
    assert "; 50 write requests failed" in problem


async def test_each_disk_is_told_of_for_itself_and_forgotten_with_its_export(world: Monitored) -> None:
    disks = [faulty_disk(world, name) for name in ("one", "two")]
    client = await world.client()
    for disk in disks:
        disk.fail("flush", errno=errno.EIO)
        guest = await world.nbd(disk.name)
        await fails(guest.flush())
        await guest.close()
    await turns()
    told = [(event["device"], event["operation"]) for event in client.events("BLOCK_IO_ERROR")]
    assert told == [("one", "write"), ("two", "write")]
    await world.daemon.remove_export("one", hard=True)
    world.daemon.export(disks[0], "one", writable=True)
    assert [disk.get("problem", "")[:8] for disk in await client.run("query-disks")] == ["1 write ", ""]


async def test_a_clients_own_mistake_is_no_problem_of_the_disk(world: Monitored) -> None:
    disk = faulty_disk(world)
    client = await world.client()
    guest = await world.nbd("disk")
    disk.fail("write zeroes", errno=errno.ENOTSUP)
    await fails(guest.zero(0, 4096, unmap=True))
    await turns()
    assert not client.events("BLOCK_IO_ERROR")
    assert "problem" not in await disk_of(world)


async def test_a_broken_snapshot_is_no_problem_of_the_disk(world: Monitored) -> None:
    faulty_disk(world)
    client = await world.client()
    scratch = world.directory
    taken = await world.daemon.snapshots.create(name="night", scratch_directory=str(scratch))
    reader: NbdClient = await world.nbd("disk@night")
    fleece = taken.parts[0].fleece
    fleece.copier.break_snapshot(fleece.snapshot, "for the test")
    await fails(reader.pread(0, 512))
    await turns()
    assert client.events("SNAPSHOT_BROKEN")
    assert not client.events("BLOCK_IO_ERROR")
    assert "problem" not in await disk_of(world)


async def test_a_scratch_that_was_given_up_is_no_problem_of_the_disk(world: Monitored) -> None:
    faulty_disk(world)
    taken = await world.daemon.snapshots.create(scratch_directory=str(world.directory))
    taken.parts[0].fleece.snapshot.scratch.node.give_up(Problem("for the test"))
    assert "problem" not in await disk_of(world)


async def test_a_disk_whose_flush_failed_is_given_up_and_said_so_but_not_called_corrupt(
    world: Monitored, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FaultyStorage(MemoryStorage(SIZE, name="image"))
    storage.fail("flush", times=None)
    node = FileNode("disk", storage)
    world.daemon.graph.add(node, named=True)
    world.daemon.export(node, "disk", writable=True)
    client = await world.client()
    guest = await world.nbd("disk")
    for _ in range(2):
        await fails(guest.flush())
    await turns()
    text = "flush on 'disk': Input/output error; what was written may be lost: check it, and open the image anew"
    assert (await disk_of(world))["problem"] == text
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count(f"node disk is given up: {text}") == 1
    assert [event["reason"] for event in client.events("BLOCK_IO_ERROR")] == [text]
    assert not client.events("BLOCK_IMAGE_CORRUPTED")
    await guest.close()
    await fails(world.daemon.close())


async def test_a_raw_image_cut_short_while_it_is_served_fails_the_requests_that_miss_it(world: Monitored) -> None:
    path = world.directory / "disk.raw"
    path.write_bytes(os.urandom(SIZE) + b"odd")
    await world.daemon.serve_image("disk", str(path))
    guest = await world.nbd("disk")
    assert bytes(await guest.pread(SIZE - 509, 512))[-3:] == b"odd"
    client = await world.client()
    os.truncate(path, SIZE // 2)
    assert any(await guest.pread(0, SIZE // 2))
    error = await fails(guest.pread(SIZE // 2, 4096))
    assert error.errno == errno.EIO
    await asyncio.gather(fails(guest.pread(SIZE - 512, 512)), fails(guest.block_status(SIZE // 2 - 512, 4096)))
    await turns()
    (event,) = client.events("BLOCK_IO_ERROR")
    assert f"the file ends at byte {SIZE // 2} but had {SIZE + 3} bytes: it was cut short" in event["reason"]
