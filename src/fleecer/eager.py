"""Run to completion: a coroutine is stepped at once, and only one that has to wait becomes a task.

Most requests never wait: the page is cached, the range is free. Those end inside `start`, without a task, a future or a
trip through the event loop, at a tenth of the cost. This module is the only one that knows the trick.

Rules for a coroutine started here: until it first waits there is no current task, so `asyncio.timeout`,
`asyncio.TaskGroup` and `asyncio.current_task` are not for it; futures, `asyncio.sleep` and other coroutines are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

# The event loop keeps only weak references to tasks; a request must not vanish while it waits.
_waiting: set[asyncio.Task[Any]] = set()


def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Runs `coroutine` until it ends or has to wait.

    Returns None if it has ended, else the task in which it goes on. What it raises at once is raised here; what it
    raises later is the task's.
    """
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return None
    _mark(awaited, being_awaited=False)
    task = asyncio.get_running_loop().create_task(_Rest(coroutine, awaited))
    _waiting.add(task)
    task.add_done_callback(_waiting.discard)
    return task


def forget(loop: asyncio.AbstractEventLoop) -> None:
    """Lets go of what still waits in a loop that is closed without having let it end, as simulations do."""
    _waiting.difference_update([task for task in _waiting if task.get_loop() is loop])


class _Rest(Coroutine[Any, Any, None]):
    """What is left of a coroutine that has asked to wait for `awaited`, for a task to run.

    It is no coroutine function: a task that is cancelled before its first step does not even enter one, and what waits
    inside would never hear of it.
    """

    __slots__ = ("_awaited", "_coroutine", "_is_begun")

    def __init__(self, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited
        self._is_begun = False

    def send(self, value: Any) -> Any:
        """Hands the task what is waited for already; from then on, whatever the coroutine asks to wait for."""
        if self._is_begun:
            return self._coroutine.send(value)
        self._is_begun = True
        _mark(self._awaited, being_awaited=True)
        return self._awaited

    def throw(self, kind: Any, value: Any = None, trace: Any = None) -> Any:
        """Raises a cancel, or the failure of what was waited for, where the coroutine waits."""
        self._is_begun = True
        return self._coroutine.throw(kind) if value is None else self._coroutine.throw(kind, value, trace)

    def close(self) -> None:
        """Ends the coroutine where it waits."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise AssertionError("only a task runs this")


def _mark(awaited: Any, *, being_awaited: bool) -> None:
    """Sets or clears the mark by which a task knows that what it was handed is a future being awaited.

    A future has one mark, set by `await` and cleared by the task. Between the two nobody else can await it; so it is
    cleared here while the task, which comes only in the next turn of the loop, is yet to see it.
    """
    if awaited is not None:  # asyncio.sleep(0) waits for nothing
        awaited._asyncio_future_blocking = being_awaited  # noqa: SLF001 - the protocol of asyncio's futures and tasks
