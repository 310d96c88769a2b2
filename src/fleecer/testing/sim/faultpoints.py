"""Faults: every request to a disk in a small program fails in every way, once or for good; every wait is cancelled.

What must hold, besides what the oracles say:
- A guest's request fails only if a disk that its own data is on failed, or if it was cancelled itself.
- It is not held up by a failing or stalled scratch for longer than the copy timeout allows.
- A snapshot that cannot be kept breaks, and says why; every other goes on. Where the guest is to give way instead, its
  request fails, and none breaks.
- A flush that failed is never taken back: what was flushed, and only that, survives a power cut after it.
- When faults stop, everything ends: no request, task, job, filter or claim stays behind.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from typing import get_args

from fleecer.block.copier import OnError
from fleecer.testing.sim.cases import OPERATORS, Actors, Case, Scheme, play, start_actors
from fleecer.testing.sim.disk import STALL_S, Faults, Kind
from fleecer.testing.sim.loop import NamedLoop, simulate
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.powercut import judge_medium
from fleecer.testing.sim.world import Format, Medium, World

COPY_TIMEOUT_S = 15.0
_LONG_TIMEOUT_S = 120.0
"""Where guests give way: so that some of their requests still wait when a stalled copy ends."""
_OWN_DISKS = ("disk", "image", "base")
"""Where a guest's own data is."""
_WAYS: tuple[Kind, ...] = ("EIO", "ENOSPC", "short", "stall")
_CUTS = 4
SEEDS = 5
"""How often each program is run, with other times."""
FAILURES_MAX = 10
_PATIENCE = 4
"""How many timeouts a change may take: it waits for copies, and for readers; each has one, and disks take time too."""


@dataclasses.dataclass(frozen=True, slots=True)
class FaultPoint:
    """One fault of one run: at request `number` of `disk`; where `disk` is an actor, a cancel at that wait of it.

    `then` is what becomes of the disk's next request.
    """

    case: Case
    disk: str
    number: int
    way: str
    for_good: bool = False
    then: str = ""

    @property
    def ways(self) -> set[str]:
        """All that goes wrong."""
        return {self.way, self.then} - {""}

    @property
    def at(self) -> dict[int, Kind]:
        """What becomes of which request."""
        kinds: dict[int, Kind] = {self.number: self.way}  # type: ignore[dict-item]
        if self.then:
            kinds[self.number + 1] = self.then  # type: ignore[assignment]
        return kinds

    def __str__(self) -> str:
        lasting = " for good" if self.for_good else f", then {self.then}" if self.then else ""
        return f"{self.way}{lasting} at {self.number} of {self.disk}, in {self.case.to_json()}"


def late_programs() -> Iterator[Case]:
    """Programs in which readers of snapshots are at the disk before guests change it, and those who flush together."""
    guests = (
        ("read 0 16", "read 0 16", "read 0 16", "write 0 8", "flush"),
        ("read 0 16", "read 0 16", "read 0 16", "discard 8 16", "write 9 12"),
    )
    readers = (("sread 0 0 16", "sstatus 0 0 16", "sread 0 0 16"), ("sread 0 8 16", "sread 0 8 16", "sstatus 0 8 16"))
    formats: tuple[Format, ...] = ("bare", "raw", "qcow2")
    for disk_format, (seed, reader) in itertools.product(formats, enumerate(readers)):
        yield Case(
            disk_format,
            2,
            ("access",),
            (*guests, reader),
            seed=seed,
            inline=0.5 * seed,
            copy_timeout_s=COPY_TIMEOUT_S,
        )
    for disk_format in formats:
        both = (("sread 0 0 16", "sread 0 0 8"), ("sread 1 0 16", "sread 1 0 8"))
        changes = (("read 0 16", "read 0 16", "write 0 8"),)
        yield Case(disk_format, 2, ("access", "access"), (*changes, *both), copy_timeout_s=COPY_TIMEOUT_S)
    for disk_format, seed in itertools.product(formats, range(3)):
        flushes = (("write 0 4", "flush", "flush"), ("write 8 12", "flush"), ("fua 4 8", "fzero 12 16"))
        yield Case(disk_format, 2, (), flushes, seed=seed, inline=0.5, copy_timeout_s=COPY_TIMEOUT_S)


