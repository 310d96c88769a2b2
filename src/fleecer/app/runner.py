"""Running the program's main coroutine: which event loop, and what is ended with it.

uvloop is used where it can be imported; FLEECER_LOOP=asyncio chooses the standard library's loop all the same.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fleecer.errors import UsageError, quoted
from fleecer.storage.pool import running_pool

T = TypeVar("T")

LOOP_VARIABLE = "FLEECER_LOOP"


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


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` to its end in a new event loop, ends the loop's threads, and returns what it returned.

    SIGINT cancels `main` unless it handles the signal itself; KeyboardInterrupt is raised once it has ended.
    """
    try:
        factory = loop_factory()
    except UsageError:
        main.close()
        raise
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_with_pool(main))


async def _with_pool(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        await running_pool().close()
