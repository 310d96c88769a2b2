"""One live disk, its guests, its snapshots by both schemes, and their readers, over simulated disks, with an oracle.

The block graph, copier, qcow2 and jobs are the real ones. A `World` lives in one run of a `SimLoop`; the operations
here are what a schedule is made of. Each checks what it gets against the oracle and raises `Violation`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal

from fleecer.block.copier import OnError, Snapshot
from fleecer.block.edge import Edge
from fleecer.block.fleecing import Fleece, Plan, cut, uncut
from fleecer.block.graph import SNAPSHOT_ROLE, Graph
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, merge_extents
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.nbd import NbdNode
from fleecer.block.nodes.qcow2 import check_qcow2, open_qcow2, read_header
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.errors import FleecerError, JobError
from fleecer.export import Export
from fleecer.export.server import Server
from fleecer.formats.qcow2.create import create_image
from fleecer.formats.qcow2.subclusters import SUBCLUSTERS
from fleecer.jobs import BackupJob, BackupRequest, JobTable, start_backups
from fleecer.net.nbd_client import NbdClient
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce
from fleecer.storage.lanes import Result, settle
from fleecer.testing.sim.disk import STALL_S, Faults, Latency, SimDisk
from fleecer.testing.sim.loop import SimLoop
from fleecer.testing.sim.oracle import SECTOR_BYTES, Change, History, SnapshotOracle, Violation, stamp
from fleecer.testing.streams import BUFFER_BYTES, memory_streams

CLUSTER_BYTES = 4096
_TEAR_BYTES = SECTOR_BYTES // 8
OF_BASE = 1 << 40
"""The number that the sectors of an overlay's backing file bear."""
OF_OTHERS = 1 << 42
"""The number that the sectors of a backup's target bear that was used before."""
SECTORS_PER_CLUSTER = CLUSTER_BYTES // SECTOR_BYTES

Format = Literal["raw", "bare", "blocks", "qcow2", "overlay"]
"""bare: raw, on a node that keeps no claims of its own; blocks: raw, on a disk that takes whole clusters only."""


@dataclasses.dataclass(slots=True)
class Held:
    """A snapshot somebody may read, by its `door`: through snapshot-access, or through the target of a job."""

    name: str
    edge: Edge
    door: Edge
    oracle: SnapshotOracle
    snapshot: Snapshot
    fleece: Fleece
    job: BackupJob | None = None
    readers: int = 0
    ending: bool = False


