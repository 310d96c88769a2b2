"""Our NBD server with other people's clients: nbdinfo, nbdcopy, qemu-img, qemu-io and fio, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fleecer.block.edge import Edge
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import create_qcow2
from fleecer.block.options import parse_options
from fleecer.daemon import Daemon
from fleecer.export import Export
from fleecer.jobs import BackupRequest, start_backups
from fleecer.net.nbd_client import NbdClient
from fleecer.net.stream import connect_unix
from fleecer.net.uri import tcp_uri, unix_uri
from fleecer.storage.file import create_file
from fleecer.storage.pool import running_pool
from fleecer.testing.memory import MemoryNode
from fleecer.units import KiB, MiB

pytestmark = pytest.mark.peer

SIZE = 8 * MiB


class World:
    """A daemon that serves a raw and a qcow2 disk at a unix socket and over TCP."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemon = Daemon(raise_internal_errors=True)
        self.socket = str(directory / "nbd")
        self.internal_errors: list[Any] = []

    async def start(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.internal_errors.append(context))
        with (self.directory / "raw.raw").open("wb") as file:
            file.truncate(SIZE)
        await new_qcow2(self.directory / "qcow2.qcow2")
        for kind in ("raw", "qcow2"):
            await self.daemon.serve_image(kind, str(self.directory / f"{kind}.{kind}"))
        self.daemon.server.listen_unix(self.socket)
        self.tcp = self.daemon.server.listen_tcp("127.0.0.1", 0)

    def uri(self, name: str) -> str:
        return unix_uri(self.socket, name)

    async def connect(self, name: str) -> NbdClient:
        return await NbdClient.connect(await connect_unix(self.socket), name)

    async def close(self) -> None:
        await self.daemon.close()
        await running_pool().close()
        assert not self.internal_errors, self.internal_errors


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    await made.start()
    yield made
    await made.close()


async def new_qcow2(path: Path) -> None:
    node = FileNode("new", await create_file(str(path)))
    await create_qcow2(Edge(node, "test", "file", writable=True, may_grow=True), SIZE)
    await node.close()


