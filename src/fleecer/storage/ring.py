"""Reads through io_uring: for what the page cache lacks, without a thread for each read.

A thread costs a cold read more than the disk does, most of it because both sides want the interpreter. Here the kernel
is handed the reads of a turn of the loop in one call, and tells through one descriptor when some are done. That takes
the package `uring-api`, and a kernel that lets us: containers often forbid it. Without, the pool's threads read.

Invariants:
- A ring belongs to the event loop it was made in; all its methods are called there.
- What was begun runs to its end: the kernel has let go of the buffer when whoever began it is told, which is once.
- Only files come here that can be read with RWF_NOWAIT. For those the kernel waits without a worker of its own, so a
  disk that hangs holds up no other.
- Even to ask may put us to sleep: when a disk has more to do than it takes at once, as one that hangs soon has. So what
  all files on a disk ask together, here and inline, stays below what plain disks take (`Disk`).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fleecer.polling import polling_of
from fleecer.storage.lanes import Lane, hand_on
from fleecer.waiters import Waiters

if TYPE_CHECKING:
    import uring_api

SWITCH_VARIABLE = "FLEECER_IO_URING"
"""`off` there means that there shall be no ring."""

READS_MAX = 24
"""Reads of one disk under way at once. Even plain disks take 31; whoever asks for more is put to sleep."""

_ENDS_BETWEEN_TRIES = 64
_BUSY_S = 0.001
_ENTRIES = 256  # reads begun in one turn of the loop without a call for some of them alone


class Disk(Lane):
    """What the files on one disk share: a lane of the ring, and whether reads may be tried inline (`may_try`).

    A try begins to read what is not cached; so after one in vain while READS_MAX are under way, the next comes only
    when many have ended, which on a disk that hangs none does.
    """

    __slots__ = ("_to_end", "_under_way", "may_try")

    def __init__(self) -> None:
        super().__init__(READS_MAX)
        self.may_try = True
        self._under_way = 0
        self._to_end = 0

    def begin(self) -> None:
        """A read that may have to wait for the disk begins."""
        self._under_way += 1

    def end(self) -> None:
        """It has ended."""
        self._under_way -= 1
        if not self.may_try:
            self._to_end -= 1
            self.may_try = not self._to_end or self._under_way < READS_MAX

    def missed(self) -> None:
        """A read was tried inline, in vain."""
        if self._under_way >= READS_MAX:
            self.may_try = False
            self._to_end = _ENDS_BETWEEN_TRIES


_Ended = Callable[[int], None]
_Read = tuple[_Ended, Lane, int, bytearray | memoryview, int]


class Ring:
    """The kernel's queues of one event loop; see `open_ring`."""

    def __init__(self, ring: uring_api.Ring) -> None:
        loop = asyncio.get_running_loop()  # not kept here: it owns the ring, and goes away with it
        self._ring = ring
        self._polling = polling_of(loop)
        self._running = 0
        self._is_turn_due = False
        self._idle = Waiters()
        loop.add_reader(ring.fd, self._turn)

    def read(self, lane: Lane, fd: int, buffer: bytearray | memoryview, offset: int, ended: _Ended) -> None:
        """Reads into `buffer` from `offset` on; tells `ended` how many bytes, or an error number below zero.

        Fewer bytes than asked for are no error, as with pread(2). Until `ended` is called, in a later turn of the event
        loop, the buffer is the kernel's. What it raises is for the loop's exception handler.
        """
        read = (ended, lane, fd, buffer, offset)
        if lane.running < lane.limit:
            self._begin(read)
        else:
            lane.waiting.append(read)

    @property
    def busy(self) -> bool:
        """Whether any read is under way."""
        return self._running > 0

    async def idle(self) -> None:
        """Returns when all that was begun has ended, and whoever waits for it has been told."""
        while self._running:
            await self._idle.wait()

    def close(self) -> None:
        """Gives the ring back, which must be idle. A second call does nothing."""
        assert not self._running, "a ring was closed with reads under way"
        if not self._ring.closed:
            asyncio.get_running_loop().remove_reader(self._ring.fd)
            self._ring.close()

    def _begin(self, read: _Read) -> None:
        ended, lane, fd, buffer, offset = read
        try:
            self._ring.prepare_read(fd, buffer, offset, read)
        except (OSError, RuntimeError):  # the kernel takes no more just now; whoever asked has other ways
            asyncio.get_running_loop().call_soon(ended, -errno.EAGAIN)
            return
        lane.running += 1
        self._running += 1
        if not self._is_turn_due:
            self._is_turn_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Hands the kernel what was begun, hands out what is done, and begins what waited for that."""
        if self._ring.closed:
            return
        try:
            completions = self._ring.wait(0) or ()
        except OSError:  # it is busy: what was begun is still with us, and nobody else would ask again
            self._is_turn_due = True
            asyncio.get_running_loop().call_later(_BUSY_S, self._turn)
            return
        self._is_turn_due = False
        for completion in completions:
            read: Any = completion.take_user_data()
            ended, lane = read[:2]
            lane.running -= 1
            self._running -= 1
            hand_on(ended, completion.res)
            while lane.waiting and lane.running < lane.limit:
                self._begin(lane.waiting.popleft())
        if not self._running:
            self._idle.wake()
        if self._polling is not None:
            if completions:
                self._polling.arrived()
            if self._running:
                self._polling.asked()


def load() -> bool:
    """Loads what `open_ring` needs, which takes a while; False if a ring is not wanted or not installed."""
    if os.environ.get(SWITCH_VARIABLE) == "off":
        return False
    try:
        import uring_api  # noqa: F401
    except ImportError:
        return False
    return True


def open_ring() -> Ring | None:
    """A ring for the running event loop, once `load` has said so; None where it is forbidden or the kernel too old."""
    import uring_api

    try:
        # Linux 5.19 has this flag, by which nothing interrupts us when a read is done, and all else that is needed.
        return Ring(uring_api.Ring(_ENTRIES, uring_api.IORING_SETUP_COOP_TASKRUN))
    except OSError:
        return None