class World:
    """The disk and what is done with it. Made by `make_world`."""

    def __init__(self, generator: random.Random, clusters: int, medium: Medium, trace: list[str] | None) -> None:
        self.generator = generator
        self.size = clusters * CLUSTER_BYTES
        self.history = History(clusters * SECTORS_PER_CLUSTER)
        self.graph = Graph()
        self.jobs = JobTable()
        self.server: Server | None = None
        self.room_bytes = BUFFER_BYTES  # what a connection takes before its reader reads
        self.extended_l2 = False  # whether qcow2 images have subclusters
        self.held: list[Held] = []
        self.disks: list[SimDisk] = []
        self.image: SimDisk
        self.node: Node
        self.edge: Edge  # what the disk's export holds
        self.top: Edge  # what the guest holds: the same, or the far end of a connection to that
        self.side: Edge  # where its flushes go: the same, or a connection of their own
        self.guest_failures = 0
        self.copy_timeout_s = 0.0
        self.on_error: OnError = "break-snapshot"
        self.faults = medium.faults
        self.slowest_s = 0.0  # the longest that a guest's request took
        self.records = medium.record
        self.own_nodes: list[Node] = []  # the disk's
        self._medium = medium
        self._inline = 0.0
        self._trace = trace
        self._serial = 0

    def say(self, line: str) -> None:
        """Adds a line to the story."""
        if self._trace is not None:
            self._trace.append(line)

    def do_at_once(self, inline: float) -> None:
        """From now on this part of the requests is done at once, on every disk there is and will be."""
        self._inline = inline
        for disk in self.disks:
            disk.inline = inline

    def disk(
        self,
        content: int | bytes,
        name: str,
        *,
        record: bool = False,
        tear_bytes: int = _TEAR_BYTES,
        alignment_bytes: int = 1,
    ) -> SimDisk:
        """A new simulated disk. Requests tear within sectors, as a rule: the node above keeps them apart."""
        medium = self._medium
        disk = SimDisk(
            content,
            self.generator,
            name=name,
            latency=medium.latency() if medium.latency is not None else None,
            faults=self.faults.get(name),
            record=record,
            tearing=medium.tearing,
            tear_bytes=tear_bytes,
            alignment_bytes=alignment_bytes,
            inline=self._inline,
            trace=self._trace.append if self._trace is not None else None,
        )
        self.disks.append(disk)
        return disk

    def empty_image(self) -> bytes:
        """A new qcow2 image for a disk as large as this one."""
        return _empty_image(self.size, self.extended_l2)

    async def door(self, name: str, edge: Edge) -> Edge:
        """A client's way to what `edge` leads to: the edge itself, or a connection to an export of it."""
        if self.server is None:
            return edge
        self.server.add(Export(name, name, edge))
        return await self.connect(name, edge)

    async def connect(self, name: str, edge: Edge) -> Edge:
        """One more connection to an export, that of `edge`; the edge itself without a server."""
        if self.server is None:
            return edge
        near, far = memory_streams(buffer_bytes=self.room_bytes)
        self.server.serve(near)
        client = await NbdClient.connect(far, name)
        return Edge(NbdNode(name, client), f"client of {name}", "nbd", writable=edge.writable)

    async def shut(self, name: str, door: Edge, edge: Edge) -> None:
        """Ends what `door` made, and the edge. Requests under way end first, or fail."""
        if self.server is not None:
            await self.server.remove(name, hard=True)
            await door.node.close()
        await self.graph.drain_and_detach(edge)

    def add(self, disk: SimDisk) -> Node:
        """A node over a simulated disk, in the graph until its last edge goes."""
        node = FileNode(disk.name, disk)
        self.graph.add(node, named=False)
        return node

    # Guests.

    async def write(self, first: int, end: int, *, edge: Edge | None = None, fua: bool = False) -> None:
        """Writes sectors [first, end), each with the number of this write; with `fua` durably."""
        change = self.history.begin(first, end, lingers=fua)
        self.say(f"guest writes {change.number} to sectors {first}..{end - 1}")
        data = b"".join(stamp(change.number, sector) for sector in range(first, end))
        await self._change(change, (edge or self.top).pwrite(first * SECTOR_BYTES, data, fua))

    async def fua(self, first: int, end: int) -> None:
        """Writes durably."""
        await self.write(first, end, fua=True)

    async def anew(self, first: int, end: int) -> None:
        """Writes as somebody does who comes for that and goes again."""
        edge = self.graph.attach(self.graph.top(self.node), "export 'anew'", "nbd", writable=True)
        try:
            await self.write(first, end, edge=edge)
        finally:
            await self.graph.drain_and_detach(edge)

    async def zero(self, first: int, end: int, *, unmap: bool = True, fua: bool = False) -> None:
        """Writes zeroes; with `fua` durably."""
        change = self.history.begin(first, end, zero=True, lingers=fua)
        self.say(f"guest zeroes sectors {first}..{end - 1}")
        await self._change(change, self.top.zero(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES, unmap, fua))

    async def fzero(self, first: int, end: int) -> None:
        """Writes zeroes durably."""
        await self.zero(first, end, fua=True)

    async def blank(self, first: int, end: int) -> None:
        """Writes zeroes, and keeps the space."""
        await self.zero(first, end, unmap=False)

    async def discard(self, first: int, end: int) -> None:
        """Discards."""
        change = self.history.begin(first, end, discard=True)
        self.say(f"guest discards sectors {first}..{end - 1}")
        await self._change(change, self.top.discard(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES))

    async def _change(self, change: Change, request: Coroutine[Any, Any, None]) -> None:
        began_s = self._now_s()
        try:
            await request
        except (FleecerError, asyncio.CancelledError) as error:
            self.history.finish(change, failed=True)
            if not isinstance(error, FleecerError):
                raise
            self.guest_failures += 1
            self.say(f"  which fails: {error}")
        else:
            self.history.finish(change)
            if change.lingers:  # it was to be durable when it returns
                self.history.finish_flush([change])
            self.say(f"  change of sectors {change.first}..{change.end - 1} done")
        finally:
            self.slowest_s = max(self.slowest_s, self._now_s() - began_s)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()

    async def read(self, first: int, end: int) -> None:
        """Reads, and checks what comes."""
        began = self.history.begin_read()
        try:
            data = await _read(self.top, first, end)
        except FleecerError as error:
            self.guest_failures += 1
            self.say(f"guest's read fails: {error}")
            return
        self.history.check_read(first * SECTOR_BYTES, data, began)

    async def flush(self) -> None:
        """Flushes; some as a connection does it, which begins them without a coroutine where that can be."""
        covered = self.history.begin_flush()
        outcome = Result[None](loop=asyncio.get_running_loop())
        try:
            if len(covered) % 2 and self.side.begin_flush(functools.partial(settle, outcome, None)):
                await outcome
            else:
                await self.side.flush()
        except FleecerError as error:
            self.guest_failures += 1
            self.say(f"guest's flush fails: {error}")
        else:
            self.history.finish_flush(covered)
            self.say("guest has flushed")

    # Snapshots.

    async def take(self, scratch: SimDisk | None = None) -> Held:
        """A snapshot read through snapshot-access."""
        self._serial += 1
        name = f"s{self._serial}"
        disk = scratch or self.disk(self.size, f"scratch-{name}")
        edge = self.graph.attach(self.add(disk), f"snapshot {name}", "scratch", writable=True)
        plan = Plan(
            self.edge.node,
            edge,
            name,
            fresh=True,
            share=True,
            timeout_s=self.copy_timeout_s,
            on_error=self.on_error,
            cluster_size_bytes=CLUSTER_BYTES,
        )
        try:
            (fleece,) = await cut(self.graph, [plan], timeout_s=1e9)
        except BaseException:
            await self.graph.drain_and_detach(edge)
            raise
        oracle = SnapshotOracle(name, self._image())
        self.say(f"snapshot {name} taken")
        below = self.graph.attach(fleece.filter, f"snapshot {name}", SNAPSHOT_ROLE)
        access = SnapshotAccessNode(self.graph.fresh_name(), below, fleece.copier, fleece.snapshot)
        self.graph.add(access, named=False)
        reader = self.graph.attach(access, f"export {name}", "nbd")
        held = Held(name, reader, await self.door(name, reader), oracle, fleece.snapshot, fleece)
        return self._hold(held)

    async def fleece(
        self, target: SimDisk | None = None, *, depth: int = 0, sync: Literal["none", "full"] = "none"
    ) -> Held:
        """A snapshot by the first scheme: a qcow2 image over the live disk, kept true by a backup job.

        `depth` empty images are between the two. A `full` job copies all of the disk besides, and ends by itself.
        """
        self._serial += 1
        name = f"b{self._serial}"
        below = self.node
        for level in range(depth):
            middle = self.disk(self.empty_image(), f"middle-{name}-{level}")
            below = await self._overlay(f"{name}-{level}", middle, below, read_only=True)
        disk = target or self.disk(self.empty_image(), f"target-{name}")
        node = await self._overlay(name, disk, below, read_only=False)
        reader = self.graph.attach(node, f"export {name}", "nbd")
        request = self._request(name, node, sync)
        try:
            (job,) = await start_backups(self.graph, self.jobs, [request], lambda *_: None)
        except BaseException:
            await self.graph.drain_and_detach(reader)
            raise
        oracle = SnapshotOracle(name, self._image())
        self.say(f"job {name} started")
        held = Held(name, reader, await self.door(name, reader), oracle, job.fleece.snapshot, job.fleece, job)
        return self._hold(held)

    async def _overlay(self, name: str, disk: SimDisk, below: Node, *, read_only: bool) -> Node:
        """A qcow2 image over the node `below`, in the graph until its last edge goes."""
        writable = not read_only
        file = self.graph.attach(self.add(disk), f"node {name}", "file", writable=writable, may_grow=writable)
        backing = self.graph.attach(below, f"node {name}", "backing")
        try:
            header = await read_header(file, name)
            node = await open_qcow2(file, name=name, header=header, backing=backing, read_only=read_only)
        except BaseException:
            for edge in (file, backing):
                await self.graph.drain_and_detach(edge)
            raise
        self.graph.add(node, named=False)
        return node

    def _request(self, name: str, target: Node, sync: Literal["none", "full"], *, fresh: bool = False) -> BackupRequest:
        return BackupRequest(
            name,
            self.node,
            target,
            sync,
            fresh=fresh,
            timeout_s=self.copy_timeout_s,
            on_error=self.on_error,
            cluster_size_bytes=CLUSTER_BYTES,
        )

    async def backup(self, *, fresh: bool = True) -> None:
        """Copies the whole disk of an instant, and checks that the copy is that, durably.

        To a new target, or one that holds something else.
        """
        self._serial += 1
        name = f"f{self._serial}"
        used = b"".join(stamp(OF_OTHERS, sector) for sector in range(self.history.sectors))
        disk = self.disk(self.size if fresh else used, f"target-{name}", record=True)
        request = self._request(name, self.add(disk), "full", fresh=fresh)
        (job,) = await start_backups(self.graph, self.jobs, [request], lambda *_: None)
        oracle = SnapshotOracle(name, self._image())
        self.say(f"backup {name} started")
        await job.concluded()
        self.say(f"backup {name} ended {job.error}")
        if not job.error:
            for medium in disk.crash_states(self.generator, exhaustive_up_to=2, samples=4):
                oracle.check_read(0, bytes(medium))
        elif not self.failed():
            raise Violation(f"backup {name} failed: {job.error}")

    async def rebackup(self) -> None:
        """A backup to a target that holds something else."""
        await self.backup(fresh=False)

    def _image(self) -> list[set[int]]:
        """What the disk is now, when a cut has just returned and nothing has run since."""
        return self.history.image(answers_on_the_way=self.server is not None)

    def _hold(self, held: Held) -> Held:
        self.held.append(held)
        return held

    async def read_snapshot(self, held: Held, first: int, end: int) -> None:
        """Reads some of a snapshot, and checks it: the past or an error."""
        held.readers += 1
        try:
            data = await _read(held.door, first, end)
        except FleecerError as error:
            self.say(f"read of {held.name} fails: {error}")
            if not self._may_fail(held):
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
            for extent in await held.door.block_status(offset, (end - first) * SECTOR_BYTES):
                if extent.flags & ZERO:
                    held.oracle.check_zero(offset, extent.length)
                offset += extent.length
        except FleecerError as error:
            if not self._may_fail(held):
                raise Violation(f"the status of the whole snapshot {held.name} failed: {error}") from error
        finally:
            held.readers -= 1

    def _may_fail(self, held: Held) -> bool:
        """Whether a read of the snapshot may fail: something broke, or its connections were cut off as it was ended."""
        is_over = held.ending and (self.server is not None or held.job is not None)
        return held.snapshot.broken is not None or self.failed() or is_over

    async def end(self, held: Held) -> None:
        """Ends a snapshot, its readers' requests in flight first."""
        if held.ending:
            return
        held.ending = True
        self.say(f"{held.name} is being ended")
        self.held.remove(held)
        if held.job is not None:
            with contextlib.suppress(JobError):  # it ended by itself: its target failed
                await held.job.cancel()
            await self.read_snapshot(held, 0, self.history.sectors)  # the present it must not show
            await self.shut(held.name, held.door, held.edge)
        else:
            await self.shut(held.name, held.door, held.edge)
            await uncut(self.graph, held.fleece, timeout_s=1e9)
        self.say(f"{held.name} ended")

    def failed(self) -> bool:
        """Whether any disk had a fault."""
        return any(disk.faults is not None and disk.faults.hit for disk in self.disks)

    # The end.

    async def finish(self) -> None:
        """Reads everything once more, ends the snapshots, and checks that nothing failed for nothing, or is left."""
        sectors = self.history.sectors
        self.do_at_once(1.0)  # what is left has no order of its own to be searched
        await self.read(0, sectors)
        for held in list(self.held):
            await self.read_snapshot(held, 0, sectors)
            await self.end(held)
        await self.flush()
        for _ in range(100):  # what was ended while a disk stalled is given back when that answers
            left = self._left()
            if not left:
                break
            await asyncio.sleep(STALL_S)
        else:
            raise Violation(left)
        if self.guest_failures and not self.failed():
            raise Violation(f"{self.guest_failures} requests of guests failed though no disk did")
        await self.shut("disk", self.top, self.edge)
        if self.side is not self.top:
            await self.side.node.close()
        await self._close()
        if left := self._left():
            raise Violation(left)
        if self.node.driver == "qcow2":
            await self._check_image()
        await self._all_has_ended()

    def _left(self) -> str:
        """What has not gone although every snapshot was ended; "" if all has."""
        if self.edge.node is not self.node:
            return "a filter stays above the disk"
        for edge in self.graph.parents(self.node):
            if edge.busy:
                return f"{edge} has {edge.busy} requests in flight at the end"
        for disk in self.disks:
            if disk.in_flight:
                return f"{disk.name} has {disk.in_flight} requests in flight at the end"
        if foreign := [node.name for node in self.graph.nodes() if node not in self.own_nodes]:
            return f"nodes stay behind: {foreign}"
        return "a job stays behind" if self.jobs.jobs() else ""

    async def _all_has_ended(self) -> None:
        """What was given up may go on for minutes, but not for ever."""
        me, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert isinstance(loop, SimLoop), "a world lives in a simulation"
        for _ in range(100):
            others = [task for task in loop.unfinished() if task is not me]
            if not others:
                return
            await asyncio.sleep(STALL_S)
        raise Violation(f"a task stays behind: {others[0].get_name()}")

    async def _close(self) -> None:
        try:
            await self.graph.close()
        except FleecerError as error:
            if not self.failed():
                raise Violation(f"closing failed: {error}") from error

    async def _check_image(self) -> None:
        storage = SimDisk(bytes(self.image.data), self.generator, name="checked", latency=lambda: 0.0, inline=1.0)
        file = Edge(FileNode("checked", storage), "check", "file")
        report = await check_qcow2(file, "checked")
        if report.corruptions or (report.leaks and not self.failed()):
            raise Violation(f"the image is unsound: {report.messages}")


