"""Run to completion: a coroutine is stepped at once, and only one that has to wait becomes a task.

Most requests never wait: the page is cached, the range is free. Those end inside `start`, without a task, a future or a
trip through the event loop, at a tenth of the cost. This module is the only one that knows the trick.

Rules for a coroutine started here: until it first waits there is no current task, so `asyncio.timeout`,
`asyncio.TaskGroup` and `asyncio.current_task` are not for it; futures, `asyncio.sleep` and other coroutines are.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

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
    task = asyncio.get_running_loop().create_task(_go_on(coroutine, awaited))
    _waiting.add(task)
    task.add_done_callback(_waiting.discard)
    return task


async def _go_on(coroutine: Coroutine[Any, Any, T], awaited: Any) -> T:
    return await _rest(coroutine, awaited)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    """Waits for what `coroutine` has already asked to wait for, then runs the rest of it."""
    try:
        sent = yield awaited
    except BaseException as error:  # noqa: BLE001 - a cancel or a failed wait belongs to the coroutine, whichever it is
        try:
            awaited = coroutine.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        return (yield from _rest(coroutine, awaited))
    assert sent is None, "futures are awaited for their completion; nothing is sent into a coroutine"
    return (yield from coroutine.__await__())
