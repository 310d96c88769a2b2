"""One live disk, its guests, its snapshots by both schemes, and their readers, over simulated disks, with an oracle.

The block graph, copier, qcow2 and jobs are the real ones. A `World` lives in one run of a `SimLoop`; the operations
here are what a schedule is made of. Each checks what it gets against the oracle and raises `Violation`.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Literal

from fleecer.block.copier import Snapshot
from fleecer.block.edge import Edge
from fleecer.block.fleecing import Fleece, Plan, cut, uncut
from fleecer.block.graph import SNAPSHOT_ROLE, Graph
from fleecer.block.node import ZERO, Node
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import check_qcow2, open_qcow2, read_header
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.errors import FleecerError
from fleecer.formats.qcow2.create import create_image
from fleecer.jobs import BackupJob, BackupRequest, JobTable, start_backups
from fleecer.testing.sim.disk import Faults, Latency, SimDisk
from fleecer.testing.sim.oracle import SECTOR_BYTES, Change, History, SnapshotOracle, Violation, stamp

CLUSTER_BYTES = 4096
SECTORS_PER_CLUSTER = CLUSTER_BYTES // SECTOR_BYTES

Format = Literal["raw", "qcow2", "overlay"]


@dataclasses.dataclass(slots=True)
class Held:
    """A snapshot somebody may read: through snapshot-access, or through the target of a job."""

    name: str
    edge: Edge
    oracle: SnapshotOracle
    snapshot: Snapshot
    fleece: Fleece
    job: BackupJob | None = None
    readers: int = 0
    ending: bool = False


class World:
    """The disk and what is done with it. Made by `make_world`."""

    def __init__(
        self, generator: random.Random, clusters: int, latency: Callable[[], Latency] | None, trace: list[str] | None
    ) -> None:
        self.generator = generator
        self.size = clusters * CLUSTER_BYTES
        self.history = History(clusters * SECTORS_PER_CLUSTER)
        self.graph = Graph()
        self.jobs = JobTable()
        self.held: list[Held] = []
        self.disks: list[SimDisk] = []
        self.image: SimDisk
        self.node: Node
        self.top: Edge
        self.guest_failures = 0
        self.copy_timeout_s = 0.0
        self._latency = latency
        self._trace = trace
        self._serial = 0

    def say(self, line: str) -> None:
        """Adds a line to the story."""
        if self._trace is not None:
            self._trace.append(line)

    def disk(self, content: int | bytes, name: str, faults: Faults | None = None, **options: bool) -> SimDisk:
        """A new simulated disk."""
        latency = self._latency() if self._latency is not None else None
        trace = self._trace.append if self._trace is not None else None
        disk = SimDisk(content, self.generator, name=name, latency=latency, faults=faults, trace=trace, **options)
        self.disks.append(disk)
        return disk

    def add(self, disk: SimDisk) -> Node:
        """A node over a simulated disk, in the graph until its last edge goes."""
        node = FileNode(disk.name, disk)
        self.graph.add(node, named=False)
        return node

    # Guests.

    async def write(self, first: int, end: int) -> None:
        """Writes sectors [first, end), each with the number of this write."""
        change = self.history.begin(first, end)
        self.say(f"guest writes {change.number} to sectors {first}..{end - 1}")
        data = b"".join(stamp(change.number, sector) for sector in range(first, end))
        await self._change(change, self.top.pwrite(first * SECTOR_BYTES, data))

    async def zero(self, first: int, end: int) -> None:
        """Writes zeroes."""
        change = self.history.begin(first, end, zero=True)
        self.say(f"guest zeroes sectors {first}..{end - 1}")
        await self._change(change, self.top.zero(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES))

    async def discard(self, first: int, end: int) -> None:
        """Discards."""
        change = self.history.begin(first, end, discard=True)
        self.say(f"guest discards sectors {first}..{end - 1}")
        await self._change(change, self.top.discard(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES))

    async def _change(self, change: Change, request: object) -> None:
        try:
            await request  # type: ignore[misc]
        except FleecerError as error:
            self.guest_failures += 1
            self.say(f"  which fails: {error}")
            self.history.finish(change, failed=True)
        else:
            self.say(f"  change of sectors {change.first}..{change.end - 1} done")
            self.history.finish(change)

    async def read(self, first: int, end: int) -> None:
        """Reads, and checks what comes."""
        began = self.history.tick()
        try:
            data = bytes(await self.top.pread(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES))
        except FleecerError as error:
            self.guest_failures += 1
            self.say(f"guest's read fails: {error}")
            return
        self.history.check_read(first * SECTOR_BYTES, data, began)

    async def flush(self) -> None:
        """Flushes."""
        try:
            await self.top.flush()
        except FleecerError as error:
            self.guest_failures += 1
            self.say(f"guest's flush fails: {error}")

    # Snapshots.

    async def take(self, scratch: SimDisk | None = None) -> Held:
        """A snapshot read through snapshot-access."""
        self._serial += 1
        name = f"s{self._serial}"
        disk = scratch or self.disk(self.size, f"scratch-{name}")
        edge = self.graph.attach(self.add(disk), f"snapshot {name}", "scratch", writable=True)
        plan = Plan(
            self.top.node,
            edge,
            name,
            fresh=True,
            share=True,
            timeout_s=self.copy_timeout_s,
            cluster_size_bytes=CLUSTER_BYTES,
        )
        (fleece,) = await cut(self.graph, [plan], timeout_s=1e9)
        oracle = SnapshotOracle(name, self.history.image())  # nothing has run since the instant
        self.say(f"snapshot {name} taken")
        below = self.graph.attach(fleece.filter, f"snapshot {name}", SNAPSHOT_ROLE)
        access = SnapshotAccessNode(self.graph.fresh_name(), below, fleece.copier, fleece.snapshot)
        self.graph.add(access, named=False)
        reader = self.graph.attach(access, f"export {name}", "nbd")
        return self._hold(Held(name, reader, oracle, fleece.snapshot, fleece))

    async def fleece(self, target: SimDisk | None = None) -> Held:
        """A snapshot by the first scheme: a qcow2 image over the live disk, kept true by a backup job."""
        self._serial += 1
        name = f"b{self._serial}"
        disk = target or self.disk(_empty_image(self.size), f"target-{name}")
        file = self.graph.attach(self.add(disk), f"node {name}", "file", writable=True, may_grow=True)
        backing = self.graph.attach(self.node, f"node {name}", "backing")
        header = await read_header(file, name)
        node = await open_qcow2(file, name=name, header=header, backing=backing, read_only=False)
        self.graph.add(node, named=False)
        reader = self.graph.attach(node, f"export {name}", "nbd")
        instants: list[list[set[int]]] = []
        request = BackupRequest(name, self.node, node, "none", timeout_s=self.copy_timeout_s)
        (job,) = await start_backups(self.graph, self.jobs, [request], lambda *_: None)
        instants.append(self.history.image())
        self.say(f"job {name} started")
        oracle = SnapshotOracle(name, instants[0])
        return self._hold(Held(name, reader, oracle, job.fleece.snapshot, job.fleece, job))

    def _hold(self, held: Held) -> Held:
        self.held.append(held)
        return held

    async def read_snapshot(self, held: Held, first: int, end: int) -> None:
        """Reads some of a snapshot, and checks it: the past or an error."""
        held.readers += 1
        try:
            data = bytes(await held.edge.pread(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES))
        except FleecerError as error:
            self.say(f"read of {held.name} fails: {error}")
            if held.snapshot.broken is None and not self.failed():
                raise Violation(f"a read of the whole snapshot {held.name} failed: {error}") from error
        else:
            self.say(f"read of {held.name} sectors {first}..{end - 1} done")
            held.oracle.check_read(first * SECTOR_BYTES, data)
        finally:
            held.readers -= 1

    async def status_of_snapshot(self, held: Held, first: int, end: int) -> None:
        """Asks a snapshot's status, and checks that zero is zero."""
        held.readers += 1
        try:
            offset = first * SECTOR_BYTES
            for extent in await held.edge.block_status(offset, (end - first) * SECTOR_BYTES):
                if extent.flags & ZERO:
                    held.oracle.check_zero(offset, extent.length)
                offset += extent.length
        except FleecerError as error:
            if held.snapshot.broken is None and not self.failed():
                raise Violation(f"the status of the whole snapshot {held.name} failed: {error}") from error
        finally:
            held.readers -= 1

    async def end(self, held: Held) -> None:
        """Ends a snapshot, its readers' requests in flight first."""
        if held.ending:
            return
        held.ending = True
        self.say(f"{held.name} is being ended")
        self.held.remove(held)
        if held.job is not None:
            await held.job.cancel()
            await self.graph.drain_and_detach(held.edge)
        else:
            await self.graph.drain_and_detach(held.edge)
            await uncut(self.graph, held.fleece, timeout_s=1e9)
        self.say(f"{held.name} ended")

    def failed(self) -> bool:
        """Whether any disk had a fault."""
        return any(disk.faults is not None and disk.faults.hit for disk in self.disks)

    # The end.

    async def finish(self) -> None:
        """Reads everything once more, ends the snapshots, and checks that nothing is left behind."""
        sectors = self.history.sectors
        await self.read(0, sectors)
        for held in list(self.held):
            await self.read_snapshot(held, 0, sectors)
            await self.end(held)
        await self.flush()
        if self.top.node is not self.node:
            raise Violation("a filter stays above the disk")
        for edge in self.graph.parents(self.node):
            if edge.busy:
                raise Violation(f"{edge} has {edge.busy} requests in flight at the end")
        await self.graph.close()
        for disk in self.disks:
            if disk.in_flight:
                raise Violation(f"{disk.name} has {disk.in_flight} requests in flight at the end")
        if self.node.driver == "qcow2":
            await self._check_image()

    async def _check_image(self) -> None:
        storage = SimDisk(bytes(self.image.data), self.generator, name="checked", latency=lambda: 0.0)
        file = Edge(FileNode("checked", storage), "check", "file")
        report = await check_qcow2(file, "checked")
        if report.corruptions or (report.leaks and not self.failed()):
            raise Violation(f"the image is unsound: {report.messages}")


