"""The simulated event loop: no time passes while something can run, and what can never end is told."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import weakref
from collections.abc import Callable

import pytest

from fleecer import eager
from fleecer.testing.sim.loop import (
    Fifo,
    NamedLoop,
    Pct,
    Scheduler,
    Shuffle,
    SimLoop,
    Stuck,
    TooManySteps,
    Unheard,
    simulate,
)


async def order_of(count: int) -> list[int]:
    """In which order tasks that become ready at the same time run."""
    order: list[int] = []

    async def note(number: int) -> None:
        order.append(number)

    await asyncio.gather(*(note(number) for number in range(count)))
    return order


def test_the_clock_jumps_to_the_next_timer_and_stands_still_while_something_is_ready() -> None:
    async def program() -> list[float]:
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        for _ in range(1000):
            await asyncio.sleep(0)
        times.append(loop.time())
        await asyncio.sleep(3600.0)
        times.append(loop.time())
        return times

    assert simulate(program()) == [0.0, 0.0, 3600.0]


def test_timers_go_off_in_the_order_of_their_times_and_cancelled_ones_never() -> None:
    async def program() -> list[str]:
        loop = asyncio.get_running_loop()
        order: list[str] = []
        loop.call_later(3.0, order.append, "third")
        loop.call_later(1.0, order.append, "first")
        loop.call_later(2.0, order.append, "never").cancel()
        await asyncio.sleep(10.0)
        return order

    assert simulate(program()) == ["first", "third"]


def test_what_waits_for_nothing_that_can_come_is_stuck() -> None:
    async def program() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck):
        simulate(program())


def test_what_goes_round_for_ever_is_stopped() -> None:
    async def program() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(TooManySteps, match="more than 500 steps"):
        simulate(program(), steps_max=500)


def fail_in_a_callback(loop: asyncio.AbstractEventLoop) -> None:
    """A callback that raises."""
    loop.call_soon(int, "no number")


def fail_in_a_task(loop: asyncio.AbstractEventLoop) -> None:
    """A task whose exception nobody asks for."""

    async def fails() -> None:
        raise ValueError("nobody waits for this")

    loop.create_task(fails())


@pytest.mark.parametrize("fail", [fail_in_a_callback, fail_in_a_task])
def test_a_failure_that_nobody_hears_of_fails_the_simulation(fail: Callable[[asyncio.AbstractEventLoop], None]) -> None:
    async def program() -> None:
        fail(asyncio.get_running_loop())
        await asyncio.sleep(1.0)

    with pytest.raises(Unheard, match="ValueError"):
        simulate(program())


def test_what_the_coroutine_raises_is_raised_and_what_it_left_running_is_ended() -> None:
    ended: list[str] = []

    async def left_running() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("left running")

    async def program() -> None:
        task = asyncio.get_running_loop().create_task(left_running())
        await asyncio.sleep(0)
        assert not task.done()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        simulate(program())
    assert ended == ["left running"]


@pytest.mark.parametrize("make", [Shuffle, Pct])
def test_a_seed_gives_one_order_and_seeds_give_many(make: Callable[[random.Random], Scheduler]) -> None:
    orders = [simulate(order_of(5), make(random.Random(seed))) for seed in range(50)]
    assert orders == [simulate(order_of(5), make(random.Random(seed))) for seed in range(50)]
    assert len({tuple(order) for order in orders}) > 20
    assert simulate(order_of(5), Fifo()) == [0, 1, 2, 3, 4]


def test_pct_runs_the_task_of_the_highest_priority_until_a_change_lowers_it() -> None:
    async def program() -> list[str]:
        order: list[str] = []

        async def steps(name: str) -> None:
            for _ in range(30):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(steps("a"), steps("b"))
        return order

    for seed in range(20):
        order = simulate(program(), Pct(random.Random(seed), depth=2, steps=40))
        switches = sum(one != other for one, other in itertools.pairwise(order))
        assert switches <= 2, f"seed {seed}: {''.join(order)}"


def test_names_tell_who_made_a_task_whatever_the_schedule() -> None:
    async def leaf() -> str:
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    async def branch() -> list[str]:
        return list(await asyncio.gather(leaf(), leaf()))

    async def program() -> list[list[str]]:
        return list(await asyncio.gather(branch(), branch()))

    orders = set()
    for seed in range(20):
        loop = NamedLoop(Shuffle(random.Random(seed)))
        assert simulate(program(), loop=loop) == [["main.0.0", "main.0.1"], ["main.1.0", "main.1.1"]]
        orders.add(tuple(loop.order))
    assert len(orders) > 1


class Last:
    """Always chooses what became ready last; keeps what there was to choose from."""

    def __init__(self) -> None:
        self.offered: list[list[str]] = []
        self.steps = 0
        self.is_over = False

    def choose(self, names: list[str], enablers: list[int]) -> int:
        """See `Driver`."""
        assert len(enablers) == len(names)
        self.offered.append(list(names))
        return len(names) - 1

    def stepped(self) -> None:
        """See `Driver`."""
        self.steps += 1

    def over(self) -> None:
        """See `Driver`."""
        self.is_over = True


def test_a_driver_chooses_every_step_until_nothing_is_ready() -> None:
    loop = NamedLoop()
    driver = Last()
    order: list[str] = []

    async def actor(name: str) -> None:
        order.append(name)
        await asyncio.sleep(0)
        order.append(name)

    async def program() -> None:
        tasks = [loop.create_task(actor(name), name=name) for name in "ab"]
        loop.direct(driver)
        await loop.quiescent()
        assert all(task.done() for task in tasks)

    simulate(program(), loop=loop)
    assert order == ["b", "b", "a", "a"]
    assert driver.offered[0] == ["a", "b"]
    assert driver.steps == len(driver.offered)
    assert driver.is_over


def test_something_can_be_done_before_a_chosen_step_of_a_task() -> None:
    loop = NamedLoop()
    seen: list[int] = []

    async def actor() -> None:
        for step in range(5):
            seen.append(step)
            await asyncio.sleep(0)

    async def program() -> None:
        loop.at_step("actor", 2, lambda: seen.append(-1))
        await loop.create_task(actor(), name="actor")

    simulate(program(), loop=loop)
    assert seen == [0, 1, -1, 2, 3, 4]


def test_pending_counts_what_can_still_happen() -> None:
    loop = SimLoop()
    try:
        loop.call_soon(print)
        loop.call_later(1.0, print)
        loop.call_later(2.0, print).cancel()
        assert loop.pending() == 2
    finally:
        loop.close()


def test_a_simulation_that_is_over_leaves_nothing_in_memory() -> None:
    class Big:
        """What a request holds on to."""

    held: list[weakref.ref[Big]] = []

    async def waits(big: Big) -> None:
        held.append(weakref.ref(big))
        await asyncio.get_running_loop().create_future()

    async def program() -> None:
        eager.start(waits(Big()))
        await asyncio.sleep(0)

    simulate(program())
    gc.collect()
    assert held[0]() is None
