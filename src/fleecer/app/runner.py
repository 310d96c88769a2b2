"""Running the program's main coroutine: which event loop, and what is ended with it.

uvloop is used where it can be imported; FLEECER_LOOP=asyncio chooses the standard library's loop all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fleecer.app import signals
from fleecer.errors import UsageError, quoted
from fleecer.storage.pool import running_pool

T = TypeVar("T")

LOOP_VARIABLE = "FLEECER_LOOP"
_LAST_TURNS = 3


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loop. Raises UsageError for a FLEECER_LOOP that names none, or one that is not installed."""
    wanted = os.environ.get(LOOP_VARIABLE, "")
    if wanted not in ("", "asyncio", "uvloop"):
        raise UsageError(f"{LOOP_VARIABLE} is {quoted(wanted)}; it may be asyncio or uvloop")
    if wanted != "asyncio":
        try:
            import uvloop
        except ImportError:
            if wanted:
                raise UsageError(f"{LOOP_VARIABLE} is uvloop, which is not installed: pip install uvloop") from None
        else:
            return uvloop.new_event_loop
    return asyncio.new_event_loop


def run(main: Coroutine[Any, Any, T], *, ends_in_order: bool = False) -> T:
    """Runs `main` to its end in a new event loop, ends the loop's threads, and returns what it returned.

    A stop signal cancels `main` unless that follows signals itself; `Interrupted` is raised once it has ended and the
    loop is closed. With `ends_in_order` a signal is the usual way to end `main`, and later ones have no effect.
    """
    try:
        factory = loop_factory()
    except UsageError:
        main.close()
        raise
    task: asyncio.Task[Any] | None = None  # while there is something to cancel

    def cancel(number: int) -> None:
        if task is not None:
            task.cancel()

    stopper = signals.Stopper(cancel)

    async def heeding_signals() -> T:
        nonlocal task
        with signals.heeded_by(asyncio.get_running_loop(), stopper):
            if stopper.number:  # it came while the loop was made
                raise asyncio.CancelledError
            task = asyncio.current_task()
            try:
                return await _with_pool(main)
            finally:
                task = None
                for _ in range(_LAST_TURNS):  # a signal that came in main's last step is heard only in the loop's next
                    await asyncio.sleep(0)

    try:
        with (
            contextlib.closing(main),
            signals.held_for(stopper, ends_in_order=ends_in_order),
            asyncio.Runner(loop_factory=factory) as runner,
        ):
            result = runner.run(heeding_signals())
    except asyncio.CancelledError:
        if stopper.number:
            raise signals.Interrupted(stopper.number) from None
        raise
    if stopper.number and not ends_in_order:
        raise signals.Interrupted(stopper.number)
    return result


async def _with_pool(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        await running_pool().close()
