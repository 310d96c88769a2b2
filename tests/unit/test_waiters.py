"""Waiting together: everybody who waits is woken, in order and once, and a cancel is one's own."""

from __future__ import annotations

import asyncio

from fleecer.waiters import Waiters


async def _note(waiters: Waiters, name: str, woken: list[str]) -> None:
    await waiters.wait()
    woken.append(name)


async def test_all_who_wait_go_on_in_the_order_they_came() -> None:
    waiters, woken = Waiters(), list[str]()
    tasks = [asyncio.create_task(_note(waiters, name, woken)) for name in "abc"]
    await asyncio.sleep(0)
    waiters.wake()
    await asyncio.gather(*tasks)
    assert woken == ["a", "b", "c"]


async def test_a_cancel_reaches_nobody_else() -> None:
    waiters, woken = Waiters(), list[str]()
    one, other = (asyncio.create_task(_note(waiters, name, woken)) for name in "ab")
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.wait([one])
    assert one.cancelled()
    assert not other.done()
    waiters.wake()
    await other
    assert woken == ["b"]


async def test_who_comes_later_waits_for_the_next_time() -> None:
    waiters, woken = Waiters(), list[str]()
    waiters.wake()
    first = asyncio.create_task(_note(waiters, "first", woken))
    await asyncio.sleep(0)
    waiters.wake()
    second = asyncio.create_task(_note(waiters, "second", woken))
    await asyncio.sleep(0.01)
    assert woken == ["first"]
    waiters.wake()
    await asyncio.gather(first, second)
    assert woken == ["first", "second"]
