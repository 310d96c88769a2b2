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

What runs has a name that does not depend on the schedule: a task is named after the one that made it and how many it
made before ("main.2.1"), a plain callback likewise ("main.2:0"). `NamedLoop` keeps these names, so that one run's order
can be followed in another.

What of asyncio's inside is used, on 3.11 to 3.13: `BaseEventLoop._ready` (deque of handles) and `_stopping`;
`_run_once`, `_process_events`, `_write_to_self`, `_timer_handle_cancelled` overridden; `Handle` and its attributes;
`Task._log_traceback`, `_log_destroy_pending`.
"""

# ruff: noqa: SLF001 - that is what this file is for

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import random
import warnings
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from fleecer import eager
from fleecer.testing.sim.buffers import spoiled_when_given

T = TypeVar("T")


class Stuck(Exception):
    """Nothing is ready, no timer is set, and the coroutine has not ended: a deadlock, or a wake-up that was lost."""


class Unheard(Exception):
    """A callback or a task failed, and nobody was there to hear of it: a bug, or a request that got no answer."""


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
        handle: Any
        for index, handle in enumerate(ready):
            # The task that it steps, or the handle itself.
            task = getattr(handle._callback, "__self__", None)
            owner = task if isinstance(task, asyncio.Task) else handle
            priority = priorities.get(owner)
            if priority is None:
                priority = priorities[owner] = self._generator.random()
            if priority > best_priority:
                best, best_priority, best_owner = index, priority, owner
        if step in self._changes:
            priorities[best_owner] = -self._generator.random()
        return best


class SimLoop(asyncio.BaseEventLoop):
    """The loop. `steps` counts what ran; `time()` is virtual seconds since the start."""

    # asyncio's own, unknown to its type stubs. `Any` for handles: their privates are used.
    _ready: deque[Any]
    _stopping: bool

    def __init__(self, scheduler: Scheduler | None = None, *, steps_max: int = 100_000) -> None:
        super().__init__()
        self.steps = 0
        self.unheard: list[str] = []
        self.scheduler: Scheduler = scheduler or Fifo()
        self._steps_max = steps_max
        self._now_s = 0.0
        # A heap: when, which was set first, what becomes ready (or, a future, is done) then.
        self._timers: list[tuple[float, int, Any]] = []
        self._timers_set = 0
        self._tasks: list[Any] = []

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def pending(self) -> int:
        """How many callbacks and timers are still to come."""
        return len(self._ready) + sum(not timer.cancelled() for _, _, timer in self._timers)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keeps what nobody heard of, for `simulate` to raise."""
        self.unheard.append(f"{context.get('message')}: {context.get('exception')!r}")

    def create_task(self, coro: Any, *, name: object = None, context: Any = None, **others: Any) -> Any:
        """See asyncio."""
        task = super().create_task(coro, name=name, context=context, **others)
        self._tasks.append(task)
        return task

    def ask_tasks(self) -> None:
        """Has what tasks failed with, and nobody asked for, in `unheard`: asyncio tells of it once it collects them."""
        for task in self._tasks:
            if task.done() and task._log_traceback:
                failure = repr(task.exception())  # asked for herewith
                self.unheard.append(f"task {task.get_name()} failed, and nobody asked: {failure}")

    def unfinished(self) -> list[Any]:
        """The tasks that have not ended."""
        return [task for task in self._tasks if not task.done()]

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    # Half of a simulation's time goes by in here and in what asyncio does for a callback: hence fewer, plainer calls.

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """See asyncio."""
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._set_timer(when, timer)
        return timer

    def finish_later(self, delay_s: float, future: asyncio.Future[None]) -> None:
        """Has the future done then: as `call_later`, but no step of its own. Whom it wakes takes one."""
        self._set_timer(self._now_s + delay_s, future)

    def _set_timer(self, when: float, timer: Any) -> None:
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))

    def _timer_handle_cancelled(self, handle: object) -> None:
        """It stays where it is until its time, or until it is first."""

    def _run_once(self) -> None:
        """Runs one step after the other until the loop is to stop."""
        ready, timers = self._ready, self._timers
        choose = None if type(self.scheduler) is Fifo else self.scheduler.choose
        while not self._stopping:
            if not ready or (timers and timers[0][0] <= self._now_s):
                self._collect_timers()
            self.steps += 1
            if self.steps > self._steps_max:
                raise TooManySteps(f"more than {self._steps_max} steps")
            index = choose(ready, self.steps) if choose is not None and len(ready) > 1 else 0
            handle = _take(ready, index) if index else ready.popleft()
            if not handle._cancelled:
                self._call(handle)

    def _call(self, handle: Any) -> None:
        try:
            handle._context.run(handle._callback, *handle._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as asyncio has it
            self.call_exception_handler({"message": f"callback {handle._callback!r} failed", "exception": error})

    def _collect_timers(self) -> None:
        """Makes ready what is due; where nothing is ready, whatever is due next."""
        ready, timers = self._ready, self._timers
        while timers and (timers[0][0] <= self._now_s or not ready):
            when, _, timer = heapq.heappop(timers)
            if timer.cancelled():
                continue
            self._now_s = max(self._now_s, when)
            if isinstance(timer, asyncio.TimerHandle):
                ready.append(timer)
            else:
                timer.set_result(None)
        if not ready:
            raise Stuck("nothing is ready and no timer is set")


class _Handle(asyncio.Handle):
    """asyncio's own, made with less ado."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, loop: SimLoop, context: Any) -> None:
        mine: Any = self
        mine._context = contextvars.copy_context() if context is None else context
        mine._loop = loop
        mine._callback = callback
        mine._args = args
        mine._cancelled = False
        mine._repr = None
        mine._source_traceback = None


def _take(ready: deque[Any], index: int) -> Any:
    handle = ready[index]
    del ready[index]
    return handle


class Driver(Protocol):
    """Directs a `NamedLoop`: chooses each step by name, and hears when it is over."""

    def choose(self, names: list[str], enablers: list[int]) -> int:
        """The index of what to run. `enablers` tells in which earlier step each became ready (-1: before the first)."""

    def stepped(self) -> None:
        """The step chosen last is over."""

    def over(self) -> None:
        """There is nothing more to choose."""


class NamedLoop(SimLoop):
    """A `SimLoop` that knows everything it runs by name. While `driver` is set, that directs it; else the scheduler.

    `order` lists what ran, by name, timers left out: they only tell when something becomes ready.
    """

    def __init__(self, scheduler: Scheduler | None = None, *, steps_max: int = 100_000) -> None:
        super().__init__(scheduler, steps_max=steps_max)
        self.driver: Driver | None = None
        self.current = "main"
        self.order: list[str] = []
        self._made: dict[str, list[int]] = {}  # by each: how many tasks, how many callbacks
        self._names: dict[int, tuple[str, int]] = {}  # of the handles still to run, by id
        self._step = -1  # since the driver came
        self._before: dict[str, list[Any]] = {}
        self._quiet: asyncio.Future[None] | None = None

    def fresh_name(self) -> str:
        """A name for something made in the current step, the same whatever else ran in between."""
        return f"{self.current}/{self._count(2)}"

    def create_task(self, coro: Any, *, name: object = None, context: Any = None, **others: Any) -> Any:
        """See asyncio. Named after its maker, unless a name is given or the loop itself makes the first."""
        made = name or (f"{self.current}.{self._count(0)}" if self.steps else "main")
        return super().create_task(coro, name=made, context=context, **others)

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """See asyncio."""
        handle = super().call_soon(callback, *args, context=context)
        owner = getattr(callback, "__self__", None)
        name = "" if isinstance(owner, asyncio.Task) else f"{self.current}:{self._count(1)}"
        self._names[id(handle)] = name, self._step
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        handle = super().call_at(when, callback, *args, context=context)
        self._names[id(handle)] = f"{self.current}:{self._count(1)}", self._step
        return handle

    def direct(self, driver: Driver) -> None:
        """From the next step on, `driver` chooses, until somebody finds the loop `quiescent`."""
        self.driver = driver
        self._step = -1
        self._names = {key: (name, -1) for key, (name, _) in self._names.items()}

    def at_step(self, name: str, number: int, do: Callable[[], object]) -> None:
        """Has `do` called before step `number` of the task of that name, counted from 0."""
        self._before[name] = [number, do]

    async def quiescent(self) -> None:
        """Returns when nothing is ready but what waits for this."""
        self._quiet = self.create_future()
        await self._quiet

    def _count(self, kind: int) -> int:
        counts = self._made.setdefault(self.current, [0, 0, 0])
        counts[kind] += 1
        return counts[kind] - 1

    def _name(self, handle: Any) -> str:
        return self._names[id(handle)][0] or str(handle._callback.__self__.get_name())

    def _count_down(self, name: str) -> None:
        waiting = self._before[name]
        waiting[0] -= 1
        if waiting[0] < 0:
            del self._before[name]
            waiting[1]()

    def _collect_timers(self) -> None:
        if self._quiet is not None and all(handle._cancelled for handle in self._ready):
            quiet, self._quiet = self._quiet, None
            quiet.set_result(None)
            if self.driver is not None:
                self.driver.over()
                self.driver = None
        self.current = "time"
        super()._collect_timers()

    def _run_once(self) -> None:
        """As a `SimLoop` does, but by name, and as directed."""
        ready, timers = self._ready, self._timers
        while not self._stopping:
            if not ready or (timers and timers[0][0] <= self._now_s):
                self._collect_timers()
            self.steps += 1
            if self.steps > self._steps_max:
                raise TooManySteps(f"more than {self._steps_max} steps")
            if self.driver is None:
                self._perform(self.scheduler.choose(ready, self.steps) if len(ready) > 1 else 0)
            elif any(handle._cancelled for handle in ready):
                self._perform([handle._cancelled for handle in ready].index(True))
            else:
                self._step += 1
                names = [self._name(handle) for handle in ready]
                chosen = self.driver.choose(names, [self._names[id(handle)][1] for handle in ready])
                driver = self.driver
                self._perform(chosen)
                if self.driver is driver:
                    driver.stepped()

    def _perform(self, index: int) -> None:
        handle = _take(self._ready, index)
        if handle._cancelled:
            return
        self.current = self._name(handle)
        del self._names[id(handle)]
        if not isinstance(handle, asyncio.TimerHandle):
            self.order.append(self.current)
            if self.current in self._before:
                self._count_down(self.current)
        self._call(handle)


def simulate(
    coroutine: Coroutine[Any, Any, T],
    scheduler: Scheduler | None = None,
    *,
    steps_max: int = 100_000,
    loop: SimLoop | None = None,
) -> T:
    """Runs `coroutine` on `loop`, by default a new `SimLoop`, and returns what it returns.

    Raises what it raises, or Stuck, TooManySteps, Unheard. What it left running is dropped where it stands.
    """
    loop = loop or SimLoop(scheduler, steps_max=steps_max)
    try:
        with spoiled_when_given():
            result = loop.run_until_complete(coroutine)
        loop.ask_tasks()
    finally:
        _close(loop)
    if loop.unheard:
        raise Unheard("; ".join(loop.unheard))
    return result


def _close(loop: SimLoop) -> None:
    """Ends the loop. What is unfinished is closed while the loop still takes what its `finally` clauses give it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what a task never began to await
        unfinished = loop.unfinished()
        while unfinished:
            task = unfinished.pop()
            task._log_destroy_pending = False  # they are dropped on purpose
            coroutine = task.get_coro()
            frame = getattr(coroutine, "cr_frame", None)
            given = list(frame.f_locals.values()) if frame is not None else []
            with contextlib.suppress(RuntimeError):  # one that awaits while it is closed
                coroutine.close()
            for value in filter(asyncio.iscoroutine, given):
                with contextlib.suppress(RuntimeError, ValueError):
                    value.close()
            del task, coroutine, frame, given
        loop._ready.clear()
        loop._timers.clear()
        loop._tasks.clear()
        loop.close()
        eager.forget(loop)