def backup_programs() -> Iterator[Case]:
    """Programs in which guests write while the disk is copied, to a new target or a used one."""
    guests = (("write 0 8", "zero 4 16", "write 2 6"), ("write 9 12", "flush", "discard 8 16", "read 0 16"))
    ways: tuple[tuple[str, OnError], ...] = (("backup", "break-snapshot"), ("rebackup", "break-guest-write"))
    for disk_format, (seed, (operator, gives_way)) in itertools.product(get_args(Format), enumerate(ways)):
        yield Case(
            disk_format,
            3,
            (),
            (*guests, (operator,)),
            seed=seed,
            inline=0.5 * seed,
            filled=8,
            copy_timeout_s=_LONG_TIMEOUT_S if seed else COPY_TIMEOUT_S,
            on_error=gives_way,
        )


def programs() -> Iterator[Case]:
    """All of them."""
    yield from late_programs()
    yield from backup_programs()
    yield from mixed_programs()


def mixed_programs() -> Iterator[Case]:
    """Small programs in which guests, readers and an operator meet, on every format, for each scheme.

    Snapshots give way in one half of them, guests in the other.
    """
    guests = (
        ("write 0 8", "zero 4 16", "flush", "write 2 6"),
        ("blank 8 16", "write 9 12", "flush", "discard 8 16", "read 0 16"),
    )
    readers = (("sstatus 0 8 16", "sread 0 0 16", "sstatus 0 0 16", "sread 0 4 12"),)
    for seed in range(SEEDS):
        gives_way: OnError = "break-guest-write" if seed % 2 else "break-snapshot"
        operators: dict[Scheme, tuple[str, ...]] = {
            "access": ("sstart", "sstop") if seed in (0, 3) else ("sstart",),
            "target": ("sstart", "jcancel"),
        }
        for disk_format in get_args(Format):
            for scheme, operator in operators.items():
                yield Case(
                    disk_format,
                    2,
                    ("access", "access") if scheme == "access" and not seed % 2 else (scheme,),
                    (*guests, *readers, operator),
                    seed=seed,
                    filled=0 if disk_format == "overlay" else -1,  # so that the base is read
                    copy_timeout_s=_LONG_TIMEOUT_S if seed % 2 else COPY_TIMEOUT_S,
                    on_error=gives_way,
                    unmap=seed % 2 == 0,
                )


@dataclasses.dataclass(slots=True)
class FaultRuns:
    """What runs with faults came to."""

    runs: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    failed: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: FaultRuns) -> None:
        """Counts other runs in."""
        self.runs += other.runs
        self.virtual_s += other.virtual_s
        self.cpu_s += other.cpu_s
        self.failed += other.failed


def run_fault_points(case: Case, *, every: int = 1, failures_max: int = FAILURES_MAX) -> FaultRuns:
    """Runs the case with each of its faults, or one in `every`; up to `failures_max` failures."""
    total = FaultRuns()
    began = time.process_time()
    for point in itertools.islice(fault_points(case), case.seed % every, None, every):
        try:
            total.virtual_s += run_fault_point(point).time()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            total.failed.append(f"{point}: {type(error).__name__}: {error}")
            if len(total.failed) >= failures_max:
                break
        total.runs += 1
    total.cpu_s = time.process_time() - began
    return total


