"""Every kind of node, run through the contract in block/node.py.

A new kind joins by a `Subject` in SUBJECTS: its name, and a context manager that makes one in a directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.qcow2_world import checked, new_image, open_image

from fleecer.block.copier import Copier
from fleecer.block.edge import Edge
from fleecer.block.node import Node
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.delay import DelayNode
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.filter import FilterNode
from fleecer.block.nodes.log import LogNode
from fleecer.block.nodes.nbd import NbdNode
from fleecer.block.nodes.null import NullNode
from fleecer.block.nodes.raw import RawNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.block.nodes.throttle import ThrottleNode
from fleecer.export import Export, Server
from fleecer.net.nbd_client import NbdClient
from fleecer.storage.api import StorageLimits
from fleecer.storage.file import create_file, open_unlinked
from fleecer.storage.pool import running_pool
from fleecer.testing.conformance import Subject, cases_for, check_node
from fleecer.testing.memory import MemoryNode, MemoryStorage, Pause, random_turns
from fleecer.testing.streams import memory_streams
from fleecer.units import KiB

SIZE = 300 * KiB
ODD_SIZE = 300 * KiB + 317


@contextlib.asynccontextmanager
async def raw_file(directory: str) -> AsyncIterator[Node]:
    node = FileNode("disk0", await create_file(os.path.join(directory, "disk0.raw"), size=ODD_SIZE))
    try:
        yield node
    finally:
        await node.close()
        await running_pool().close()


@contextlib.asynccontextmanager
async def scratch_in_memory(directory: str) -> AsyncIterator[Node]:
    (storage,) = await open_unlinked("/dev/shm", [0])
    await storage.truncate(ODD_SIZE)
    node = FileNode("scratch0", storage)
    try:
        yield node
    finally:
        await node.close()
        await running_pool().close()


@contextlib.asynccontextmanager
async def null(directory: str) -> AsyncIterator[Node]:
    yield NullNode("null0", SIZE)


def memory(
    alignment_bytes: int = 1, pause: Callable[[], Pause] | None = None
) -> Callable[[str], contextlib.AbstractAsyncContextManager[Node]]:
    @contextlib.asynccontextmanager
    async def make(directory: str) -> AsyncIterator[Node]:
        limits = StorageLimits(alignment_bytes=alignment_bytes)
        yield MemoryNode("memory0", SIZE, limits=limits, pause=pause() if pause else None)

    return make


def filtered(name: str, make_filter: Callable[[Edge], FilterNode], alignment_bytes: int = 1) -> Subject:
    @contextlib.asynccontextmanager
    async def make(directory: str) -> AsyncIterator[Node]:
        child = MemoryNode("memory0", SIZE, limits=StorageLimits(alignment_bytes=alignment_bytes))
        node = make_filter(Edge(child, "node 'filter0'", "file", writable=True))
        try:
            yield node
        finally:
            await node.close()

    return Subject(name, make)


def served(alignment_bytes: int = 1, pause: Callable[[], Pause] | None = None, piece_bytes: int = 1 << 30) -> Subject:
    """An nbd node: our client, a stream in memory, our server, over a node in memory."""

    @contextlib.asynccontextmanager
    async def make(directory: str) -> AsyncIterator[Node]:
        limits = StorageLimits(alignment_bytes=alignment_bytes)
        disk = MemoryNode("memory0", ODD_SIZE if alignment_bytes == 1 else SIZE, limits=limits, pause=pause and pause())
        edge = Edge(disk, "export 'disk'", "nbd", writable=True)
        server = Server(raise_internal_errors=True)
        server.add(Export("disk", "disk", edge))
        ours, theirs = memory_streams(piece_bytes=piece_bytes)
        server.serve(theirs)
        node = NbdNode("nbd0", await NbdClient.connect(ours, "disk"))
        try:
            yield node
            assert not edge.busy, "the server has requests in flight that the client does not know of"
        finally:
            await node.close()
            await server.stop()

    name = "nbd" if alignment_bytes == 1 else f"nbd over {alignment_bytes}-byte sectors"
    name += (" with pauses" if pause else "") + (" in small pieces" if piece_bytes < 1 << 30 else "")
    return Subject(name, make)


@contextlib.asynccontextmanager
async def copy_before_write(directory: str) -> AsyncIterator[Node]:
    """The filter with a snapshot active, which must read as the disk did at its instant whatever the case has done."""
    disk = MemoryNode("disk", os.urandom(ODD_SIZE))
    scratch = MemoryNode("scratch", ODD_SIZE)
    before = bytes(disk.data)
    source = Edge(disk, "node 'filter0'", "filtered", writable=True)
    copier = Copier(source, cluster_size_bytes=4 * KiB)
    snapshot = copier.take("snapshot", Edge(scratch, "snapshot", "scratch", writable=True), fresh=True)
    node = CopyBeforeWriteNode("filter0", copier)
    node.follow_scratches()
    yield node
    access = SnapshotAccessNode("past", Edge(node, "past", "snapshot"), copier, snapshot)
    assert await Edge(access, "reader", "nbd").pread(0, ODD_SIZE) == before, "the snapshot moved"


@contextlib.asynccontextmanager
async def fresh_qcow2(directory: str) -> AsyncIterator[Node]:
    image = await new_image(SIZE)
    node = await open_image(image)
    yield node
    await node.close()
    report = await checked(image)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages


@contextlib.asynccontextmanager
async def qcow2_over_a_short_backing_file(directory: str) -> AsyncIterator[Node]:
    image = await new_image(SIZE, cluster_size=4 * KiB)
    node = await open_image(image, backing=MemoryStorage(os.urandom(200_001)))
    yield node
    await node.close()
    report = await checked(image)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages


def one_line(line: str) -> None:
    assert "\n" not in line


SUBJECTS = [
    Subject("file", raw_file),
    Subject("file on tmpfs", scratch_in_memory),
    Subject("null-co", null, keeps_data=False),
    Subject("memory", memory()),
    Subject("memory with pauses", memory(pause=lambda: random_turns(7))),
    Subject("memory of 512-byte sectors", memory(512)),
    Subject("memory of 4096-byte sectors with pauses", memory(4096, pause=lambda: random_turns(8))),
    filtered("fault", lambda child: FaultNode("filter0", child)),
    filtered("fault over 512-byte sectors", lambda child: FaultNode("filter0", child), alignment_bytes=512),
    filtered("delay", lambda child: DelayNode("filter0", child, {"flush": 0.0001})),
    filtered("throttle", lambda child: ThrottleNode("filter0", child, requests_per_second=1e6, bytes_per_second=1e12)),
    filtered("log", lambda child: LogNode("filter0", child, one_line)),
    filtered("raw", lambda child: RawNode("filter0", child)),
    filtered("raw over 512-byte sectors", lambda child: RawNode("filter0", child), alignment_bytes=512),
    Subject("copy-before-write", copy_before_write),
    Subject("qcow2", fresh_qcow2),
    Subject("qcow2 over a short backing file", qcow2_over_a_short_backing_file),
    served(),
    served(512),
    served(4096, pause=lambda: random_turns(9)),
    served(piece_bytes=1000),
]


@pytest.mark.parametrize(
    ("subject", "case"),
    [pytest.param(subject, case, id=f"{subject.name}: {case}") for subject in SUBJECTS for case in cases_for(subject)],
)
async def test_node_keeps_the_contract(subject: Subject, case: str, tmp_path: Path) -> None:
    await check_node(subject, case, str(tmp_path))
