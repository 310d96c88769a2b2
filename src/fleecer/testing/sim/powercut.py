"""Power cuts: everything a qcow2 image may hold after one, at every moment of a small workload, opened and judged.

A workload is up to three operations of a guest, in turn or at once, or two guests who flush what they did, or up to two
operations by requests that are done inside their call, as in the page cache; on

    fresh      an image in which nothing was ever written
    used       one whose clusters are all there
    unmap      the same, and what is freed is discarded in the file
    backing    one with a backing file
    snapshot   one with a snapshot active
    raw        a raw disk over NBD, where flushes come by a connection of their own

The simulated disk logs what was submitted, took effect and became durable; each moment of that log is a moment for a
cut, and each cut leaves any subset of what was in doubt (disk.py).

A raw medium is good if it reads as the oracle allows, a qcow2 one if
- its refcounts are nowhere too low, and nothing is referenced twice (leaked clusters are allowed);
- it opens for writing;
- every sector reads as the oracle allows: nothing that was flushed is lost, nothing torn, nobody else's data;
- it can be written to, and is sound after that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from fleecer.block.edge import Edge
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import check_qcow2, open_qcow2, read_header
from fleecer.errors import FleecerError
from fleecer.testing.sim.disk import SimDisk
from fleecer.testing.sim.loop import simulate
from fleecer.testing.sim.oracle import SECTOR_BYTES, Violation, stamp
from fleecer.testing.sim.world import OF_BASE, Format, Medium, World, make_world

Setting = Literal["fresh", "used", "unmap", "backing", "snapshot", "raw", "subclusters"]
OPERATIONS = ("write 0 8", "write 4 12", "zero 0 16", "discard 0 8", "flush", "fua 4 12")
_DURABLE = ("fzero 0 16", "fzero 4 8")
_INLINE_MAX = 2
_CHANGES = ("write 0 8", "write 4 12", "zero 0 16", "discard 0 8", "write 8 16")
SETTINGS: tuple[Setting, ...] = get_args(Setting)
_FORMATS: dict[Setting, Format] = {"backing": "overlay", "raw": "raw", "subclusters": "overlay"}  # else qcow2
EXHAUSTIVE_SECTORS_MAX = 8
SAMPLES = 16
_NEW = 1 << 41  # number of what is written after the cut


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What a guest does until the power goes. An operation may be several, one after the other: "write 0 8, flush"."""

    setting: Setting
    operations: tuple[str, ...]
    at_once: bool
    inline: float = 0.0
    seed: int = 0


@dataclasses.dataclass(slots=True)
class Judged:
    """What came of a workload: how many media of how many moments were judged, what was wrong with the first bad."""

    workload: Workload
    states: int = 0
    moments: int = 0
    error: str = ""


def workloads(size: int) -> Iterator[Workload]:
    """Every workload of up to `size` operations."""
    for setting in SETTINGS:
        for count in range(1, size + 1):
            for operations in itertools.product(OPERATIONS, repeat=count):
                yield Workload(setting, operations, at_once=False)
            for operations in itertools.combinations_with_replacement(OPERATIONS, count) if count > 1 else ():
                yield Workload(setting, operations, at_once=True)
        for count in range(1, min(size, _INLINE_MAX) + 1):
            for operations in itertools.product((*OPERATIONS, *_DURABLE), repeat=count):
                yield Workload(setting, operations, at_once=False, inline=1.0)
                if not set(OPERATIONS).issuperset(operations):
                    yield Workload(setting, operations, at_once=False)


def duets() -> Iterator[Workload]:
    """Every workload of two guests at once, of whom one does something and flushes, the other two things.

    Commits are the same with subclusters.
    """
    for setting in (setting for setting in SETTINGS if setting != "subclusters"):
        for one, *two in itertools.product(_CHANGES, repeat=3):
            yield Workload(setting, (f"{one}, flush", f"{two[0]}, {two[1]}, flush"), at_once=True)