async def _read(door: Edge, first: int, end: int) -> bytes:
    """Reads sectors; some as a connection does it, which begins them without a coroutine where that can be."""
    offset, length = first * SECTOR_BYTES, (end - first) * SECTOR_BYTES
    outcome = Result[Buffer](loop=asyncio.get_running_loop())
    if first % 2 and door.begin_pread(offset, length, functools.partial(settle, outcome)):
        return bytes(await outcome)
    return bytes(await door.pread(offset, length))


class BareNode(Node):
    """A storage as a node without claims, as a connection to another server is: nothing here hides a race above."""

    driver = "bare"

    __slots__ = ("_poison", "_storage")

    def __init__(self, name: str, storage: SimDisk) -> None:
        super().__init__(name, storage.size, limits=Limits(request_alignment_bytes=1), read_only=False)
        self._poison: FleecerError | None = None
        self._storage = storage

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`."""
        return self._storage.try_pread_into

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`."""
        return self._storage.try_pwrite

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        return await self._storage.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        await self._storage.pwrite(offset, data)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        await self._storage.zero(offset, length, unmap)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        await self._storage.discard(offset, length)

    async def flush(self) -> None:
        """See `Node.flush`. The first that fails is final."""
        if self._poison is None:
            try:
                await self._storage.sync()
            except FleecerError as error:
                self._poison = error
        if self._poison is not None:
            raise self._poison

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`."""
        runs = await self._storage.extents(offset, length)
        return merge_extents([Extent(run, 0 if is_data else HOLE | ZERO) for run, is_data in runs])


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """What the disks of a world are like: how long requests take, and whether they tear.

    `latency` makes a source of times for each disk; None for heavy-tailed ones. `faults` are by name of
    the disk ("image" and "disk" for the guest's, "base", "scratch-s1", "target-b1"), `record` keeps the log of the
    guest's image for power cuts.
    """

    latency: Callable[[], Latency] | None = None
    tearing: bool = True
    faults: Mapping[str, Faults] = dataclasses.field(default_factory=dict)
    record: bool = False


