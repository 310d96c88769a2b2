"""Which writes run on the event loop: not those to a disk that is slow just now, and not all of the long ones.

Invariants:
- Whatever is decided, a write is done once: by the loop, which tried it, or by a thread.
- Nobody asks the disk: what is known is how long writes took, and what came meanwhile.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

from fleecer.trials import Trials


def _times_put_to_sleep() -> int:
    """How often this thread gave up the processor to wait for something; being robbed of it does not count."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class InlineWrites:
    """Whether the next write may run on the event loop.

    A buffered write is a copy into the page cache, some microseconds, unless the kernel holds the writer back: too many
    dirty pages, a page that must be read first, a journal that commits. There is no way to ask beforehand, so writes
    are timed. One that took more than SLOW_S may only have lost the processor to another process, which on a busy
    machine happens all the time; so the next RECENT_WRITES are looked at more closely, and if one of them is slow too,
    and was put to sleep by the kernel, the writes of the next PAUSE_MIN_S go to the pool. While trials go on to be slow
    the pause doubles, up to PAUSE_MAX_S.
    """

    SLOW_S = 0.002
    RECENT_WRITES = 8
    PAUSE_MIN_S = 1.0
    PAUSE_MAX_S = 16.0

    __slots__ = ("_slept_before", "_times_put_to_sleep", "clock", "pause_s", "quick_to_go", "resume_at_s")

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        times_put_to_sleep: Callable[[], int] = _times_put_to_sleep,
    ) -> None:
        self.clock = clock
        self.resume_at_s = clock()
        self.pause_s = self.PAUSE_MIN_S
        # Quick writes until the last slow one is forgotten.
        self.quick_to_go = 0
        self._times_put_to_sleep = times_put_to_sleep
        self._slept_before = 0

    def look_closely(self) -> None:
        """To be called before a write where `quick_to_go` is not 0."""
        self._slept_before = self._times_put_to_sleep()

    def ended(self, begun_s: float, now_s: float) -> None:
        """Learns from an inline write that took from `begun_s` to `now_s`, if it was slow or one was a while ago."""
        if now_s - begun_s > self.SLOW_S:
            if self.quick_to_go and self._times_put_to_sleep() != self._slept_before:
                self.resume_at_s = now_s + self.pause_s
                self.pause_s = min(2 * self.pause_s, self.PAUSE_MAX_S)
            self.quick_to_go = self.RECENT_WRITES
        elif self.quick_to_go:
            self.quick_to_go -= 1
            if not self.quick_to_go:
                self.pause_s = self.PAUSE_MIN_S


class LongWrites:
    """Whether the next long write had better go to a thread, beside the event loop.

    While the loop copies a long payload to the page cache, a client that has more to send fills the socket, and then
    waits. With a thread at that copy the loop receives what comes next meanwhile. But a client that waits for its
    answer waits longer, as two threads have to be woken. So one write is tried there; if the next comes before that has
    ended, it is sent there too. Otherwise it was in vain, and after each of those in a row twice as many run on the
    loop before there is another.
    """

    SKIPS_MAX = 64

    __slots__ = ("_beside", "_is_due", "_trials")

    def __init__(self) -> None:
        self._beside = 0
        self._is_due = False  # the next one goes there, however often it is tried on its way
        self._trials = Trials(self.SKIPS_MAX)

    def goes_beside(self) -> bool:
        """Whether the one that is to be written now had better not be written by the loop."""
        if self._is_due:
            return True
        if self._beside:
            self._trials.paid()
        elif self._trials.is_due():
            self._trials.in_vain()  # until another comes while it is there
        else:
            return False
        self._is_due = True
        return True

    def begin(self) -> None:
        """One goes to a thread."""
        self._is_due = False
        self._beside += 1

    def end(self) -> None:
        """It has ended there."""
        self._beside -= 1
