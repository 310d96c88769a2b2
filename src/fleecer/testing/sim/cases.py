"""A case: what several actors do to one disk at the same time, drawn from a seed, run, and told.

A case is data, so it can be written down, made smaller and run again:

    {"format": "raw", "clusters": 2, "held": ["access"], "actors": [["write 0 8", "flush"], ["sread 0 0 16"]]}

    write, zero, discard, read FIRST END      a guest, on sectors [FIRST, END)
    fua, anew FIRST END                       a write with FUA; one by a guest who comes and goes
    fzero FIRST END                           zeroes with FUA
    blank FIRST END                           writes zeroes, and keeps the space
    flush                                     a guest
    sread, sstatus WHICH FIRST END            a reader of the snapshot that is WHICH-th in age then
    sstart                                    a snapshot read through snapshot-access
    jstart, fstart                            a backup job into an overlay of the live disk (the first scheme); one that
                                              copies the whole disk there, and ends
    sstop, jcancel [WHICH]                    ends the snapshot or job that is WHICH-th in age then (default 0)
    backup, rebackup                          copies the whole disk of an instant; to a target that was used before

Where there is no such snapshot nothing is done.

Each actor does one thing after the other, all actors at once. `held` are made before, and the first `filled` sectors
written (-1: all). `seed` decides times and tearing; `prompt` gives disks that take no time, so that the schedule alone
decides. `over_nbd` puts a connection between everyone and the disk, with room for `room_bytes` on the way.
`copy_timeout_s` bounds copies; 0: it does not. `on_error` tells what gives way where a copy fails; with `unmap` a qcow2
image discards what it frees; with `extended_l2` qcow2 images have subclusters.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, get_args

from fleecer.block.copier import OnError
from fleecer.errors import FleecerError
from fleecer.testing.sim.loop import Driver, Fifo, NamedLoop, Pct, Scheduler, Shuffle, SimLoop, simulate
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.world import Format, Held, Medium, World, make_world, prompt
from fleecer.testing.streams import BUFFER_BYTES

Scheme = Literal["access", "target"]
GUESTS = ("write", "zero", "discard", "read", "flush", "fua", "blank", "anew", "fzero")
READERS = ("sread", "sstatus")
_CROWDS = 0.2
_ROOMS = (BUFFER_BYTES, BUFFER_BYTES, 3000)
OPERATORS = ("sstart", "sstop", "jstart", "jcancel", "backup", "rebackup", "fstart")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """See the top of this file."""

    format: Format
    clusters: int
    held: tuple[Scheme, ...]
    actors: tuple[tuple[str, ...], ...]
    seed: int = 0
    over_nbd: bool = False
    prompt: bool = False
    inline: float = 0.0
    filled: int = -1
    copy_timeout_s: float = 0.0
    on_error: OnError = "break-snapshot"
    unmap: bool = False
    room_bytes: int = BUFFER_BYTES
    extended_l2: bool = False

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """What `to_json` wrote. Raises ValueError, TypeError for what is none."""
        fields = json.loads(text)
        fields["held"] = tuple(fields["held"])
        fields["actors"] = tuple(tuple(actor) for actor in fields["actors"])
        return cls(**fields)


def draw_case(seed: int) -> Case:
    """A case of a few actors on one to three clusters: small, so that they meet. One in five is a crowd of guests."""
    draw = random.Random(seed)
    (disk_format,) = draw.choices(get_args(Format), (3, 3, 2, 2, 2))
    if draw.random() < _CROWDS:
        return draw_crowd(seed, disk_format)
    clusters = draw.choice((1, 2, 2, 3))
    held = tuple(draw.choice(get_args(Scheme)) for _ in range(draw.choice((0, 1, 1, 2))))
    actors = [
        tuple(_draw_guest(draw, clusters) for _ in range(draw.randint(1, 4))) for _ in range(draw.choice((1, 2, 3)))
    ]
    actors += [
        tuple(_draw_reader(draw, clusters) for _ in range(draw.randint(1, 4))) for _ in range(draw.choice((1, 1, 2)))
    ]
    if draw.random() < 0.7:
        actors.append(tuple(_draw_operator(draw) for _ in range(draw.randint(1, 3))))
    return Case(
        disk_format,
        clusters,
        held,
        tuple(actors),
        seed,
        over_nbd=draw.random() < 0.5,
        inline=draw.choice((0.0, 0.3, 0.8)),
        filled=draw.choice((-1, -1, 0, 8)),
        unmap=draw.random() < 0.3,
        room_bytes=draw.choice(_ROOMS),
        extended_l2=draw.random() < 0.25,
    )


def draw_crowd(seed: int, disk_format: Format) -> Case:
    """Many guests on one cluster, where some requests are done at once and others take time."""
    draw = random.Random(seed)
    actors = [tuple(_draw_guest(draw, 1) for _ in range(draw.randint(2, 8))) for _ in range(draw.choice((2, 3, 4)))]
    over_nbd, inline, filled = draw.random() < 0.3, draw.choice((0.3, 0.5, 0.8)), draw.choice((-1, 0))
    room_bytes = draw.choice(_ROOMS)
    return Case(disk_format, 1, (), tuple(actors), seed, over_nbd, inline=inline, filled=filled, room_bytes=room_bytes)


def _draw_guest(draw: random.Random, clusters: int) -> str:
    (kind,) = draw.choices(GUESTS, (6, 2, 2, 5, 1, 1, 1, 1, 1))
    return kind if kind == "flush" else f"{kind} {_draw_range(draw, clusters)}"


def _draw_reader(draw: random.Random, clusters: int) -> str:
    (kind,) = draw.choices(READERS, (3, 1))
    return f"{kind} {draw.randrange(3)} {_draw_range(draw, clusters)}"


def _draw_operator(draw: random.Random) -> str:
    (kind,) = draw.choices(OPERATORS, (6, 4, 4, 4, 2, 1, 1))
    return f"{kind} {draw.randrange(2)}" if kind in ("sstop", "jcancel") else kind


def _draw_range(draw: random.Random, clusters: int) -> str:
    sectors = clusters * 8
    if draw.random() < 0.5:
        first = draw.randrange(clusters) * 8
        return f"{first} {min(sectors, first + draw.choice((8, 8, 16)))}"
    first = draw.randrange(sectors)
    return f"{first} {min(sectors, first + draw.choice((1, 3, 8, 12)))}"


def draw_scheduler(seed: int) -> Scheduler:
    """First come, first served, half of the time; else by priorities; now and then any order."""
    draw = random.Random(seed)
    kind = draw.random()
    return Fifo() if kind < 0.5 else Pct(draw) if kind < 0.9 else Shuffle(draw)


async def play(
    case: Case, trace: list[str] | None = None, *, run: Run | None = None, medium: Medium | None = None
) -> World:
    """Plays the case in the running loop. Raises Violation, or what an actor raised. Returns the world, closed."""
    world = await _prepare(case, trace, medium)
    await (run or _all)(world, [_act(world, actor) for actor in case.actors])
    await world.finish()
    return world


Actors = list[Coroutine[Any, Any, None]]
Run = Callable[[World, Actors], Coroutine[Any, Any, None]]
"""Runs all the actors, and raises what they raise."""


async def _all(_world: World, actors: Actors) -> None:
    await asyncio.gather(*start_actors(actors))


def start_actors(actors: Actors) -> list[asyncio.Task[None]]:
    """Each actor in a task whose name does not depend on how many others there are."""
    loop = asyncio.get_running_loop()
    return [loop.create_task(actor, name=f"actor {number}") for number, actor in enumerate(actors)]


async def _prepare(case: Case, trace: list[str] | None, medium: Medium | None) -> World:
    if medium is None:
        medium = prompt() if case.prompt else Medium()
    world = await make_world(
        random.Random(case.seed),
        format=case.format,
        clusters=case.clusters,
        medium=medium,
        over_nbd=case.over_nbd,
        flushes=any("flush" in actor for actor in case.actors),
        unmap=case.unmap,
        room_bytes=case.room_bytes,
        extended_l2=case.extended_l2,
        trace=trace,
    )
    world.do_at_once(1.0)  # until the actors come: how the disk came to be is not what is searched
    world.copy_timeout_s = case.copy_timeout_s
    world.on_error = case.on_error
    filled = min(case.filled, world.history.sectors) if case.filled >= 0 else world.history.sectors
    if filled:
        await world.write(0, filled)
    for scheme in case.held:
        await (world.take if scheme == "access" else world.fleece)()
    world.do_at_once(case.inline)
    return world


async def _act(world: World, operations: Sequence[str]) -> None:
    for operation in operations:
        kind, *words = operation.split()
        numbers = [int(word) for word in words]
        if kind in GUESTS:
            await getattr(world, kind)(*numbers)
        elif kind in READERS:
            which, first, end = numbers
            if held := _pick(world.held, which):
                await (world.read_snapshot if kind == "sread" else world.status_of_snapshot)(held, first, end)
        else:
            await _operate(world, kind, *numbers)


async def _operate(world: World, kind: str, which: int = 0) -> None:
    try:
        if kind == "sstart":
            await world.take()
        elif kind == "jstart":
            await world.fleece()
        elif kind == "fstart":
            await world.fleece(sync="full")
        elif kind in ("backup", "rebackup"):
            await getattr(world, kind)()
        elif held := _pick([one for one in world.held if (one.job is not None) == (kind == "jcancel")], which):
            await world.end(held)
    except FleecerError as error:
        world.say(f"{kind} fails: {error}")
        if not world.failed():
            raise


def _pick(held: list[Held], which: int) -> Held | None:
    return held[which % len(held)] if held else None


def run_seed(seed: int, trace: list[str] | None = None, *, loop: SimLoop | None = None) -> None:
    """Plays the case of a seed under the schedule of that seed. Raises Violation and whatever else goes wrong."""
    run_case(draw_case(seed), trace, loop=loop)


def run_case(case: Case, trace: list[str] | None = None, *, loop: SimLoop | None = None) -> None:
    """Plays a case under the schedule of its seed. Raises as `run_seed`."""
    loop = loop or SimLoop()
    loop.scheduler = draw_scheduler(case.seed)
    simulate(play(case, trace), loop=loop)


BATCH = 100
"""How many schedules make a batch."""


@dataclasses.dataclass(slots=True)
class Batch:
    """What the schedules of the seeds from `first` came to. `failed`: seeds, and with what."""

    first: int
    schedules: int = 0
    steps: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    failed: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def add(self, other: Batch) -> None:
        """Counts another batch in."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.virtual_s += other.virtual_s
        self.cpu_s += other.cpu_s
        self.failed += other.failed


def run_batch(first: int) -> Batch:
    """Runs the seeds [first, first + BATCH)."""
    batch = Batch(first)
    began = time.process_time()
    for seed in range(first, first + BATCH):
        loop = SimLoop()
        try:
            run_seed(seed, loop=loop)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            batch.failed.append((seed, f"{type(error).__name__}: {error}"))
        batch.schedules += 1
        batch.steps += loop.steps
        batch.virtual_s += loop.time()
    batch.cpu_s = time.process_time() - began
    return batch


def run_directed(case: Case, driver: Driver, *, trace: list[str] | None = None, loop: NamedLoop | None = None) -> None:
    """Plays a case on prompt disks, each step of its actors chosen by `driver`. Raises as `run_seed`."""
    loop = loop or NamedLoop(steps_max=100_000)

    async def directed(_world: World, actors: Actors) -> None:
        tasks = start_actors(actors)
        loop.direct(driver)
        await loop.quiescent()
        for task in tasks:
            if task.done():
                task.result()
        for number, task in enumerate(tasks):
            if not task.done():
                raise Violation(f"actor {number} waits for something that never comes")

    simulate(play(dataclasses.replace(case, prompt=True), trace, run=directed), loop=loop)
