"""The pool: limits, order, batches, cancelled waiters, and that it ends."""

from __future__ import annotations

import asyncio
import collections
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from fleecer.storage import pool as pool_module
from fleecer.storage.lanes import Lane
from fleecer.storage.pool import Pool, running_pool


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool()
    yield made
    await made.close()


class Gate:
    """A function that blocks its thread until `open`, and counts how many are inside."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.lock = threading.Lock()
        self.inside = 0
        self.entered: list[int] = []

    def __call__(self, number: int) -> int:
        with self.lock:
            self.inside += 1
            self.entered.append(number)
        assert self.event.wait(60)
        return number

    async def wait_for_inside(self, count: int) -> None:
        while self.inside < count:
            await asyncio.sleep(0)

    def open(self) -> None:
        self.event.set()


async def test_results_and_exceptions_come_back(pool: Pool) -> None:
    lane = Lane()
    assert await pool.submit(lane, divmod, 17, 5) == (3, 2)
    with pytest.raises(ZeroDivisionError):
        await pool.submit(lane, divmod, 1, 0)
    assert await pool.submit(lane, threading.get_ident) != threading.get_ident()
    assert lane.running == 0


async def test_a_lane_runs_no_more_than_its_limit_and_the_rest_in_order(pool: Pool) -> None:
    lane, gate = Lane(3), Gate()
    futures = [pool.submit(lane, gate, number) for number in range(12)]
    await gate.wait_for_inside(3)
    assert lane.running == 3
    assert len(lane.waiting) == 9
    gate.open()
    assert await asyncio.gather(*futures) == list(range(12))
    assert sorted(gate.entered[:3]) == [0, 1, 2]
    assert lane.running == 0
    assert not lane.waiting


async def test_what_waits_in_a_lane_starts_first_come_first_served(pool: Pool) -> None:
    lane, started = Lane(1), list[int]()
    await asyncio.gather(*(pool.submit(lane, started.append, number) for number in range(50)))
    assert started == list(range(50))


async def test_a_full_lane_does_not_hold_up_another(pool: Pool) -> None:
    stuck, gate = Lane(2), Gate()
    futures = [pool.submit(stuck, gate, number) for number in range(5)]
    await gate.wait_for_inside(2)
    for _ in range(20):
        assert await pool.submit(Lane(), abs, -1) == 1
    gate.open()
    await asyncio.gather(*futures)


async def test_threads_are_made_as_needed_and_never_too_many() -> None:
    pool, gate = Pool(threads_max=4), Gate()
    assert len(pool._threads) == 0
    for _ in range(3):
        await pool.submit(Lane(), abs, 1)
    assert len(pool._threads) == 1
    futures = [pool.submit(Lane(), gate, number) for number in range(20)]
    await gate.wait_for_inside(4)
    assert len(pool._threads) == 4
    gate.open()
    assert sorted(await asyncio.gather(*futures)) == list(range(20))
    await pool.close()


async def test_a_cancelled_waiter_is_told_only_when_the_work_is_done(pool: Pool) -> None:
    gate, done = Gate(), list[int]()
    lane = Lane()

    async def work() -> None:
        try:
            await pool.submit(lane, gate, 1)
        finally:
            done.append(lane.running)

    waiter = asyncio.create_task(work())
    await gate.wait_for_inside(1)
    waiter.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not done
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert done == [0]


async def test_results_that_gather_while_the_loop_is_busy_wake_it_once(pool: Pool) -> None:
    futures = [pool.submit(Lane(), abs, -number) for number in range(20)]
    deadline = time.monotonic() + 60
    while len(pool._outcomes) < 20 or not pool._bell.ringing:
        time.sleep(0)  # the loop does not run meanwhile
        assert time.monotonic() < deadline
    rings = os.eventfd_read(pool._bell.fd)
    os.eventfd_write(pool._bell.fd, rings)
    assert rings < 20, "each thread rang for itself"
    assert await asyncio.gather(*futures) == list(range(20))


async def test_a_result_that_comes_as_the_loop_has_just_looked_is_not_left_lying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rang, go_on = threading.Event(), threading.Event()

    class Bell(pool_module._Bell):
        def ring(self) -> None:
            super().ring()
            rang.set()

    class Outcomes(collections.deque[Any]):
        """Lets the second result in at the very moment when the loop has found no more."""

        def __bool__(self) -> bool:
            if not len(self) and not go_on.is_set():
                rang.clear()
                go_on.set()
                assert rang.wait(60)
                return False
            return len(self) > 0

    monkeypatch.setattr(pool_module, "_Bell", Bell)
    pool = Pool()
    pool._outcomes = Outcomes()
    late = pool.submit(Lane(), go_on.wait, 60)
    first = pool.submit(Lane(), abs, -1)
    both: set[asyncio.Future[Any]] = {first, late}
    done, _ = await asyncio.wait(both, timeout=20)
    assert done == both, "the loop was not woken for the second result"
    await pool.close()


async def stress(pool: Pool) -> None:
    lanes = [Lane(), Lane(), Lane(1)]

    async def customer(number: int) -> None:
        for step in range(300):
            assert await pool.submit(lanes[number % 3], abs, -step) == step

    await asyncio.gather(*(customer(number) for number in range(12)))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_no_result_is_left_lying(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def main() -> None:
        assert running_pool() is running_pool()
        await stress(running_pool())
        await running_pool().close()

    run(main())


async def test_close_waits_for_the_work_and_ends_the_threads() -> None:
    pool, gate = Pool(), Gate()
    lane = Lane(2)
    futures = [pool.submit(lane, gate, number) for number in range(5)]
    threads = list(pool._threads)
    closing = [asyncio.create_task(pool.close()) for _ in range(2)]
    await gate.wait_for_inside(2)
    assert not closing[0].done()
    gate.open()
    await asyncio.gather(*closing)
    assert [future.result() for future in futures] == list(range(5))
    assert not any(thread.is_alive() for thread in threads)
    await pool.close()
    with pytest.raises(AssertionError):
        pool.submit(lane, abs, 1)


async def test_after_close_the_loop_gets_a_new_pool() -> None:
    first = running_pool()
    await first.close()
    second = running_pool()
    assert second is not first
    assert await second.submit(Lane(), abs, -1) == 1
    await second.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_loop_that_goes_without_closing_takes_its_threads_along(
    run: Callable[[Coroutine[Any, Any, list[threading.Thread]]], list[threading.Thread]],
) -> None:
    async def main() -> list[threading.Thread]:
        await running_pool().submit(Lane(), abs, 1)
        return list(running_pool()._threads)

    threads = run(main())
    assert len(threads) == 1
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


async def test_who_lingers_has_the_results_without_a_turn_of_the_loop(pool: Pool) -> None:
    others: list[str] = []
    asyncio.get_running_loop().call_soon(others.append, "had a turn")
    futures = [pool.submit(Lane(), divmod, number, 5) for number in range(20)]
    assert pool.linger(futures, 60)
    assert [future.result() for future in futures] == [divmod(number, 5) for number in range(20)]
    assert not others
    await asyncio.sleep(0)
    assert others


async def test_who_lingers_does_so_for_a_moment_only_and_no_result_is_lost(pool: Pool) -> None:
    gate = Gate()
    futures = [pool.submit(Lane(), gate, number) for number in range(3)]
    assert not pool.linger(futures, 0.001)
    gate.open()
    assert await asyncio.gather(*futures) == [0, 1, 2]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_loop_that_hears_of_what_somebody_who_lingered_has_had_goes_on(
    run: Callable[[Coroutine[Any, Any, Any]], Any],
) -> None:
    async def main() -> list[int]:
        pool = Pool()
        for number in range(200):
            assert pool.linger([pool.submit(Lane(), abs, number)], 60)
            pool._collect()  # as a loop does that had seen the bell ring before
            if not number % 3:
                await asyncio.sleep(0)
        results = await asyncio.gather(*[pool.submit(Lane(), abs, number) for number in range(100)])
        await pool.close()
        return results

    assert run(main()) == list(range(100))