def prompt() -> Medium:
    """Disks that take no time: what comes first is the schedule's choice alone."""
    return Medium(latency=lambda: lambda: 0.0, tearing=False)


async def make_world(
    generator: random.Random,
    *,
    format: Format = "raw",
    clusters: int = 2,
    medium: Medium | None = None,
    over_nbd: bool = False,
    flushes: bool = True,
    unmap: bool = False,
    room_bytes: int = BUFFER_BYTES,
    extended_l2: bool = False,
    trace: list[str] | None = None,
) -> World:
    """A disk of `clusters` clusters of 4 KiB, with no snapshot, and a guest's way to it, `over_nbd` or directly.

    Connections have room for `room_bytes` on the way. Who `flushes` does it by a connection of their own. With `unmap`
    clusters of a qcow2 image that are freed are discarded in its file. With `extended_l2` qcow2 images, also those that
    jobs write to, have subclusters, of a sector each; the disk is one cluster of such an image, or a part of one.
    """
    world = World(generator, clusters, medium or Medium(), trace)
    world.room_bytes = room_bytes
    world.extended_l2 = extended_l2
    record = world.records
    if format in ("raw", "bare", "blocks"):
        world.image = world.disk(
            world.size,
            "disk",
            record=record,
            tear_bytes=SECTOR_BYTES if format == "bare" else _TEAR_BYTES,
            alignment_bytes=CLUSTER_BYTES if format == "blocks" else 1,
        )
        world.node = BareNode("disk", world.image) if format == "bare" else FileNode("disk", world.image)
        world.graph.add(world.node, named=True)
    else:
        world.image = world.disk(world.empty_image(), "image", record=record)
        file_node = world.add(world.image)
        file = world.graph.attach(file_node, "node 'disk'", "file", writable=True, may_grow=True, shares_write=False)
        backing = None
        if format == "overlay":
            base = world.disk(b"".join(stamp(OF_BASE, sector) for sector in range(world.history.sectors)), "base")
            world.history = History(world.history.sectors, dict.fromkeys(range(world.history.sectors), OF_BASE))
            backing = world.graph.attach(world.add(base), "node 'disk'", "backing")
        header = await read_header(file, "disk")
        world.node = await open_qcow2(
            file, name="disk", header=header, backing=backing, read_only=False, discard_freed=unmap
        )
        world.graph.add(world.node, named=True)
    world.own_nodes = world.graph.nodes()
    world.edge = world.graph.attach(world.node, "export 'disk'", "nbd", writable=True)
    world.server = Server(raise_internal_errors=True, clock=asyncio.get_running_loop().time) if over_nbd else None
    world.top = await world.door("disk", world.edge)
    world.side = await world.connect("disk", world.edge) if flushes else world.top
    return world


@functools.cache
def _empty_image(size: int, extended_l2: bool) -> bytes:
    """A new qcow2 image with small clusters, or small subclusters."""
    cluster_size = SUBCLUSTERS * SECTOR_BYTES if extended_l2 else CLUSTER_BYTES
    image = create_image(size, cluster_size=cluster_size, extended_l2=extended_l2)
    data = bytearray()
    for offset, piece in image.pieces:
        data.extend(bytes(max(0, offset + len(piece) - len(data))))
        data[offset : offset + len(piece)] = piece
    return bytes(data)