async def make_world(
    generator: random.Random,
    *,
    format: Format = "raw",
    clusters: int = 2,
    latency: Callable[[], Latency] | None = None,
    faults: Faults | None = None,
    trace: list[str] | None = None,
    record: bool = False,
) -> World:
    """A disk of `clusters` clusters of 4 KiB, with no snapshot, and a guest's edge to it."""
    world = World(generator, clusters, latency, trace)
    if format == "raw":
        world.image = world.disk(world.size, "disk", faults, record=record)
        world.node = FileNode("disk", world.image)
        world.graph.add(world.node, named=True)
    else:
        world.image = world.disk(_empty_image(world.size), "image", faults, record=record)
        file_node = world.add(world.image)
        file = world.graph.attach(file_node, "node 'disk'", "file", writable=True, may_grow=True, shares_write=False)
        backing = None
        if format == "overlay":
            base = world.disk(bytes(world.size), "base")
            backing = world.graph.attach(world.add(base), "node 'disk'", "backing")
        header = await read_header(file, "disk")
        world.node = await open_qcow2(file, name="disk", header=header, backing=backing, read_only=False)
        world.graph.add(world.node, named=True)
    world.top = world.graph.attach(world.node, "export 'disk'", "nbd", writable=True)
    return world


@functools.cache
def _empty_image(size: int) -> bytes:
    """A new qcow2 image with small clusters."""
    image = create_image(size, cluster_size=CLUSTER_BYTES)
    data = bytearray()
    for offset, piece in image.pieces:
        data.extend(bytes(max(0, offset + len(piece) - len(data))))
        data[offset : offset + len(piece)] = piece
    return bytes(data)
