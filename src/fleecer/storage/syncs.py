"""Syncs by the kernel's own workers: for the flushes of guests, without a thread of ours for each.

A thread costs a sync more than a quick disk does, most of it because both sides want the interpreter. Here the kernel
is asked for it as asynchronous I/O (io_submit(2), with IOCB_CMD_FDSYNC), which is what fdatasync(2) does, and tells
through one descriptor when some are done. Containers allow that where they forbid io_uring. Where it cannot be had, as
on machines whose call numbers are not known here, threads sync.

Invariants:
- It belongs to the event loop it was made in; all its methods are called there.
- What was begun runs to its end, of which whoever began it is told once, in a later turn of the loop.
- To ask never waits for the disk: a worker of the kernel's does. It runs on our processor, so the loop goes to sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import platform
import sys
import weakref
from collections.abc import Callable

from fleecer.polling import polling_of
from fleecer.storage.lanes import hand_on
from fleecer.waiters import Waiters

SWITCH_VARIABLE = "FLEECER_AIO"
"""`off` there means that threads shall sync."""

SYNCS_MAX = 64
"""Under way at once; more are for threads."""

# asm/unistd.h: io_setup, io_destroy, io_submit, io_getevents
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4), "riscv64": (0, 1, 2, 4)}

# linux/aio_abi.h
_FDSYNC = 3
_TELL_BY_EVENTFD = 1

_Ended = Callable[[int], None]

_syscall = ctypes.PyDLL(None, use_errno=True).syscall  # none of these waits, so the interpreter need not be let go of
_syscall.restype = ctypes.c_long


class _Request(ctypes.Structure):
    """struct iocb."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key_and_rw_flags", ctypes.c_uint64),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class Syncs:
    """The kernel's queue of one event loop; see `open_syncs`."""

    def __init__(self, calls: tuple[int, int, int, int], context: int, fd: int) -> None:
        _, destroy, self._submit, self._get_events = map(ctypes.c_long, calls)
        self._context = ctypes.c_ulong(context)
        self._ended: dict[int, _Ended] = {}  # by the number in a request's data
        self._serial = 0
        self._idle = Waiters()
        self._fd = fd
        # A loop that goes away without closing this gives back what the system has but so many of.
        self._give_back = weakref.finalize(self, _give_back, destroy, self._context, fd)
        # The kernel copies a request when it is asked, so one will do for all.
        self._request = _Request(opcode=_FDSYNC, flags=_TELL_BY_EVENTFD, eventfd=self._fd)
        self._requests = ctypes.byref(ctypes.pointer(self._request))
        self._events = (_Event * SYNCS_MAX)()
        loop = asyncio.get_running_loop()
        self._polling = polling_of(loop)
        loop.add_reader(self._fd, self._collect)

    def begin(self, fd: int, ended: _Ended) -> bool:
        """Begins what fdatasync(2) does; `ended` is told 0, or an error number below zero.

        False, with nothing begun, where the kernel takes no more, or does not sync that file so: use a thread.
        """
        if len(self._ended) >= SYNCS_MAX:
            return False
        self._serial += 1
        self._request.data = self._serial
        self._request.fd = fd
        if _syscall(self._submit, self._context, ctypes.c_long(1), self._requests) != 1:
            return False
        self._ended[self._serial] = ended
        if self._polling is not None:
            self._polling.suspend()
        return True

    @property
    def busy(self) -> bool:
        """Whether any sync is under way."""
        return bool(self._ended)

    async def idle(self) -> None:
        """Returns when all that was begun has ended, and whoever began it has been told."""
        while self._ended:
            await self._idle.wait()

    def close(self) -> None:
        """Gives the queue back, which must be idle. A second call does nothing."""
        assert not self._ended, "a queue of syncs was closed with some under way"
        if self._give_back.alive:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._give_back()

    def _collect(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        count = _syscall(
            self._get_events, self._context, ctypes.c_long(0), ctypes.c_long(SYNCS_MAX), self._events, None
        )
        if count < 0:
            if ctypes.get_errno() == errno.EINTR:  # there was nothing to tell, and a signal
                return
            raise OSError(ctypes.get_errno(), "the kernel does not tell which syncs are done")
        for number, result in [(event.data, event.result) for event in self._events[:count]]:
            if self._polling is not None:
                self._polling.resume()
            hand_on(self._ended.pop(number), result)
        if count and self._polling is not None:
            self._polling.arrived()
        if not self._ended:
            self._idle.wake()


def open_syncs() -> Syncs | None:
    """A queue for the running event loop; None where none is wanted, or none can be had."""
    calls = _CALLS.get(platform.machine())
    if calls is None or sys.maxsize < 1 << 32 or os.environ.get(SWITCH_VARIABLE) == "off":
        return None
    try:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except OSError:
        return None
    context = ctypes.c_ulong(0)
    if _syscall(ctypes.c_long(calls[0]), ctypes.c_long(SYNCS_MAX), ctypes.byref(context)):
        os.close(fd)
        return None
    try:
        return Syncs(calls, context.value, fd)
    except OSError:  # the loop cannot watch the descriptor; what was made of it is given back as it goes
        return None


def _give_back(destroy: ctypes.c_long, context: ctypes.c_ulong, fd: int) -> None:
    _syscall(destroy, context)
    os.close(fd)
