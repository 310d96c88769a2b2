"""What the pool's threads and the ring share: how much of them one customer gets, and results that nobody cancels."""

from __future__ import annotations

import asyncio
import collections
from typing import Any, TypeVar

LANE_LIMIT = 8

T = TypeVar("T")


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
