"""Threads for what would block the event loop: bounded, started when needed, answering in batches.

Invariants:
- A pool belongs to the event loop it was made in; all its methods are called there. Threads only run functions.
- A lane never has more than its limit of functions in threads; the rest wait their turn, first come, first served.
- Results are put on a deque, and the loop is woken once for all that gathered meanwhile. A result appended before the
  bell is seen silent is collected; one appended after it rings again. So no result is left lying.
- What was submitted runs to its end. Its future cannot be cancelled: a waiter that is cancelled hears of it when the
  function has ended, so no claim or buffer is given up while a thread still uses it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import os
import queue
import select
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any, TypeVar, TypeVarTuple

from fleecer.storage.lanes import Lane, Result
from fleecer.storage.ring import Disk, Ring, load, open_ring
from fleecer.storage.syncs import Syncs, open_syncs
from fleecer.waiters import Waiters

THREADS_MAX = 64

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


_Job = tuple[Result[Any], Lane, Callable[..., Any], tuple[Any, ...]]
_Outcome = tuple[Result[Any], Lane, Any, BaseException | None]


class _Bell:
    """Wakes the loop, once per batch. The descriptor lives as long as any thread may ring it."""

    __slots__ = ("fd", "ringing")

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ringing = False

    def ring(self) -> None:
        if not self.ringing:
            self.ringing = True
            os.eventfd_write(self.fd, 1)

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):  # `linger` was quicker than the loop
            os.eventfd_read(self.fd)
        self.ringing = False

    def __del__(self) -> None:
        os.close(self.fd)


class Pool:
    """Threads of one event loop; see `running_pool`. It also owns the loop's ring."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._threads_max = threads_max
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._outcomes: collections.deque[_Outcome] = collections.deque()
        self._bell = _Bell()
        self._running = 0
        self._idle = Waiters()
        self._closed = False
        self._ring: Ring | None = None
        self._asked_for_ring = False
        self._syncs: Syncs | None = None
        self._asked_for_syncs = False
        self._disks: dict[int, Disk] = {}
        asyncio.get_running_loop().add_reader(self._bell.fd, self._collect)
        # A loop that goes away without closing its pool takes the threads with it.
        weakref.finalize(self, _dismiss, self._jobs, self._threads)

    def submit(self, lane: Lane, function: Callable[[*Ts], T], *arguments: *Ts) -> asyncio.Future[T]:
        """Runs `function(*arguments)` in a thread as soon as `lane` allows; the future has its result or exception."""
        assert not self._closed, "work was submitted to a closed pool"
        future: Result[T] = Result(loop=asyncio.get_running_loop())
        job: _Job = (future, lane, function, arguments)
        if lane.running < lane.limit:
            self._dispatch(job)
        else:
            lane.waiting.append(job)
        return future

    def linger(self, futures: Collection[asyncio.Future[Any]], limit_s: float) -> bool:
        """Waits for what was submitted in place of the loop, which nobody else has meanwhile: `limit_s` at most.

        Returns whether all are done. Threads that work beside a busy loop wait for the interpreter after every call;
        so what takes them a moment now would take many turns of the loop. For rare things that guests wait for.
        """
        deadline_s = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        while not all(future.done() for future in futures):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            if poll.poll(math.ceil(left_s * 1e3)):
                self._collect()
        return True

    def ring(self) -> Ring | None:
        """What reads without threads, where that can be done (ring.py); None also until it is loaded: ask again."""
        if not self._asked_for_ring:
            self._asked_for_ring = True
            self.submit(Lane(), load).add_done_callback(self._open_ring)
        return self._ring

    def syncs(self) -> Syncs | None:
        """What syncs without threads, where that can be done (syncs.py)."""
        if not self._asked_for_syncs:
            self._asked_for_syncs = True
            self._syncs = open_syncs()
        return self._syncs

    def disk(self, number: int) -> Disk:
        """What the files on the disk of that device number share."""
        return self._disks.setdefault(number, Disk())

    def _open_ring(self, loaded: asyncio.Future[bool]) -> None:
        if loaded.result() and not self._closed:
            self._ring = open_ring()

    async def close(self) -> None:
        """Waits for all work submitted, then ends the threads. A second call does nothing."""
        while self._running or any(kernels.busy for kernels in self._kernels()):  # what ends in one goes on in another
            if self._running:
                await self._idle.wait()
            for kernels in self._kernels():
                await kernels.idle()
        if self._closed:
            return
        self._closed = True
        for kernels in self._kernels():
            kernels.close()
        asyncio.get_running_loop().remove_reader(self._bell.fd)
        threads = list(self._threads)
        _dismiss(self._jobs, self._threads)
        for thread in threads:
            thread.join()
        if _pools.get(asyncio.get_running_loop()) is self:
            del _pools[asyncio.get_running_loop()]

    def _kernels(self) -> list[Ring | Syncs]:
        """The queues of the kernel that there are."""
        return [kernels for kernels in (self._ring, self._syncs) if kernels is not None]

    def _dispatch(self, job: _Job) -> None:
        job[1].running += 1
        self._running += 1
        self._jobs.put(job)
        if self._running > len(self._threads) < self._threads_max:
            name = f"fleecer-io-{len(self._threads)}"
            thread = threading.Thread(
                target=_work, args=(self._jobs, self._outcomes, self._bell), name=name, daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _collect(self) -> None:
        """Hands out what the threads have finished, and sends what waited for a place."""
        self._bell.silence()
        outcomes = self._outcomes
        while outcomes:
            future, lane, result, error = outcomes.popleft()
            lane.running -= 1
            self._running -= 1
            if lane.waiting:
                self._dispatch(lane.waiting.popleft())
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        if not self._running:
            self._idle.wake()


def _work(jobs: queue.SimpleQueue[_Job | None], outcomes: collections.deque[_Outcome], bell: _Bell) -> None:
    """A thread's life. It holds no reference to the pool, so that a forgotten pool can go away."""
    while (job := jobs.get()) is not None:
        future, lane, function, arguments = job
        try:
            outcome: _Outcome = (future, lane, function(*arguments), None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the one who waits
            outcome = (future, lane, None, error)
        outcomes.append(outcome)
        bell.ring()
        # A thread that waits for work must not keep the last one's buffers alive.
        del job, future, lane, function, arguments, outcome


def _dismiss(jobs: queue.SimpleQueue[_Job | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)
    threads.clear()


_pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pool] = weakref.WeakKeyDictionary()


def running_pool() -> Pool:
    """The pool of the running event loop, made at first use; who owns the loop closes it."""
    loop = asyncio.get_running_loop()
    pool = _pools.get(loop)
    if pool is None:
        pool = _pools[loop] = Pool()
    return pool
