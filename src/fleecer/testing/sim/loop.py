"""An event loop with virtual time whose schedule is drawn from a seed. The only file that leans on asyncio's privates.

It runs coroutines as they are: tasks, futures, timers and `asyncio.sleep` behave as on any loop, but no time passes
while something is ready, and when nothing is, the clock jumps to the next timer. There are no sockets, threads or
signals: storage and network are simulated on top (disk.py, net.py).

Which ready callback runs next is the scheduler's choice:

    Fifo      in the order they became ready, as asyncio does; what varies is how long simulated I/O takes
    Pct       by random priorities of tasks, lowered at a few random steps: finds bugs of a small depth with a known
              probability (Burckhardt and others, "A Randomized Scheduler with Probabilistic Guarantees")
    Shuffle   any of them: more than asyncio would ever do; a failure found only so is at least fragile

Invariants: the same coroutine, scheduler and seed give the same steps, whatever the hash seed and the machine; a loop
on which nothing can ever happen again raises `Stuck` instead of waiting.

What of asyncio's inside is used, on 3.11 to 3.13: `BaseEventLoop._ready` (deque of handles), `_scheduled` (heap of
timer handles) and `_timer_cancelled_count`; `_run_once`, `_process_events`, `_write_to_self` overridden; `Handle._run`,
`_cancelled`, `_callback`, `TimerHandle._when`, `_scheduled`.
"""

# ruff: noqa: SLF001 - that is what this file is for

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Stuck(Exception):
    """Nothing is ready, no timer is set, and the coroutine has not ended: a deadlock, or a wake-up that was lost."""


class TooManySteps(Exception):
    """The bound on steps was reached: something goes round for ever."""


class Scheduler(Protocol):
    """Chooses what runs next."""

    def choose(self, ready: deque[asyncio.Handle], step: int) -> int:
        """The index of the handle to run."""


class Fifo:
    """First come, first served: asyncio's own order."""

    def choose(self, ready: deque[asyncio.Handle], step: int) -> int:
        """Always the first."""
        return 0


class Shuffle:
    """Any of those that are ready, drawn from `generator`."""

    def __init__(self, generator: random.Random) -> None:
        self._draw = generator.random

    def choose(self, ready: deque[asyncio.Handle], step: int) -> int:
        """A random one."""
        return int(self._draw() * len(ready))


class Pct:
    """Tasks have random priorities; at `depth` - 1 of the first `steps` steps, that of the running one is lowered."""

    def __init__(self, generator: random.Random, *, depth: int = 3, steps: int = 200) -> None:
        self._generator = generator
        self._changes = {generator.randrange(steps) for _ in range(depth - 1)}
        self._priorities: dict[object, float] = {}

    def choose(self, ready: deque[asyncio.Handle], step: int) -> int:
        """The one whose task has the highest priority; of one task's, the first."""
        priorities = self._priorities
        best, best_priority, best_owner = 0, -2.0, None
        for index, handle in enumerate(ready):
            owner = _owner(handle)
            priority = priorities.get(owner)
            if priority is None:
                priority = priorities[owner] = self._generator.random()
            if priority > best_priority:
                best, best_priority, best_owner = index, priority, owner
        if step in self._changes:
            priorities[best_owner] = -self._generator.random()
        return best


def _owner(handle: Any) -> object:
    """The task that a handle steps, or the handle itself."""
    task = getattr(handle._callback, "__self__", None)
    return task if isinstance(task, asyncio.Task) else handle


class SimLoop(asyncio.BaseEventLoop):
    """The loop. `steps` counts what ran; `time()` is virtual seconds since the start."""

    # asyncio's own, unknown to its type stubs. `Any` for handles: their privates are used.
    _ready: deque[Any]
    _scheduled: list[Any]
    _timer_cancelled_count: int

    def __init__(self, scheduler: Scheduler | None = None, *, steps_max: int = 1_000_000) -> None:
        super().__init__()
        self.steps = 0
        self.scheduler: Scheduler = scheduler or Fifo()
        self._steps_max = steps_max
        self._now_s = 0.0

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def pending(self) -> int:
        """How many callbacks and timers are still to come."""
        timers = sum(not handle.cancelled() for handle in self._scheduled)
        return len(self._ready) + timers

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled
        while timers and (timers[0]._cancelled or timers[0]._when <= self._now_s or not ready):
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if timer._cancelled:
                self._timer_cancelled_count -= 1
                continue
            self._now_s = max(self._now_s, timer._when)
            ready.append(timer)
        if not ready:
            raise Stuck("nothing is ready and no timer is set")
        self.steps += 1
        if self.steps > self._steps_max:
            raise TooManySteps(f"more than {self._steps_max} steps")
        if len(ready) > 1:
            index = self.scheduler.choose(ready, self.steps)
            if index:
                handle = ready[index]
                del ready[index]
                ready.appendleft(handle)
        handle = ready.popleft()
        if not handle._cancelled:
            handle._run()


def simulate(coroutine: Coroutine[Any, Any, T], scheduler: Scheduler | None = None, *, steps_max: int = 1_000_000) -> T:
    """Runs `coroutine` on a new `SimLoop` and returns what it returns.

    Raises what it raises, or Stuck, or TooManySteps. What it left running is dropped where it stands.
    """
    loop = SimLoop(scheduler, steps_max=steps_max)
    try:
        return loop.run_until_complete(coroutine)
    finally:
        _close(loop)


def _close(loop: SimLoop) -> None:
    unfinished: list[Any] = list(asyncio.all_tasks(loop))
    for task in unfinished:
        task._log_destroy_pending = False  # they are dropped on purpose
    loop._ready.clear()
    loop._scheduled.clear()
    loop.close()
