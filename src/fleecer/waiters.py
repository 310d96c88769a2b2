"""Waiting for something that happens once: together with others, or until a given time.

Each waits for a future of its own, so whoever is cancelled goes and nobody else hears of it. One future for all would
have to be shielded from each one's cancel, which takes two more futures and one more turn of the event loop.
"""

from __future__ import annotations

import asyncio


class Waiters:
    """Who waits for one thing to happen. Once it has, `wake`: those who come later wait for the next."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Returns once `wake` was called after this."""
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        await future

    def wake(self) -> None:
        """Lets everybody go on who waits, in the order they came."""
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(None)


async def done_in_time(future: asyncio.Future[bool], deadline_s: float | None) -> bool:
    """Awaits `future`; completes it with False itself at `deadline_s` (in the loop's time; None: never)."""
    if deadline_s is None:
        return await future
    handle = asyncio.get_running_loop().call_at(deadline_s, _complete, future)
    try:
        return await future
    finally:
        handle.cancel()


def _complete(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(False)