async def run(*command: str | Path, status: int = 0) -> str:
    """What a program prints; it must end with `status`."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, told = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == status, f"{command}: {told.decode()}{out.decode()}"
    return (out + told).decode() if status else out.decode()


def sparse(seed: int) -> bytes:
    """An image of runs of data and of zeroes."""
    generator = random.Random(seed)
    content = bytearray(SIZE)
    for _ in range(20):
        at = generator.randrange(SIZE - 100 * KiB)
        length = generator.randrange(100 * KiB)
        content[at : at + length] = generator.randbytes(length)
    return bytes(content)


# Long reads.


async def test_peers_put_long_reads_together_and_hear_of_errors_in_a_part(world: World, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(SIZE)
    (tmp_path / "raw.raw").write_bytes(data)
    await run("nbdcopy", "--request-size=8388608", world.uri("raw"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    await run("qemu-img", "convert", "-f", "raw", "-O", "raw", world.uri("raw"), tmp_path / "converted")
    assert (tmp_path / "converted").read_bytes() == data
    shown = await run("qemu-io", "-r", "-f", "raw", "-c", f"read 0 {SIZE}", world.uri("raw"))
    assert f"read {SIZE}/{SIZE} bytes" in shown
    disk = FaultNode("ill", Edge(MemoryNode("memory", data), "node 'ill'", "file"))
    disk.fail("read", 5 * MiB, 512, times=None)
    world.daemon.server.add(Export("ill", "ill", Edge(disk, "export 'ill'", "nbd")))
    shown = await run(
        "qemu-io", "-r", "-f", "raw", "-c", f"read 0 {SIZE}", "-c", "read 0 1M", world.uri("ill"), status=1
    )
    assert "read failed: Input/output error" in shown
    assert f"read {MiB}/{MiB} bytes" in shown, "the connection did not go on"
    assert "Input/output error" in await run(
        "nbdcopy", "--request-size=8388608", world.uri("ill"), tmp_path / "copy2", status=1
    )
    await world.daemon.server.remove("ill", hard=True)


# What is told of an export.


async def test_nbdinfo_shows_what_an_export_offers(world: World) -> None:
    (export,) = json.loads(await run("nbdinfo", "--json", world.uri("qcow2")))["exports"]
    assert export["export-name"] == "qcow2"
    assert export["export-size"] == SIZE
    assert not export["is_read_only"]
    for ability in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "df", "cache"):
        assert export[f"can_{ability}"], ability
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 64 * KiB, 32 * MiB]
    assert export["contexts"] == ["base:allocation"]
    listed = json.loads(await run("nbdinfo", "--list", "--json", tcp_uri("127.0.0.1", world.tcp.address[1], "")))
    assert [entry["export-name"] for entry in listed["exports"]] == ["raw", "qcow2"]
    assert "No such file" in await run("nbdinfo", world.uri("nope"), status=1)


async def test_snapshots_are_listed_and_offer_their_map(world: World) -> None:
    await world.daemon.snapshots.create(name="s")
    client = await world.connect("qcow2")
    await client.pwrite(1 * MiB, b"x" * 64 * KiB)
    (export,) = json.loads(await run("nbdinfo", "--json", world.uri("qcow2@s")))["exports"]
    assert export["is_read_only"]
    assert not export["can_trim"]
    assert export["contexts"] == ["base:allocation", "fleecer:preserved"]
    preserved = json.loads(await run("nbdinfo", "--json", "--map=fleecer:preserved", world.uri("qcow2@s")))
    assert [(run["offset"], run["length"], run["type"]) for run in preserved] == [
        (0, MiB, 0),
        (MiB, 64 * KiB, 1),
        (MiB + 64 * KiB, SIZE - MiB - 64 * KiB, 0),
    ]
    await client.close()


@pytest.mark.parametrize("name", ["raw", "qcow2"])
async def test_maps_of_nbdinfo_and_qemu_img_tell_the_holes(world: World, name: str) -> None:
    client = await world.connect(name)
    await client.pwrite(2 * MiB, b"x" * MiB)
    await client.flush()
    await client.close()
    wanted = [(0, 2 * MiB, True), (2 * MiB, MiB, False), (3 * MiB, SIZE - 3 * MiB, True)]
    found = json.loads(await run("nbdinfo", "--json", "--map", world.uri(name)))
    assert [(run["offset"], run["length"], run["type"] == 3) for run in found] == wanted
    found = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", world.uri(name)))
    assert [(run["start"], run["length"], run["zero"]) for run in found] == wanted


# Copying.


@pytest.mark.parametrize("name", ["raw", "qcow2"])
async def test_nbdcopy_copies_in_and_out(world: World, name: str) -> None:
    content = sparse(1)
    (world.directory / "in.raw").write_bytes(content)
    await run("nbdcopy", "--flush", world.directory / "in.raw", world.uri(name))
    await run("nbdcopy", "--connections=4", "--requests=64", world.uri(name), world.directory / "out.raw")
    assert (world.directory / "out.raw").read_bytes() == content
    await run("nbdcopy", "--synchronous", world.uri(name), world.directory / "slow.raw")
    assert (world.directory / "slow.raw").read_bytes() == content
    await run("nbdcopy", world.uri("raw"), world.uri("qcow2"))  # from us to us
    assert json.loads(await run("nbdinfo", "--json", world.uri("qcow2")))["exports"][0]["export-size"] == SIZE


async def test_qemu_img_converts_and_compares(world: World) -> None:
    content = sparse(2)
    (world.directory / "in.raw").write_bytes(content)
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", world.directory / "in.raw", world.uri("qcow2"))
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw", world.directory / "in.raw")
    assert "Images are identical" in await run(*compare, world.uri("qcow2"))
    out = world.directory / "out.qcow2"
    uri = tcp_uri("127.0.0.1", world.tcp.address[1], "qcow2")
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, out)
    assert "Images are identical" in await run("qemu-img", "compare", "-f", "raw", world.directory / "in.raw", out)
    client = await world.connect("qcow2")
    await client.pwrite(4096, b"changed")
    await client.close()
    assert "Content mismatch" in await run(*compare, world.uri("qcow2"), status=1)


async def test_qemu_io_does_every_kind_of_request(world: World) -> None:
    commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 1M 64k",
        "write -z 64k 64k",
        "write -z -u 128k 64k",
        "discard 256k 256k",
        "flush",
        "read -P 0x11 0 64k",
        "read -P 0 64k 128k",
        "read -P 0x22 1M 64k",
        "write -P 0x33 777 1",
        "read -P 0x33 777 1",
        "aio_write -P 0x44 2M 128k",
        "aio_write -P 0x55 3M 128k",
        "aio_flush",
        "read -P 0x44 2M 128k",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    for name in ("raw", "qcow2"):
        out = await run("qemu-io", "-f", "raw", *arguments, world.uri(name))
        assert "Pattern verification failed" not in out
        assert "failed" not in out
    told = await run("qemu-io", "-f", "raw", "-c", "write -P 1 0 512", world.uri("nope"), status=1)
    assert "export 'nope' is not available" in told


@pytest.mark.parametrize("name", ["raw", "qcow2"])
async def test_fio_finds_what_it_wrote(world: World, name: str) -> None:
    await run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={world.uri(name)}",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--blockalign=512",
        f"--size={SIZE}",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--fsync=50",
        "--randseed=7",
        "--end_fsync=1",
        "--output-format=json",
    )


# Snapshots under load.


async def overwrite(client: NbdClient, stop: asyncio.Event, seed: int) -> int:
    """Overwrites everything again and again, in random order, until `stop`; the rounds it made."""
    generator = random.Random(seed)
    rounds = 0
    while not stop.is_set():
        for at in generator.sample(range(0, SIZE, 64 * KiB), SIZE // (64 * KiB)):
            kind = generator.random()
            if kind < 0.8:
                await client.pwrite(at, os.urandom(64 * KiB))
            elif kind < 0.9:
                await client.zero(at, 64 * KiB, unmap=True)
            else:
                await client.trim(at, 64 * KiB)
        rounds += 1
    return rounds


async def read_at_random(client: NbdClient, content: bytes, stop: asyncio.Event, seed: int) -> None:
    generator = random.Random(seed)
    while not stop.is_set():
        at, length = generator.randrange(SIZE - 70_000), generator.randint(1, 70_000)
        assert bytes(await client.pread(at, length)) == content[at : at + length], f"the past moved at {at}+{length}"
        for run_length, flags in (await client.block_status(at, length))["base:allocation"]:
            assert not flags & 2 or not any(content[at : at + run_length])
            at += run_length


@contextlib.asynccontextmanager
async def load(world: World, name: str, past: str, content: bytes) -> AsyncIterator[None]:
    """Inside, a writer overwrites the disk and readers read its past."""
    stop = asyncio.Event()
    clients = [await world.connect(name), *[await world.connect(past) for _ in range(2)]]
    writer = asyncio.ensure_future(overwrite(clients[0], stop, 5))
    readers = [
        asyncio.ensure_future(read_at_random(client, content, stop, at)) for at, client in enumerate(clients[1:])
    ]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(writer, *readers)
    assert writer.result() > 0, "the writer was not through even once"
    for client in clients:
        await client.close()


@pytest.mark.parametrize("name", ["raw", "qcow2"])
async def test_a_snapshot_is_copied_exactly_while_everything_is_overwritten(world: World, name: str) -> None:
    content = sparse(3)
    client = await world.connect(name)
    for at in range(0, SIZE, MiB):
        await client.pwrite(at, content[at : at + MiB])
    await world.daemon.snapshots.create([name], name="s")
    async with load(world, name, f"{name}@s", content):
        out = world.directory / "out.raw"
        copies = [run("nbdcopy", world.uri(f"{name}@s"), out)]
        copies.append(run("qemu-img", "convert", "-f", "raw", "-O", "raw", world.uri(f"{name}@s"), f"{out}2"))
        await asyncio.gather(*copies)
        await asyncio.sleep(0.2)  # so that the writer is through at least once
        again = world.directory / "again.raw"
        await run("nbdcopy", world.uri(f"{name}@s"), again)  # with all preserved by now
    for path in (out, Path(f"{out}2"), again):
        assert path.read_bytes() == content
    await world.daemon.snapshots.delete("s")
    await client.close()


async def test_the_first_schemes_target_is_copied_exactly_while_everything_is_overwritten(world: World) -> None:
    content = sparse(4)
    client = await world.connect("qcow2")
    for at in range(0, SIZE, MiB):
        await client.pwrite(at, content[at : at + MiB])
    path = world.directory / "b.qcow2"
    await new_qcow2(path)
    file = {"driver": "file", "filename": str(path)}
    options = {"driver": "qcow2", "node-name": "b", "file": file, "backing": "qcow2"}
    daemon = world.daemon
    target = await daemon.opener.add(parse_options(options))
    (job,) = await start_backups(
        daemon.graph,
        daemon.jobs,
        [BackupRequest("fleece", daemon.graph.find("qcow2"), target, "none")],
        daemon.events.announce,
    )
    daemon.export(target, "b")
    async with load(world, "qcow2", "b", content):
        out = world.directory / "out.raw"
        await run("nbdcopy", world.uri("b"), out)
        await asyncio.sleep(0.2)  # so that the writer is through at least once
    assert out.read_bytes() == content
    await job.cancel()
    await run("nbdcopy", world.uri("b"), world.directory / "late.raw", status=1)
    await daemon.remove_export("b", hard=True)
    await daemon.graph.remove("b")
    await run("qemu-img", "check", path)
    await client.close()
