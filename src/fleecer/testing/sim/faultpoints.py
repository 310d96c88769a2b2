"""Faults: every request to a disk in a small program fails in every way, once or for good; every wait is cancelled.

What must hold, besides what the oracles say:
- A guest's request fails only if a disk that its own data is on failed, or if it was cancelled itself.
- It is not held up by a failing or stalled scratch for longer than the copy timeout allows.
- A snapshot that cannot be kept breaks, and says why; every other goes on.
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

from fleecer.testing.sim.cases import OPERATORS, Actors, Case, Scheme, play, start_actors
from fleecer.testing.sim.disk import STALL_S, Faults, Kind
from fleecer.testing.sim.loop import NamedLoop, simulate
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.world import Format, Medium, World

COPY_TIMEOUT_S = 15.0
_OWN_DISKS = ("disk", "image", "base")
"""Where a guest's own data is."""
_WAYS: tuple[Kind, ...] = ("EIO", "ENOSPC", "short", "stall")
_CUTS = 4
SEEDS = 5
"""How often each program is run, with other times."""
FAILURES_MAX = 10
_PATIENCE_S = 4 * COPY_TIMEOUT_S
"""A change waits for the copies of its clusters, and for readers; each has the timeout, and disks take time too."""


@dataclasses.dataclass(frozen=True, slots=True)
class FaultPoint:
    """One fault of one run: at request `number` of `disk`; where `disk` is an actor, a cancel at that wait of it."""

    case: Case
    disk: str
    number: int
    way: str
    for_good: bool = False

    def __str__(self) -> str:
        lasting = " for good" if self.for_good else ""
        return f"{self.way}{lasting} at {self.number} of {self.disk}, in {self.case.to_json()}"


def programs() -> Iterator[Case]:
    """Small programs in which guests, readers and an operator meet, on every format, for each scheme."""
    guests = (("write 0 8", "zero 4 16", "flush"), ("discard 8 16", "write 9 12", "flush", "read 0 16"))
    readers = (("sread 0 0 16", "sstatus 0 0 16", "sread 0 4 12"),)
    operators: dict[Scheme, tuple[str, ...]] = {"access": ("sstart", "sstop"), "target": ("jcancel", "sstart")}
    for seed in range(SEEDS):
        for disk_format in get_args(Format):
            for scheme, operator in operators.items():
                actors = (*guests, *readers, operator)
                yield Case(disk_format, 2, (scheme,), actors, seed=seed, filled=8, copy_timeout_s=COPY_TIMEOUT_S)


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


def run_fault_points(case: Case, *, every: int = 1) -> FaultRuns:
    """Runs the case with each of its faults, or one in `every`; up to ten failures."""
    total = FaultRuns()
    began = time.process_time()
    for point in itertools.islice(fault_points(case), case.seed % every, None, every):
        try:
            total.virtual_s += run_fault_point(point).time()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            total.failed.append(f"{point}: {type(error).__name__}: {error}")
            if len(total.failed) >= FAILURES_MAX:
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

    simulate(play(case, run=counted, medium=Medium(inline=case.inline, faults=faults)), loop=loop)
    for name, fault in faults.items():
        for number in range(began[name], fault.seen):
            for way in _WAYS:
                for for_good in (False, True) if way != "short" else (False,):
                    yield FaultPoint(case, name, number, way, for_good)
    for actor, operations in enumerate(case.actors):
        if operations[0].split()[0] in OPERATORS:
            continue  # that a cut and its end bear being cancelled is tested where both are whole: daemon/snapshots.py
        for number in range(loop.order.count(f"actor {actor}")):
            yield FaultPoint(case, f"actor {actor}", number, "cancel")


def _disk_names(case: Case) -> list[str]:
    own = {"raw": ["disk"], "bare": ["disk"], "qcow2": ["image"], "overlay": ["image", "base"]}[case.format]
    held = [("scratch-s" if scheme == "access" else "target-b") + "1" for scheme in case.held]
    return [*own, *held, "scratch-s2"]


def run_fault_point(point: FaultPoint) -> NamedLoop:
    """Runs the case with this fault. Raises Violation, or what else went wrong. Returns the loop, for its figures."""
    loop = NamedLoop(steps_max=200_000)
    cancels = point.way == "cancel"
    faults = Faults(at={point.number: point.way}, for_good=point.for_good)  # type: ignore[dict-item]
    medium = Medium(inline=point.case.inline, faults={} if cancels else {point.disk: faults}, record=True)

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
    if world.guest_failures and not (own and point.way in ("EIO", "ENOSPC")):
        raise Violation(f"{world.guest_failures} requests of guests failed, though their own disk did not")
    if world.slowest_s > _PATIENCE_S + (STALL_S * 20 if own else 0):
        raise Violation(f"a guest's request took {world.slowest_s:.0f} s")
    for held in world.held:
        broken = held.snapshot.broken
        if broken is not None and not broken.cause:
            raise Violation(f"{held.name} is broken and does not say why")
        if broken is not None and point.way in ("short", "cancel"):
            raise Violation(f"{held.name} broke for nothing: {broken.cause}")


def _judge_flushes(world: World) -> None:
    """What was said to be flushed is there after a power cut; of a raw disk, whose medium can be read as it is."""
    if world.node.driver == "qcow2":
        return
    generator = random.Random(1)
    for medium in world.image.crash_states(generator, samples=_CUTS):
        world.history.check_after_cut(world.image.position, bytes(medium))
