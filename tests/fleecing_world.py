"""A disk in memory with guests, snapshots and readers: what the fleecing tests share."""

from __future__ import annotations

import asyncio
import random

from fleecer.block.edge import Edge
from fleecer.block.fleecing import Fleece, Plan, cut, uncut
from fleecer.block.graph import SNAPSHOT_ROLE, Graph
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.errors import FleecerError
from fleecer.testing.memory import MemoryStorage, Pause

CLUSTER = 4096
SIZE = 8 * CLUSTER + 1000  # the last cluster is short, and no sector


class Taken:
    """A snapshot, the door to read it by, and what it must read as."""

    def __init__(self, fleece: Fleece, edge: Edge, image: bytes) -> None:
        self.fleece = fleece
        self.edge = edge
        self.image = image


class World:
    """One disk, served through `top`, and the snapshots taken of it."""

    def __init__(self, seed: int = 0, *, pause: Pause | None = None, size: int = SIZE) -> None:
        self.random = random.Random(seed)
        self.pause = pause
        self.graph = Graph()
        self.disk = MemoryStorage(self.random.randbytes(size), name="disk", pause=pause)
        node = FileNode("disk", self.disk)
        self.graph.add(node, named=True)
        self.top = self.graph.attach(node, "export 'disk'", "nbd", writable=True)
        self.serial = 0

    def scratch(self) -> tuple[Edge, MemoryStorage]:
        """A new scratch, attached."""
        self.serial += 1
        storage = MemoryStorage(len(self.disk.data), name=f"scratch{self.serial}", pause=self.pause)
        node = FileNode(f"scratch{self.serial}", storage)
        self.graph.add(node, named=False)
        return self.graph.attach(node, f"snapshot {self.serial}", "scratch", writable=True), storage

    async def take(
        self, *, timeout_s: float = 15.0, on_error: str = "break-snapshot", scratch: Edge | None = None
    ) -> Taken:
        """A snapshot of this instant; the image is what the disk holds while everything is drained."""
        plan = Plan(
            self.top.node,
            scratch or self.scratch()[0],
            f"s{self.serial}",
            fresh=True,
            share=True,
            timeout_s=timeout_s,
            on_error=on_error,  # type: ignore[arg-type]
            cluster_size_bytes=CLUSTER,
        )
        (fleece,) = await cut(self.graph, [plan])
        image = bytes(self.disk.data)  # nothing has run since the gates opened
        below = self.graph.attach(fleece.filter, "snapshot", SNAPSHOT_ROLE)
        access = SnapshotAccessNode(self.graph.fresh_name(), below, fleece.copier, fleece.snapshot, may_discard=True)
        self.graph.add(access, named=False)
        return Taken(fleece, self.graph.attach(access, "reader", "nbd", writable=True), image)

    async def drop(self, taken: Taken) -> None:
        """Ends a snapshot once its readers are through."""
        await self.graph.drain_and_detach(taken.edge)
        await uncut(self.graph, taken.fleece)

    def range(self) -> tuple[int, int]:
        """Some range of the disk: often small, often at the edges of clusters."""
        size = len(self.disk.data)
        offset = self.random.randrange(size)
        if self.random.random() < 0.3:
            offset -= offset % CLUSTER
        length = self.random.choice((1, 512, 700, CLUSTER, CLUSTER + 1, 3 * CLUSTER))
        return offset, min(length, size - offset)

    async def change(self) -> None:
        """One random change by the guest."""
        offset, length = self.range()
        kind = self.random.random()
        if kind < 0.7:
            await self.top.pwrite(offset, self.random.randbytes(length))
        elif kind < 0.85:
            await self.top.zero(offset, length)
        else:
            await self.top.discard(offset, length)

    async def read(self, taken: Taken) -> bool:
        """Reads some of a snapshot and checks it. Returns False if it said that it is broken."""
        offset, length = self.range()
        try:
            data = bytes(await taken.edge.pread(offset, length))
        except FleecerError:
            assert taken.fleece.snapshot.broken is not None, "a snapshot that is not broken failed a read"
            return False
        assert data == taken.image[offset : offset + length], f"snapshot moved at {offset}+{length}"
        return True

    async def status(self, taken: Taken) -> None:
        """Asks some status and checks that zero means zero."""
        offset, length = self.range()
        try:
            extents = await taken.edge.block_status(offset, length)
        except FleecerError:
            assert taken.fleece.snapshot.broken is not None
            return
        for extent in extents:
            if extent.flags & 2:
                assert not any(taken.image[offset : offset + extent.length]), "status says zero where data was"
            offset += extent.length

    async def check_whole(self, taken: Taken) -> None:
        """Reads the whole snapshot."""
        assert bytes(await taken.edge.pread(0, len(taken.image))) == taken.image


async def together(*coroutines: object) -> None:
    """Runs coroutines side by side; the first failure is raised once all have ended."""
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)  # type: ignore[arg-type]
