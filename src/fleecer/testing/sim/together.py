"""Two disks cut at one instant: whatever was written to the second had been written to the first before.

A guest writes the same number to one disk and then, when that has returned, to the other, again and again, while
snapshots of both are taken together, by two operators who get in each other's way. Others write beside it, so that
there is something to wait for. In each of these the first disk is as far as the second, or one write ahead; and
neither lacks what had returned before the snapshot was asked for, nor has what was not yet begun when it was there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random

from fleecer.block.edge import Edge
from fleecer.block.fleecing import Fleece, Plan, cut, uncut
from fleecer.block.graph import SNAPSHOT_ROLE, Graph
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.testing.sim.cases import draw_scheduler
from fleecer.testing.sim.disk import SimDisk
from fleecer.testing.sim.loop import simulate
from fleecer.testing.sim.oracle import SECTOR_BYTES, Violation, read_stamp, stamp
from fleecer.testing.sim.world import CLUSTER_BYTES

_WRITES = 8
_CUTS = 3
_PAUSE_S = 2e-3  # about as long as a few requests take


@dataclasses.dataclass(slots=True)
class _Progress:
    """How far the guest is: the number it began to write last, and those that were written last to each disk."""

    begun: int = 0
    written: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    over: bool = False


class _Pair:
    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.graph = Graph()
        self.progress = _Progress()
        self.disks = [self.graph.attach(self._node(f"disk {n}"), f"export {n}", "nbd", writable=True) for n in (0, 1)]

    def _node(self, name: str) -> FileNode:
        node = FileNode(name, SimDisk(CLUSTER_BYTES, self.generator, name=name))
        self.graph.add(node, named=False)
        return node

    async def write(self) -> None:
        """The guest."""
        progress = self.progress
        for number in range(1, _WRITES + 1):
            progress.begun = number
            for which, disk in enumerate(self.disks):
                await disk.pwrite(0, stamp(number, 0))
                progress.written[which] = number
        progress.over = True

    async def write_beside(self, disk: Edge) -> None:
        """Another guest, of one disk."""
        while not self.progress.over:
            await disk.pwrite(SECTOR_BYTES, stamp(1, 1))

    async def snapshot(self, name: str) -> None:
        """Takes a snapshot of both disks, and checks it."""
        oldest = list(self.progress.written)
        plans = [self._plan(disk, f"{which}.{name}") for which, disk in enumerate(self.disks)]
        fleeces = await cut(self.graph, plans, timeout_s=1e9)
        newest = self.progress.begun
        found = [await self._read(fleece) for fleece in fleeces]
        for fleece in fleeces:
            await uncut(self.graph, fleece)
        first, second = found
        if not second <= first <= second + 1:
            raise Violation(f"snapshot {name} has write {first} on the first disk and {second} on the second")
        if first < oldest[0] or second < oldest[1] or first > newest:
            raise Violation(f"snapshot {name} has writes {found}; {oldest} had returned, {newest} was begun")

    def _plan(self, disk: Edge, name: str) -> Plan:
        scratch = self.graph.attach(self._node(f"scratch {name}"), f"snapshot {name}", "scratch", writable=True)
        return Plan(disk.node, scratch, name, fresh=True, share=True, cluster_size_bytes=CLUSTER_BYTES)

    async def _read(self, fleece: Fleece) -> int:
        below = self.graph.attach(fleece.filter, "reader", SNAPSHOT_ROLE)
        access = SnapshotAccessNode(self.graph.fresh_name(), below, fleece.copier, fleece.snapshot)
        self.graph.add(access, named=False)
        reader = self.graph.attach(access, "reader", "nbd")
        await asyncio.sleep(self.generator.random() * _PAUSE_S)
        number = read_stamp(bytes(await reader.pread(0, SECTOR_BYTES)), 0)
        await self.graph.drain_and_detach(reader)
        return number

    async def operate(self, name: str) -> int:
        """An operator. Returns how many snapshots were asked for while writes went on."""
        in_time = 0
        for serial in range(_CUTS):
            await asyncio.sleep(self.generator.random() * _PAUSE_S)
            in_time += not self.progress.over
            await self.snapshot(f"{name}{serial}")
        return in_time


async def _play(seed: int) -> int:
    pair = _Pair(seed)
    guests = asyncio.gather(pair.write(), *(pair.write_beside(disk) for disk in pair.disks))
    in_time = await asyncio.gather(pair.operate("a"), pair.operate("b"))
    await guests
    for disk in pair.disks:
        await pair.graph.drain_and_detach(disk)
    await pair.graph.close()
    return sum(in_time)


def run_together(seed: int) -> int:
    """One schedule. Raises Violation, or what else goes wrong. Returns how many cuts were made while writes went on."""
    return simulate(_play(seed), draw_scheduler(seed))