def fault_points(case: Case) -> Iterator[FaultPoint]:
    """Every fault of the case, of each kind: what happens without one is looked at first."""
    loop = NamedLoop()
    began: dict[str, int] = {}
    faults = {name: Faults() for name in _disk_names(case)}

    async def counted(world: World, actors: Actors) -> None:
        began.update({name: fault.seen for name, fault in faults.items()})
        await asyncio.gather(*start_actors(actors))

    simulate(play(case, run=counted, medium=Medium(faults=faults)), loop=loop)
    for name, fault in faults.items():
        for number in range(began[name], fault.seen):
            for way in _WAYS:
                for for_good in (False, True) if way != "short" else (False,):
                    yield FaultPoint(case, name, number, way, for_good)
            if name not in _OWN_DISKS:
                yield FaultPoint(case, name, number, "stall", then="EIO")
    for actor, operations in enumerate(case.actors):
        if operations[0].split()[0] in OPERATORS:
            continue  # that a cut and its end bear being cancelled is tested where both are whole: daemon/snapshots.py
        for number in range(loop.order.count(f"actor {actor}")):
            yield FaultPoint(case, f"actor {actor}", number, "cancel")


def _disk_names(case: Case) -> list[str]:
    own = {"qcow2": ["image"], "overlay": ["image", "base"]}.get(case.format, ["disk"])
    held = [
        f"{'scratch-s' if scheme == 'access' else 'target-b'}{serial}" for serial, scheme in enumerate(case.held, 1)
    ]
    return [*own, *held, f"scratch-s{len(held) + 1}", f"target-f{len(held) + 1}"]


def run_fault_point(point: FaultPoint) -> NamedLoop:
    """Runs the case with this fault. Raises Violation, or what else went wrong. Returns the loop, for its figures."""
    loop = NamedLoop(steps_max=20_000)
    cancels = point.way == "cancel"
    faults = Faults(at={} if cancels else point.at, for_good=point.for_good)
    medium = Medium(faults={} if cancels else {point.disk: faults}, record=True)

    async def with_fault(world: World, actors: Actors) -> None:
        world.history.clock = lambda: world.image.position
        tasks = start_actors(actors)
        if cancels:
            loop.at_step(point.disk, point.number, lambda: _cancel(tasks, point.disk))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if isinstance(result, BaseException) and not (cancels and point.disk == f"actor {number}"):
                raise result
        _judge(point, world)
        faults.stop()

    world = simulate(play(point.case, run=with_fault, medium=medium), loop=loop)
    _judge_flushes(world)
    return loop


def _cancel(tasks: list[asyncio.Task[None]], name: str) -> None:
    next(task for task in tasks if task.get_name() == name).cancel()


def _judge(point: FaultPoint, world: World) -> None:
    own = point.disk in _OWN_DISKS
    gives_way = point.case.on_error == "break-guest-write"
    may_fail = (point.ways & {"EIO", "ENOSPC"} and (own or gives_way)) or ("stall" in point.ways and gives_way)
    if world.guest_failures and not may_fail:
        raise Violation(f"{world.guest_failures} requests of guests failed, though their own disk did not")
    patience_s = _PATIENCE * point.case.copy_timeout_s
    if "stall" not in point.ways:
        patience_s = point.case.copy_timeout_s  # where every disk answers, nobody waits until time runs out
    elif own and not _only_reads_stall(point, world):
        patience_s += STALL_S * 20
    if world.slowest_s > patience_s:
        raise Violation(f"a guest's request took {world.slowest_s:.0f} s")
    for held in world.held:
        broken = held.snapshot.broken
        if broken is None:
            continue
        if not broken.cause:
            raise Violation(f"{held.name} is broken and does not say why")
        if gives_way or point.way in ("short", "cancel"):
            raise Violation(f"{held.name} broke for nothing: {broken.cause}")
        if not own and not point.disk.endswith(f"-{held.name}"):
            raise Violation(f"{held.name} broke for what {point.disk} did: {broken.cause}")


def _only_reads_stall(point: FaultPoint, world: World) -> bool:
    """Whether nothing that a change needs of its own disk stalls: no claims are there, and only reads take long."""
    return point.case.format == "bare" and all(
        hit.startswith("read:") for disk in world.disks if disk.faults is not None for hit in disk.faults.hit
    )


def _judge_flushes(world: World) -> None:
    """What was said to be flushed is there after a power cut, and the image is sound."""

    async def judge() -> None:
        for medium in world.image.crash_states(random.Random(1), exhaustive_up_to=2, samples=_CUTS):
            await judge_medium(world, medium, world.image.position)

    simulate(judge())
