"""The real block layer under random schedules: guests, readers and an operator on one disk, judged by the oracle."""

from __future__ import annotations

import asyncio
import random

import pytest

from fleecer.testing.sim.loop import Fifo, Pct, Scheduler, Shuffle, Stuck, simulate
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.world import Format, World, make_world

SCHEDULES = 60


async def scenario(seed: int, disk_format: Format, trace: list[str] | None = None) -> None:
    generator = random.Random(seed)
    world = await make_world(
        generator,
        format=disk_format,
        clusters=generator.choice((1, 2, 3)),
        trace=trace,
    )
    await asyncio.gather(guest(world), guest(world), reader(world), reader(world), operator(world))
    await world.finish()


def some_range(world: World) -> tuple[int, int]:
    first = world.generator.randrange(world.history.sectors)
    return first, min(world.history.sectors, first + world.generator.choice((1, 3, 8, 12)))


async def guest(world: World) -> None:
    for _ in range(4):
        kinds = [world.write, world.zero, world.discard, world.read]
        (kind,) = world.generator.choices(kinds, (6, 2, 1, 2))
        await kind(*some_range(world))
        if world.generator.random() < 0.1:
            await world.flush()


async def reader(world: World) -> None:
    for _ in range(4):
        open_ones = [held for held in world.held if not held.ending]
        if not open_ones:
            await asyncio.sleep(world.generator.random() * 1e-3)
            continue
        held = world.generator.choice(open_ones)
        ask = world.read_snapshot if world.generator.random() < 0.7 else world.status_of_snapshot
        await ask(held, *some_range(world))


async def operator(world: World) -> None:
    for _ in range(2):
        await asyncio.sleep(world.generator.random() * 1e-3)
        if world.held and world.generator.random() < 0.4:
            await world.end(world.generator.choice(world.held))
        else:
            await (world.take if world.generator.random() < 0.5 else world.fleece)()


def scheduler(seed: int) -> Scheduler:
    generator = random.Random(seed)
    kind = generator.random()
    return Fifo() if kind < 0.5 else Pct(generator) if kind < 0.9 else Shuffle(generator)


@pytest.mark.parametrize("disk_format", ["raw", "qcow2", "overlay"])
def test_every_read_is_allowed_under_random_schedules(disk_format: Format) -> None:
    for seed in range(SCHEDULES):
        simulate(scenario(seed, disk_format), scheduler(seed))


def test_the_same_seed_gives_the_same_story() -> None:
    stories: list[list[str]] = [[], []]
    for story in stories:
        simulate(scenario(7, "qcow2", story), scheduler(7))
    assert stories[0] == stories[1]
    assert stories[0]


def test_writes_that_pass_a_snapshot_by_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleecer.block.copier.Copier.must_preserve", lambda *_: False)
    with pytest.raises(Violation, match="at its instant it was"):
        test_every_read_is_allowed_under_random_schedules("raw")


def test_a_wait_that_nothing_can_end_is_told() -> None:
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck):
        simulate(wait())