def judge_workload(
    workload: Workload,
    *,
    exhaustive_up_to: int = EXHAUSTIVE_SECTORS_MAX,
    samples: int = SAMPLES,
    look: Callable[[bytearray], None] | None = None,
) -> Judged:
    """Runs the workload and judges every medium that a cut may leave; stops at the first bad one.

    Where more than `exhaustive_up_to` sectors are in doubt only some media are tried; see `SimDisk.crash_states`.
    `look` is shown every medium, good or not, before it is judged.
    """
    judged = Judged(workload)
    world = simulate(_run(workload))
    try:
        simulate(_judge_all(world, judged, exhaustive_up_to, samples, look))
    except (Violation, FleecerError) as error:
        judged.error = f"{type(error).__name__}: {error}"
    return judged


async def _run(workload: Workload) -> World:
    world = await make_world(
        random.Random(workload.seed),
        format=_FORMATS.get(workload.setting, "qcow2"),
        medium=Medium(record=True),
        over_nbd=workload.setting == "raw",
        unmap=workload.setting == "unmap",
        extended_l2=workload.setting == "subclusters",
    )
    world.history.clock = lambda: world.image.position
    if workload.setting == "snapshot":
        await world.write(0, 8)
        await world.flush()
        await world.take()
    elif workload.setting in ("used", "unmap"):
        await world.write(0, 16)
        await world.flush()
    world.do_at_once(workload.inline)
    steps = [_step(world, operation) for operation in workload.operations]
    if workload.at_once:
        await asyncio.gather(*steps)
    else:
        for step in steps:
            await step
    return world


async def _step(world: World, operations: str) -> None:
    for operation in operations.split(", "):
        kind, *words = operation.split()
        await getattr(world, kind)(*map(int, words))


async def _judge_all(
    world: World, judged: Judged, exhaustive_up_to: int, samples: int, look: Callable[[bytearray], None] | None
) -> None:
    generator = random.Random(judged.workload.seed)
    seen: set[tuple[bytes, int]] = set()
    for moment in range(world.image.position + 1):
        judged.moments += 1
        flushed = world.history.flushes_before(moment)
        for medium in world.image.crash_states(
            generator, at=moment, exhaustive_up_to=exhaustive_up_to, samples=samples
        ):
            key = hashlib.blake2b(medium, digest_size=16).digest(), flushed
            if key in seen:
                continue
            seen.add(key)
            judged.states += 1
            if look is not None:
                look(medium)
            try:
                await judge_medium(world, medium, moment, write_too=judged.states % 4 == 0)
            except Violation as error:
                raise Violation(f"cut at {moment} of {world.image.position}: {error}") from error


async def judge_medium(world: World, medium: bytearray, moment: int, *, write_too: bool = False) -> None:
    """Raises Violation, or FleecerError, unless a medium that a cut at `moment` left is good."""
    if world.node.driver != "qcow2":
        world.history.check_after_cut(moment, bytes(medium))
        return
    disk = SimDisk(medium, world.generator, name="medium", latency=lambda: 0.0, tearing=False, inline=1.0)
    await _check(disk)
    file = Edge(FileNode("medium", disk), "judge", "file", writable=True, may_grow=True)
    backing = None
    if judged_backing := _base(world):
        backing = Edge(FileNode("base", judged_backing), "judge", "backing")
    node = await open_qcow2(
        file, name="medium", header=await read_header(file, "medium"), backing=backing, read_only=False
    )
    edge = Edge(node, "judge", "disk", writable=True)
    world.history.check_after_cut(moment, bytes(await edge.pread(0, world.size)))
    if write_too:
        sectors = range(2, 11)
        new = b"".join(stamp(_NEW, sector) for sector in sectors)
        await edge.pwrite(sectors.start * SECTOR_BYTES, new)
        if bytes(await edge.pread(sectors.start * SECTOR_BYTES, len(new))) != new:
            raise Violation("what is written after the cut does not read back")
    await node.close()
    if write_too:
        await _check(disk)


async def _check(disk: SimDisk) -> None:
    report = await check_qcow2(Edge(FileNode("medium", disk), "check", "file"), "medium")
    if report.corruptions:
        raise Violation(f"the image is unsound: {report.messages}")


def _base(world: World) -> SimDisk | None:
    if not any(disk.name == "base" for disk in world.disks):
        return None
    content = b"".join(stamp(OF_BASE, sector) for sector in range(world.history.sectors))
    return SimDisk(content, world.generator, name="base", latency=lambda: 0.0, tearing=False, inline=1.0)
