"""Every kind of node, run through the contract in block/node.py.

A new kind joins by a `Subject` in SUBJECTS: its name, and a context manager that makes one in a directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fleecer.block.edge import Edge
from fleecer.block.node import Node
from fleecer.block.nodes.delay import DelayNode
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.filter import FilterNode
from fleecer.block.nodes.log import LogNode
from fleecer.block.nodes.null import NullNode
from fleecer.block.nodes.throttle import ThrottleNode
from fleecer.storage.api import StorageLimits
from fleecer.storage.file import create_file, open_unlinked
from fleecer.storage.pool import running_pool
from fleecer.testing.conformance import Subject, cases_for, check_node
from fleecer.testing.memory import MemoryNode, Pause, random_turns
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
    storage = await open_unlinked("/dev/shm")
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
]


@pytest.mark.parametrize(
    ("subject", "case"),
    [pytest.param(subject, case, id=f"{subject.name}: {case}") for subject in SUBJECTS for case in cases_for(subject)],
)
async def test_node_keeps_the_contract(subject: Subject, case: str, tmp_path: Path) -> None:
    await check_node(subject, case, str(tmp_path))
