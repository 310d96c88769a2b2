"""Staying awake for what comes next: a loop that a client or a disk will need again at once does not go to sleep.

A client that waits for each answer before it asks anew lets the server sleep in between, and to wake a thread takes
longer than to serve a request: more so in a virtual machine, where an idle processor is the hypervisor's. So for some
microseconds after each arrival the loop goes round without waiting. Everything else has its turn meanwhile as ever.
It is the same with a quick disk: what it was asked for comes soon, and then the client asks anew.

Invariants:
- A spell ends `POLL_S` after the last arrival, or `DISK_POLL_S` after a disk was last asked for something; then the
  loop sleeps until something happens.
- A spell in which nothing arrived was in vain. After each in a row twice as many arrivals pass, SKIPS_MAX at most,
  before there is another: a client with pauses costs next to nothing.
- Where we have but one processor there are none: the client needs it to ask. Nor are there while a worker of the
  kernel's does something for us, as that runs on the processor from which it was asked to.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable

from fleecer.trials import Trials

POLL_S = 50e-6
"""About what waking up takes at worst, so that staying awake costs at most as much as it can save."""

DISK_POLL_S = 200e-6
"""What a quick disk may take to answer, and a client to ask anew. Slower ones are slept for, as spells are in vain."""

SKIPS_MAX = 64

SWITCH_VARIABLE = "FLEECER_POLL"
"""`off` there means that the loop shall sleep as soon as there is nothing to do."""


class Polling:
    """Keeps one event loop awake after arrivals. `clock` counts seconds."""

    __slots__ = ("_arrivals", "_clock", "_is_awake", "_loop", "_suspended", "_trials", "_until_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.perf_counter) -> None:
        # The loop keeps this one, not the other way round, so that it can go away.
        self._loop = weakref.ref(loop)
        self._clock = clock
        self._is_awake = False
        self._until_s = 0.0
        self._arrivals = 0  # in this spell
        self._trials = Trials(SKIPS_MAX)
        self._suspended = 0  # how many need us asleep

    def arrived(self) -> None:
        """Something came in; more is to be expected."""
        if self._suspended:
            return
        if self._is_awake:
            self._arrivals += 1
        elif not self._trials.is_due():
            return
        else:
            self._is_awake = True
            self._arrivals = 0
            self._go_round()
        self._until_s = max(self._until_s, self._clock() + POLL_S)

    def asked(self) -> None:
        """A disk was asked for something: a spell that is on goes on until it may have come."""
        if self._is_awake and not self._suspended:
            self._until_s = self._clock() + DISK_POLL_S

    def suspend(self) -> None:
        """No more spells, until `resume` was called as often as this."""
        self._suspended += 1
        self._until_s = 0.0

    def resume(self) -> None:
        """See `suspend`."""
        self._suspended -= 1

    def _go_round(self) -> None:
        loop = self._loop()
        if loop is not None:
            loop.call_soon(self._look)

    def _look(self) -> None:
        if self._clock() < self._until_s:
            self._go_round()
            return
        self._is_awake = False
        if self._arrivals:
            self._trials.paid()
        else:
            self._trials.in_vain()


_pollings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Polling] = weakref.WeakKeyDictionary()


def polling_of(loop: asyncio.AbstractEventLoop) -> Polling | None:
    """What keeps that loop awake; None where it is not to be."""
    if len(os.sched_getaffinity(0)) < 2 or os.environ.get(SWITCH_VARIABLE) == "off":
        return None
    polling = _pollings.get(loop)
    if polling is None:
        polling = _pollings[loop] = Polling(loop)
    return polling
