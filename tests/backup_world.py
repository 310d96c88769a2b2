"""Live disks in memory, targets over them, and the backup jobs that keep their past: what the tests of jobs share."""

from __future__ import annotations

import random
from typing import Any, Literal

from fleecer.block.edge import Edge
from fleecer.block.graph import Graph
from fleecer.block.node import ZERO, Node
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import open_qcow2, read_header
from fleecer.jobs import BackupJob, BackupRequest, JobTable, start_backups
from fleecer.testing.memory import MemoryStorage, Pause
from fleecer.units import KiB
from tests.qcow2_world import file_edge, new_image

CLUSTER = 64 * KiB
SIZE = 5 * CLUSTER + 1500  # the last cluster is short


class World:
    """Live disks in one graph, targets over them, and the jobs that keep their past."""

    def __init__(self, seed: int = 0, *, pause: Pause | None = None) -> None:
        self.random = random.Random(seed)
        self.pause = pause
        self.graph = Graph()
        self.table = JobTable()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def announce(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def statuses(self, job_id: str) -> list[str]:
        return [d["status"] for name, d in self.events if name == "JOB_STATUS_CHANGE" and d["id"] == job_id]

    def slow_disk(self) -> tuple[FaultNode, Edge]:
        """A live disk whose requests can be held, and the guest's edge to it."""
        memory, unused, _ = self.disk("memory")
        self.graph.forget(unused)
        fault = FaultNode("A", self.graph.attach(memory, "node 'A'", "file", writable=True))
        self.graph.add(fault, named=True)
        return fault, self.graph.attach(fault, "export 'A'", "nbd", writable=True)

    def disk(self, name: str = "A") -> tuple[Node, Edge, MemoryStorage]:
        """A live disk with random content, and the guest's edge to it."""
        storage = MemoryStorage(self.random.randbytes(SIZE), name=name, pause=self.pause)
        node = FileNode(name, storage)
        self.graph.add(node, named=True)
        return node, self.graph.attach(node, f"export '{name}'", "nbd", writable=True), storage

    async def overlay(self, name: str, backing: Node, *, read_only: bool = False) -> tuple[Node, FaultNode, FaultNode]:
        """A fresh qcow2 over `backing`; also the fault nodes below it: of its file, and of its way to the backing."""
        image = await new_image(SIZE, cluster_size=CLUSTER)
        image.pause = self.pause
        file = FaultNode(f"{name}-file", file_edge(image))
        below = FaultNode(f"{name}-below", self.graph.attach(backing, f"node '{name}-below'", "file"))
        for node in (file, below):
            self.graph.add(node, named=False)
        edge = self.graph.attach(file, f"node '{name}'", "file", writable=not read_only, may_grow=True)
        qcow2 = await open_qcow2(
            edge,
            name=name,
            header=await read_header(edge, name),
            backing=self.graph.attach(below, f"node '{name}'", "backing"),
            read_only=read_only,
        )
        self.graph.add(qcow2, named=True)
        return qcow2, file, below

    def reader(self, node: Node) -> Edge:
        return self.graph.attach(node, f"export '{node.name}'", "nbd")

    async def start(
        self, *pairs: tuple[Node, Node], sync: Literal["none", "full"] = "none", **more: Any
    ) -> list[BackupJob]:
        defaults = {"auto_dismiss": False}
        requests = [
            BackupRequest(
                device=device, target=target, sync=sync, **({"job_id": f"job-{target.name}"} | defaults | more)
            )
            for device, target in pairs
        ]
        return await start_backups(self.graph, self.table, requests, self.announce)

    def range(self) -> tuple[int, int]:
        offset = self.random.randrange(SIZE)
        if self.random.random() < 0.4:
            offset -= offset % CLUSTER
        length = self.random.choice((1, 512, 4096, CLUSTER, CLUSTER + 700, 3 * CLUSTER))
        return offset, min(length, SIZE - offset)

    async def change(self, guest: Edge) -> None:
        offset, length = self.range()
        kind = self.random.random()
        if kind < 0.7:
            await guest.pwrite(offset, self.random.randbytes(length))
        elif kind < 0.85:
            await guest.zero(offset, length)
        else:
            await guest.discard(offset, length)

    async def read(self, reader: Edge, image: bytes) -> None:
        offset, length = self.range()
        assert bytes(await reader.pread(offset, length)) == image[offset : offset + length], (
            f"moved at {offset}+{length}"
        )

    async def status(self, reader: Edge, image: bytes) -> None:
        offset, length = self.range()
        for extent in await reader.block_status(offset, length):
            if extent.flags & ZERO:
                assert not any(image[offset : offset + extent.length]), f"zero was told of data at {offset}"
            offset += extent.length
