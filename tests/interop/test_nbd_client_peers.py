"""Our NBD client against other people's servers: the contract of a node, and what their quirks bring out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleecer.block.edge import Edge
from fleecer.block.node import Node
from fleecer.block.nodes.nbd import NbdNode
from fleecer.errors import FleecerError, IoError
from fleecer.net.nbd_client import NbdClient
from fleecer.net.stream import connect_unix
from fleecer.testing.conformance import Subject, cases_for, check_node
from fleecer.units import KiB

pytestmark = pytest.mark.peer

SIZE = 300 * KiB

SERVERS = {
    "nbdkit memory": "nbdkit -f memory {size}",
    "nbdkit file": "nbdkit -f file {image}",
    "nbdkit without structured replies": "nbdkit -f --no-sr memory {size}",
    "nbdkit of old style": "nbdkit -f --mask-handshake=0 memory {size}",
    "nbdkit without zeroing": "nbdkit -f --filter=nozero memory {size}",
    "nbdkit zeroing slowly": "nbdkit -f --filter=nozero memory {size} zeromode=notrim",
    "nbdkit without extents": "nbdkit -f --filter=noextents file {image}",
    "nbdkit with FUA emulated": "nbdkit -f --filter=fua memory {size} fuamode=emulate",
    "nbdkit with 512-byte blocks": "nbdkit -f --filter=blocksize-policy memory {size}"
    " blocksize-minimum=512 blocksize-preferred=4096 blocksize-maximum=64K blocksize-error-policy=error",
    "nbdkit with 4096-byte blocks": "nbdkit -f --filter=blocksize-policy file {image}"
    " blocksize-minimum=4096 blocksize-preferred=64K blocksize-maximum=1M blocksize-error-policy=error",
    "nbdkit with delays": "nbdkit -f --filter=delay memory {size} rdelay=1ms wdelay=2ms",
    "qemu-nbd": "qemu-nbd --persistent --shared=4 -f raw {image}",
    "qemu-nbd of qcow2": "qemu-nbd --persistent --shared=4 --discard=unmap -f qcow2 {qcow2}",
    "qemu-storage-daemon": "qemu-storage-daemon --nbd-server addr.type=fd,addr.str=3"
    " --blockdev file,node-name=file,filename={image},discard=unmap"
    " --export nbd,id=e,name=,node-name=file,writable=on",
}


@contextlib.contextmanager
def started(directory: Path, command: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs a server on a socket that listens already, as descriptor 3; gives the socket's path and the process."""
    image, qcow2 = directory / "disk.raw", directory / "disk.qcow2"
    with image.open("wb") as file:
        file.truncate(SIZE)
    if "{qcow2}" in command:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, str(SIZE)], check=True)
    path = str(directory / "nbd")
    words = command.format(size=SIZE, image=image, qcow2=qcow2).split()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        script = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&{fd}'
        process = subprocess.Popen(["bash", "-c", script, "bash", *words], pass_fds=(fd,), stderr=subprocess.PIPE)
    try:
        yield path, process
    finally:
        process.terminate()
        process.communicate(timeout=20)


@contextlib.contextmanager
def serving(directory: Path, command: str) -> Iterator[str]:
    """As `started`, for a server that must end in order."""
    with started(directory, command) as (path, process):
        yield path
    assert process.returncode in (0, -15)


async def connect(path: str) -> NbdNode:
    return NbdNode("nbd0", await NbdClient.connect(await connect_unix(path), ""))


