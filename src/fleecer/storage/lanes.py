"""What the pool's threads, the ring and the syncs share: how much of them one customer gets, results that nobody
cancels, and how the end of something is handed on."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Any, TypeVar

from fleecer.ranges import Buffer
from fleecer.storage.api import ReadEnded

LANE_LIMIT = 8

T = TypeVar("T")


def settle(result: asyncio.Future[T], value: T, error: Exception | None) -> None:
    """A `ReadEnded` for whoever waits: completes `result`, the first argument bound before; with None an `Ended`.

    Nobody is told where whoever waited was cancelled, and took `result` along.
    """
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)


def tell(ended: ReadEnded, read: asyncio.Future[Buffer]) -> None:
    """The other way round, for a read that is done: tells `ended`."""
    error = read.exception()
    if isinstance(error, Exception):
        ended(b"", error)
    else:
        ended(read.result(), None)


def hand_on(ended: Callable[[int], None], result: int) -> None:
    """Tells `ended` what the kernel said: a bug there must not cost the others that hear theirs now their end."""
    try:
        ended(result)
    except Exception as error:  # noqa: BLE001 - see above
        context = {"message": "the end of a request to the kernel was not taken well", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)


class Result(asyncio.Future[T]):
    """A future that a waiter cannot cancel; its task is told of the cancel once the result is there."""

    def cancel(self, msg: Any = None) -> bool:
        """Never does."""
        return False


class Lane:
    """One customer's share: at most `limit` of its jobs run at once, the others wait in the order they came in.

    Who runs the jobs keeps `running` and `waiting`.
    """

    __slots__ = ("limit", "running", "waiting")

    def __init__(self, limit: int = LANE_LIMIT) -> None:
        self.limit = limit
        self.running = 0
        self.waiting: collections.deque[Any] = collections.deque()
