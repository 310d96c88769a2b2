"""A loop stays awake after an arrival, for a while, where that pays; and sleeps otherwise."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from fleecer.errors import IoError
from fleecer.net.stream import SocketStream
from fleecer.polling import DISK_POLL_S, POLL_S, SKIPS_MAX, SWITCH_VARIABLE, Polling, polling_of


class Loop:
    """Turns of a loop, one by one: what is due, and what time it is."""

    def __init__(self) -> None:
        self.due: list[Callable[[], Any]] = []
        self.now_s = 100.0
        self.polling = Polling(cast("asyncio.AbstractEventLoop", self), lambda: self.now_s)

    def call_soon(self, callback: Callable[[], Any]) -> None:
        self.due.append(callback)

    def turn(self, later_s: float) -> None:
        self.now_s += later_s
        due, self.due = self.due, []
        for callback in due:
            callback()

    @property
    def is_awake(self) -> bool:
        return bool(self.due)

    def spell_in_vain(self) -> None:
        self.polling.arrived()
        assert self.is_awake
        self.turn(2 * POLL_S)
        assert not self.is_awake


def test_after_an_arrival_the_loop_is_awake_for_a_while_and_no_longer() -> None:
    loop = Loop()
    loop.polling.arrived()
    for _ in range(9):
        assert loop.is_awake
        loop.turn(POLL_S / 10)
    assert loop.is_awake
    loop.turn(POLL_S / 5)
    assert not loop.is_awake


def test_each_arrival_keeps_it_awake_longer_by_one_handle() -> None:
    loop = Loop()
    for _ in range(100):
        loop.polling.arrived()
        assert len(loop.due) == 1
        loop.turn(POLL_S * 0.9)
    assert loop.is_awake


def test_a_spell_goes_on_while_a_disk_may_answer_but_none_begins_for_that() -> None:
    loop = Loop()
    loop.polling.asked()
    assert not loop.due
    loop.polling.arrived()
    loop.polling.asked()
    loop.turn(DISK_POLL_S * 0.9)
    assert loop.due
    loop.polling.arrived()  # it has answered
    loop.turn(POLL_S * 0.9)
    assert loop.due
    loop.turn(POLL_S * 0.2)
    assert not loop.due
    loop.polling.arrived()
    assert loop.due, "that spell was not in vain"


def test_what_arrives_while_a_disk_is_asked_does_not_cut_the_spell_short() -> None:
    loop = Loop()
    loop.polling.arrived()
    loop.polling.asked()
    loop.polling.arrived()
    loop.turn(DISK_POLL_S * 0.9)
    assert loop.is_awake


def test_a_slow_disk_makes_spells_rare() -> None:
    loop = Loop()
    awake = 0
    for _ in range(1000):
        loop.polling.arrived()
        loop.polling.asked()
        awake += loop.is_awake
        loop.turn(2 * DISK_POLL_S)
        assert not loop.is_awake
    assert awake <= 1000 // SKIPS_MAX + 7


def test_a_spell_ends_when_a_worker_of_the_kernels_is_asked_and_none_begins_until_all_are_done() -> None:
    loop = Loop()
    loop.polling.arrived()
    loop.polling.arrived()
    for _ in range(2):
        loop.polling.suspend()
    loop.polling.asked()
    loop.turn(0)
    assert not loop.is_awake
    for _ in range(2):
        loop.polling.arrived()
        assert not loop.is_awake
        loop.polling.resume()
    loop.polling.arrived()
    assert loop.is_awake


def test_spells_in_vain_become_rare_until_one_is_not() -> None:
    loop = Loop()
    for expected in (1, 2, 4, 8, 16, 32, 64, SKIPS_MAX, SKIPS_MAX):
        loop.spell_in_vain()
        for _ in range(expected):
            loop.polling.arrived()
            assert not loop.is_awake

    loop.polling.arrived()
    loop.polling.arrived()
    loop.turn(2 * POLL_S)
    assert not loop.is_awake
    loop.polling.arrived()
    assert loop.is_awake, "the last spell was not in vain"


@pytest.mark.parametrize(("processors", "switch", "expected"), [(1, "", False), (2, "", True), (2, "off", False)])
async def test_it_is_for_who_has_two_processors_and_wants_it(
    monkeypatch: pytest.MonkeyPatch, processors: int, switch: str, expected: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setenv(SWITCH_VARIABLE, switch)
    loop = asyncio.get_running_loop()
    polling = polling_of(loop)
    assert (polling is not None) == expected
    assert polling_of(loop) is polling, "all streams of a loop share one"


class Counter:
    """A receiver that counts what it gets."""

    def __init__(self) -> None:
        self.count = 0

    def receive_buffer(self) -> memoryview:
        return memoryview(bytearray(8))

    def received(self, count: int) -> None:
        self.count += count

    def sent(self) -> None:
        pass

    def closed(self, error: IoError | None) -> None:
        assert error is None


async def test_a_stream_tells_of_what_it_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    polling = Polling(asyncio.get_running_loop(), lambda: now_s)
    monkeypatch.setattr("fleecer.net.stream.polling_of", lambda _: polling)
    left, right = socket.socketpair()
    for end in (left, right):
        end.setblocking(False)
    stream, counter = SocketStream(right, "left"), Counter()
    stream.begin(counter)
    try:
        for count in range(1, 4):
            left.send(b"x")
            async with asyncio.timeout(10):
                while counter.count < count:
                    await asyncio.sleep(0)
            assert polling._is_awake
            assert polling._arrivals == count - 1
        now_s += 2 * POLL_S
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not polling._is_awake
    finally:
        left.close()
        stream.abort()
        await asyncio.sleep(0)


def test_it_does_not_keep_its_loop() -> None:
    loop = asyncio.new_event_loop()
    polling = polling_of(loop)
    loop.close()
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None
    if polling is not None:
        polling.arrived()  # nobody is there to go round