@pytest.mark.parametrize("name", SERVERS)
async def test_an_nbd_node_keeps_the_contract_over(name: str, tmp_path: Path) -> None:
    with serving(tmp_path, SERVERS[name]) as path:

        @contextlib.asynccontextmanager
        async def make(directory: str) -> AsyncIterator[Node]:
            node = await connect(path)
            try:
                yield node
            finally:
                await node.close()

        # Not every server keeps a sector whole where requests overlap, and the protocol does not ask it to.
        subject = Subject(name, make, keeps_sectors_whole=False)
        for case in cases_for(subject):
            try:
                await check_node(subject, case, str(tmp_path))
            except (AssertionError, FleecerError) as error:
                raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize(
    ("name", "can_zero", "can_discard"),
    [("nbdkit memory", True, True), ("nbdkit without zeroing", False, True), ("qemu-nbd", True, True)],
)
async def test_what_a_server_can_do_is_what_the_node_can(
    tmp_path: Path, name: str, can_zero: bool, can_discard: bool
) -> None:
    with serving(tmp_path, SERVERS[name]) as path:
        node = await connect(path)
        assert (node.limits.zero_is_fast, node.limits.can_discard) == (can_zero, can_discard)
        await node.close()


async def test_holes_and_zeroes_of_a_server_are_seen(tmp_path: Path) -> None:
    with serving(tmp_path, SERVERS["nbdkit file"]) as path:
        node = await connect(path)
        edge = Edge(node, "test", "file", writable=True)
        await edge.pwrite(64 * KiB, b"x" * 4096)
        await edge.flush()
        extents = await edge.block_status(0, 128 * KiB)
        assert [(extent.length, extent.flags) for extent in extents] == [
            (64 * KiB, 3),
            (4 * KiB, 0),
            (60 * KiB, 3),
        ]
        await node.close()


@pytest.mark.parametrize(
    ("number", "code"), [("ENOSPC", errno.ENOSPC), ("EPERM", errno.EPERM), ("EIO", errno.EIO), ("ENOMEM", errno.ENOMEM)]
)
async def test_a_servers_errors_come_through_and_the_connection_goes_on(tmp_path: Path, number: str, code: int) -> None:
    command = f"nbdkit -f --filter=error memory {SIZE} error-pwrite={number} error-pwrite-rate=100%"
    with serving(tmp_path, command) as path:
        node = await connect(path)
        edge = Edge(node, "test", "file", writable=True)
        for _ in range(3):
            with pytest.raises(IoError, match="write of 3 bytes at 0") as caught:
                await edge.pwrite(0, b"abc")
            assert caught.value.errno == code
        assert not any(await edge.pread(0, 4096))
        await node.close()


async def test_random_errors_lose_and_tear_nothing(tmp_path: Path) -> None:
    command = f"nbdkit -f --filter=error memory {SIZE} error=EIO error-rate=30%"
    with serving(tmp_path, command) as path:
        node = await connect(path)
        edge = Edge(node, "test", "file", writable=True)
        failures = 0
        content = bytearray(SIZE)
        for at in range(0, SIZE, 4096):
            data = bytes([at // 4096 % 255 + 1]) * 4096
            for _ in range(100):
                try:
                    await edge.pwrite(at, data)
                    break
                except IoError:
                    failures += 1
            content[at : at + 4096] = data
        for at in range(0, SIZE, 4096):
            for _ in range(100):
                try:
                    assert await edge.pread(at, 4096) == content[at : at + 4096]
                    break
                except IoError:
                    failures += 1
        assert failures
        await node.close()


async def test_a_read_only_server_gives_a_read_only_node(tmp_path: Path) -> None:
    with serving(tmp_path, f"nbdkit -f -r memory {SIZE}") as path:
        node = await connect(path)
        assert node.read_only
        assert not any(await Edge(node, "test", "file").pread(0, SIZE))
        await node.close()


async def test_a_server_that_is_killed_fails_what_is_in_flight(tmp_path: Path) -> None:
    with started(tmp_path, "nbdkit -f --filter=delay memory {size} rdelay=60") as (path, process):
        node = await connect(path)
        edge = Edge(node, "test", "file", writable=True)
        await edge.pwrite(0, b"x")
        reads = [asyncio.ensure_future(edge.pread(at, 512)) for at in range(0, 4096, 512)]
        await edge.pwrite(0, b"y")  # so the reads are under way
        process.kill()
        for read in reads:
            with pytest.raises(IoError, match="NBD connection on"):
                await read
        with pytest.raises(IoError, match="NBD request on"):
            await edge.flush()
        await node.close()
        assert process.wait() == -9
