"""The QMP commands, as a client that was made for QEMU gives them, with NBD clients reading and writing meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.monitor_world import Monitored, QmpClient
from tests.serving_world import turns

from fleecer.block.edge import Edge
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import create_qcow2
from fleecer.errors import IoError
from fleecer.net.nbd_client import NbdClient
from fleecer.net.stream import connect_tcp, connect_unix
from fleecer.storage.file import create_file
from fleecer.testing.memory import FaultyStorage
from fleecer.units import KiB, MiB

SIZE = 1 * MiB
BACKUP_STATES = ["created", "running"]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Monitored]:
    made = Monitored(tmp_path)
    yield made
    await made.close()


async def qcow2(path: Path, size: int = SIZE) -> str:
    """A new image; its path."""
    node = FileNode("new", await create_file(str(path)))
    await create_qcow2(Edge(node, "test", "file", writable=True, may_grow=True), size)
    await node.close()
    return str(path)


async def serve(world: Monitored, client: QmpClient, *disks: str) -> str:
    """Opens qcow2 disks, exports them writable and starts the server; where it listens."""
    socket = str(world.directory / "nbd.sock")
    await client.run("nbd-server-start", addr={"type": "unix", "data": {"path": socket}}, max_connections=100)
    for disk in disks:
        path = await qcow2(world.directory / f"{disk}.qcow2")
        await client.run(
            "blockdev-add",
            driver="qcow2",
            node_name=disk,
            discard="unmap",
            file={"driver": "file", "filename": path},
        )
        await client.run("block-export-add", type="nbd", id=f"guest-{disk}", node_name=disk, name=disk, writable=True)
    return socket


async def test_the_first_fleecing_scheme_over_two_disks_as_qemus_clients_drive_it(world: Monitored) -> None:
    client = await world.client()
    socket = await serve(world, client, "disk0", "disk1")
    guests = [await NbdClient.connect(await connect_unix(socket), f"disk{at}") for at in range(2)]
    old = [random.Random(at).randbytes(SIZE) for at in range(2)]
    for guest, content in zip(guests, old, strict=True):
        await guest.pwrite(0, content)
    for at in range(2):
        path = await qcow2(world.directory / f"scratch{at}.qcow2")
        file = {"driver": "file", "filename": path}
        await client.run("blockdev-add", driver="qcow2", node_name=f"scratch{at}", file=file, backing=f"disk{at}")
    actions = [
        {
            "type": "blockdev-backup",
            "data": {
                "job-id": f"fleece{at}",
                "device": f"disk{at}",
                "target": f"scratch{at}",
                "sync": "none",
                "auto-dismiss": False,
                "filter-node-name": f"cbw{at}",
            },
        }
        for at in range(2)
    ]
    assert await client.run("transaction", actions=actions) == {}
    assert client.statuses("fleece0") == client.statuses("fleece1") == BACKUP_STATES
    for at in range(2):
        arguments: dict[str, Any] = {"type": "nbd", "id": f"exp{at}", "node-name": f"scratch{at}", "name": f"vd{at}"}
        await client.run("block-export-add", **arguments, writable=False)
    exports = {export["id"]: export for export in await client.run("query-block-exports")}
    assert exports["guest-disk0"] == {
        "id": "guest-disk0",
        "type": "nbd",
        "node-name": "cbw0",
        "shutting-down": False,
    }
    assert exports["exp1"]["node-name"] == "scratch1"
    readers = [await NbdClient.connect(await connect_unix(socket), f"vd{at}") for at in range(2)]
    assert all(reader.info.read_only for reader in readers)

    async def overwrite(guest: NbdClient) -> None:
        for _ in range(3):
            for offset in range(0, SIZE, 128 * KiB):
                await guest.pwrite(offset, os.urandom(128 * KiB))

    async def read(reader: NbdClient, content: bytes, seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(60):
            offset = generator.randrange(SIZE - 9000)
            length = generator.randint(1, 9000)
            assert bytes(await reader.pread(offset, length)) == content[offset : offset + length]
            for run, flags in (await reader.block_status(offset, length))["base:allocation"]:
                assert not flags & 2 or not any(content[offset : offset + run])

    await asyncio.gather(
        *(overwrite(guest) for guest in guests),
        *(read(reader, content, seed) for reader, content in zip(readers, old, strict=True) for seed in range(3)),
    )
    for reader, content in zip(readers, old, strict=True):
        assert bytes(await reader.pread(0, SIZE)) == content
    jobs = await client.run("query-jobs")
    assert [(job["id"], job["type"], job["status"]) for job in jobs] == [
        ("fleece0", "backup", "running"),
        ("fleece1", "backup", "running"),
    ]
    told = await client.fail("blockdev-del", node_name="scratch0")
    assert told.startswith("node 'scratch0' is in use by job 'fleece0' (target)")
    assert "clients" in await client.fail("block-export-del", id="exp0")
    assert await client.run("block-export-del", id="exp0", mode="hard") == {}
    assert client.events("BLOCK_EXPORT_DELETED") == [{"id": "exp0"}]
    assert await client.run("job-cancel", id="fleece0") == {}
    assert client.statuses("fleece0") == [*BACKUP_STATES, "aborting", "concluded"]
    (ended,) = client.events("BLOCK_JOB_CANCELLED")
    assert ended == {"device": "fleece0", "type": "backup", "len": SIZE, "offset": 0, "speed": 0}
    with pytest.raises(IoError):
        await readers[0].pread(0, 512)
    await client.run("job-cancel", id="fleece1")
    with pytest.raises(IoError, match="fleecing job 'fleece1' has ended"):
        await readers[1].pread(0, 512)
    assert [job["status"] for job in await client.run("query-jobs")] == ["concluded", "concluded"]
    for at in range(2):
        await client.run("job-dismiss", id=f"fleece{at}")
    assert client.statuses("fleece1")[-1] == "null"
    assert await client.run("query-jobs") == []
    await readers[1].close()
    await client.run("block-export-del", id="exp1", mode="hard")
    for at in range(2):
        await client.run("blockdev-del", node_name=f"scratch{at}")
    names = {node["node-name"] for node in await client.run("query-named-block-nodes")}
    assert {"disk0", "disk1"} < names
    assert not {"cbw0", "cbw1", "scratch0", "scratch1"} & names
    assert bytes(await guests[0].pread(0, 512)) != old[0][:512]
    for guest in guests:
        await guest.close()
    await readers[0].close()


async def test_a_transaction_starts_all_or_nothing(world: Monitored) -> None:
    client = await world.client()
    await serve(world, client, "disk0")
    for name, size in (("b0", SIZE), ("b1", SIZE // 2)):
        path = await qcow2(world.directory / f"{name}.qcow2", size)
        await client.run("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": path})

    def backup(target: str, **more: str) -> dict[str, Any]:
        data = {"device": "disk0", "target": target, "sync": "none", "job-id": target} | more
        return {"type": "blockdev-backup", "data": data}

    told = await client.fail("transaction", actions=[backup("b0"), backup("b1")])
    assert told == "target 'b1' has 524288 bytes, the disk 'disk0' has 1048576; they must be equal"
    told = await client.fail("transaction", actions=[backup("b0"), backup("nowhere")])
    assert told == "node 'nowhere' does not exist"
    told = await client.fail("transaction", actions=[backup("b0", sync="top")])
    assert told.startswith("transaction: actions[0].data.sync is 'top'; it must be one of full, none")
    told = await client.fail("transaction", actions=[{"type": "abort", "data": {}}])
    assert told.startswith("transaction: actions[0].type 'abort' is not known; known are ")
    assert await client.run("query-jobs") == []
    assert not client.events("JOB_STATUS_CHANGE")
    await client.run("blockdev-del", node_name="b0")


async def test_a_full_backup_runs_to_its_end_by_itself(world: Monitored) -> None:
    client = await world.client()
    await serve(world, client, "disk0")
    guest = await world.nbd("disk0")
    content = random.Random(5).randbytes(SIZE)
    await guest.pwrite(0, content)
    path = await qcow2(world.directory / "full.qcow2")
    await client.run("blockdev-add", driver="qcow2", node_name="full", file={"driver": "file", "filename": path})
    await client.run("blockdev-backup", device="disk0", target="full", sync="full", job_id="copy")
    await guest.pwrite(0, bytes(SIZE))
    await client.until(lambda: client.statuses("copy")[-1:] == ["null"])
    assert client.statuses("copy") == [*BACKUP_STATES, "waiting", "pending", "concluded", "null"]
    assert client.events("BLOCK_JOB_COMPLETED")[0]["offset"] == SIZE
    await client.run("block-export-add", type="nbd", id="full", node_name="full")
    reader = await world.nbd("full")
    assert bytes(await reader.pread(0, SIZE)) == content
    await reader.close()
    await guest.close()
    assert await client.fail("job-cancel", id="copy") == "job 'copy' does not exist"
    answer = await client.ask("job-dismiss", id="copy")
    assert answer["error"]["class"] == "DeviceNotFound"


async def test_exports_need_a_server_and_a_free_name(world: Monitored) -> None:
    client = await world.client()
    await client.run("blockdev-add", driver="null-co", node_name="null", size=SIZE)
    export = {"type": "nbd", "id": "e", "node-name": "null"}
    assert await client.fail("block-export-add", **export) == "NBD server not running; use nbd-server-start first"
    assert await client.fail("nbd-server-stop") == "NBD server not running"
    port = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    await client.run("nbd-server-start", addr=port)
    (address,) = await client.run("query-nbd-server")
    assert address["type"] == "inet"
    await client.run("block-export-add", **export)
    assert "is taken" in await client.fail("block-export-add", **export)
    assert "writethrough is not supported" in await client.fail("block-export-add", **export, writethrough=True)
    reader = await NbdClient.connect(await connect_tcp("127.0.0.1", int(address["port"])), "null")
    assert not any(await reader.pread(0, 512))
    await client.run("nbd-server-stop")
    await client.until(lambda: client.events("BLOCK_EXPORT_DELETED") == [{"id": "e"}])
    with pytest.raises(IoError):
        await reader.pread(0, 512)
    await reader.close()
    assert await client.run("query-block-exports") == []
    await client.run("blockdev-del", node_name="null")
    told = await client.fail("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "x"}})
    assert told == "port 'x' is not a number up to 65535"
    told = await client.fail("nbd-server-start", addr={"type": "unix", "path": "/x"})
    assert told == "nbd-server-start: option 'path' in addr is not known; known are data"


async def test_nodes_are_described_with_their_files_and_backing(world: Monitored) -> None:
    client = await world.client()
    base = await qcow2(world.directory / "base.qcow2")
    file = {"driver": "file", "filename": base}
    await client.run("blockdev-add", driver="qcow2", node_name="base", file=file, read_only=True)
    top = await qcow2(world.directory / "top.qcow2")
    file = {"driver": "file", "filename": top, "node-name": "top-file"}
    await client.run("blockdev-add", driver="qcow2", node_name="top", file=file, backing="base")
    nodes = {node["node-name"]: node for node in await client.run("query-named-block-nodes", flat=True)}
    assert nodes["top"]["drv"] == "qcow2"
    assert nodes["top"]["ro"] is False
    assert nodes["top"]["backing_file_depth"] == 1
    assert nodes["top"]["backing-node-name"] == "base"
    assert nodes["top"]["file"] == top
    assert nodes["top"]["image"]["virtual-size"] == SIZE
    assert nodes["base"]["ro"] is True
    assert nodes["top-file"]["drv"] == "file"
    assert (await client.ask("blockdev-del", node_name="nope"))["error"]["class"] == "DeviceNotFound"
    assert "in use by node 'top' (backing)" in await client.fail("blockdev-del", node_name="base")
    await client.run("blockdev-del", node_name="top")
    await client.run("blockdev-del", node_name="base")
    assert await client.run("query-named-block-nodes") == []


# Snapshots.


async def test_snapshots_are_made_listed_and_deleted(world: Monitored) -> None:
    client = await world.client()
    await serve(world, client, "disk0", "disk1")
    guest = await world.nbd("disk0")
    await guest.pwrite(0, b"old" * 100)
    made = await client.run("snapshot-create", name="s1")
    assert made["name"] == "s1"
    assert [(disk["name"], disk["export"], disk["size"]) for disk in made["disks"]] == [
        ("disk0", "disk0@s1", SIZE),
        ("disk1", "disk1@s1", SIZE),
    ]
    await guest.pwrite(0, b"new" * 100)
    past = await world.nbd("disk0@s1", contexts=("base:allocation", "fleecer:preserved"))
    assert bytes(await past.pread(0, 300)) == b"old" * 100
    status = await past.block_status(0, 256 * KiB)
    assert status["fleecer:preserved"] == [(4 * KiB, 1), (252 * KiB, 0)]
    (listed,) = await client.run("query-snapshots")
    assert listed["created"] == made["created"]
    assert [disk["bytes-preserved"] for disk in listed["disks"]] == [4 * KiB, 0]
    assert [disk["state"] for disk in listed["disks"]] == ["active", "active"]
    told = await client.fail("block-export-del", id="disk0@s1", mode="hard")
    assert told == "export 'disk0@s1' belongs to a snapshot and goes with it; delete the snapshot"
    disks = await client.run("query-disks")
    assert [disk["name"] for disk in disks] == ["disk0", "disk1"]
    assert disks[0]["format"] == "qcow2"
    assert disks[0]["clients"] == 1
    assert disks[0]["bytes-written"] == 600
    await client.run("snapshot-delete", name="s1")
    assert client.events("SNAPSHOT_DELETED") == [{"name": "s1"}]
    assert await client.run("query-snapshots") == []
    with pytest.raises(IoError):
        await past.pread(0, 1)
    await past.close()
    assert bytes(await guest.pread(0, 300)) == b"new" * 100
    await guest.close()
    names = {node["drv"] for node in await client.run("query-named-block-nodes")}
    assert names == {"file", "qcow2"}


async def test_snapshots_are_refused_in_words_and_leave_nothing(world: Monitored) -> None:
    client = await world.client()
    assert await client.fail("snapshot-create") == "no disk is served, so there is nothing to take a snapshot of"
    await serve(world, client, "disk0")
    nodes = await client.run("query-named-block-nodes")
    assert await client.fail("snapshot-create", disks=["disk0", "nope"]) == "disk 'nope' does not exist"
    assert "must be up to 128 letters" in await client.fail("snapshot-create", name="a/b")
    told = await client.fail("snapshot-create", scratch_dir=str(world.directory / "absent"))
    assert told == f"create a scratch file on '{world.directory}/absent': No such file or directory"
    assert (await client.fail("snapshot-create", cluster_size=1000)).startswith("cluster size 1000 is no power of two")
    await client.run("block-export-add", type="nbd", id="other", node_name="disk0", name="disk0@taken")
    told = await client.fail("snapshot-create", disks=["disk0"], name="taken")
    assert told == "export name 'disk0@taken' is taken; choose another"
    assert await client.run("query-named-block-nodes") == nodes
    assert await client.run("query-snapshots") == []
    await client.run("snapshot-create", disks=["disk0"], name="s1")
    told = await client.fail("snapshot-create", disks=["disk0"], name="s1")
    assert told == "snapshot name 's1' is taken; delete that one or choose another"
    assert await client.fail("snapshot-delete", name="s2") == "snapshot 's2' does not exist"


async def test_a_temporary_snapshot_goes_with_its_session_and_others_stay(world: Monitored) -> None:
    keeper, passing = await world.client(), await world.client()
    await serve(world, keeper, "disk0")
    await keeper.run("snapshot-create", name="kept")
    await passing.run("snapshot-create", name="brief", temporary=True)
    await passing.run("snapshot-create", name="brief2", temporary=True)
    await passing.run("snapshot-delete", name="brief2")
    passing.stream.abort()
    await keeper.until(lambda: {"name": "brief"} in keeper.events("SNAPSHOT_DELETED"))
    assert [snapshot["name"] for snapshot in await keeper.run("query-snapshots")] == ["kept"]


async def test_a_broken_snapshot_is_announced_and_keeps_its_cause(world: Monitored) -> None:
    client = await world.client()
    await serve(world, client, "disk0")
    guest = await world.nbd("disk0")
    await guest.pwrite(0, b"old" * 100)
    await client.run("snapshot-create", name="s1")
    past = await world.nbd("disk0@s1")
    (part,) = world.daemon.snapshots.find("s1").parts
    scratch = part.fleece.snapshot.scratch.node
    assert isinstance(scratch, FileNode)
    full = FaultyStorage(scratch.storage)
    full.fail("write", errno=errno.ENOSPC)
    scratch.storage = full
    await guest.pwrite(0, b"new" * 100)
    (event,) = client.events("SNAPSHOT_BROKEN") or [await _event(client, "SNAPSHOT_BROKEN")]
    assert event["name"] == "s1"
    assert event["disk"] == "disk0"
    assert "No space left on device" in event["cause"]
    with pytest.raises(
        IoError, match=r"is broken: copying its old data failed: .*No space left on device; free space there, or"
    ):
        await past.pread(0, 300)
    (listed,) = await client.run("query-snapshots")
    assert listed["disks"][0]["state"] == "broken"
    assert listed["disks"][0]["cause"] == event["cause"]
    await turns()
    assert scratch not in world.daemon.graph.nodes(), "a broken snapshot gives its scratch back"
    await client.run("snapshot-delete", name="s1")
    assert bytes(await guest.pread(0, 300)) == b"new" * 100
    await past.close()
    await guest.close()


async def _event(client: QmpClient, name: str) -> dict[str, Any]:
    await client.until(lambda: bool(client.events(name)))
    return client.events(name)[0]


async def test_a_temporary_snapshot_that_is_kept_outlives_its_client(world: Monitored) -> None:
    client, other = await world.client(), await world.client()
    await serve(world, client, "disk0")
    for name in ("kept", "goes"):
        await client.run("snapshot-create", name=name, temporary=True)
    told = await other.fail("snapshot-keep", name="kept")
    assert told == "snapshot 'kept' is no temporary one of this connection, so there is nothing to keep"
    assert await client.fail("snapshot-keep", name="nothing") == "snapshot 'nothing' does not exist"
    assert await client.run("snapshot-keep", name="kept") == {}
    client.stream.abort()
    while len(snapshots := await other.run("query-snapshots")) > 1:
        pass
    assert [taken["name"] for taken in snapshots] == ["kept"]
