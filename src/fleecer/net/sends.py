"""Sends by the kernel's own workers: long replies are copied to their socket while the loop reads the next ones.

Half of what a long read costs is that copy, and the loop has but one processor. A thread of ours would want the
interpreter before and after each, which costs more than the copy; the kernel is asked for it through io_uring instead
(sendmsg(2) with IOSQE_ASYNC, which never runs in the thread that asks), and tells through one descriptor when it
is done. The ring is spoken to by its memory, as io_uring(7) has it, since the library that reads use (storage/ring.py)
has no word for that flag.

A loop that has nothing else to do meanwhile gains nothing, and two threads have to wake. So this is for callers that
know of more work.

Invariants:
- All methods are called in the event loop whose it is. The ring is there from the first send until the last stream
  that uses this has ended.
- What was begun ends soon, as the kernel takes what there is room for and no more; `ended` is told once, in a later
  turn of the loop. Until then the memory of its pieces is the kernel's: the caller keeps it, and keeps it as it is.
- Until then the caller keeps the descriptor open too: the worker looks at the number when it begins, and sends to
  whatever has it by then.
- At most one send of a socket is under way: its bytes have an order. Streams see to that.
- Nothing is entrusted to a ring before it has ended a trial as it must, a send to a socket without room: where no
  worker can be made nothing ends, or all that does has failed, and old kernels wait for room.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import platform
import socket
import struct
import weakref
from collections.abc import Callable, Sequence

from fleecer.ranges import Buffer
from fleecer.units import KiB, MiB

SWITCH_VARIABLE = "FLEECER_IO_URING"
"""`off` there means that the loop shall send itself."""

BYTES_MIN = 128 * KiB
"""A worker that wakes for less costs as much as it saves."""
BYTES_MAX = 1 * MiB + 64 * KiB
"""What a stream holds of memory so, besides what waits in its queue: a long turn, with the heads of its replies."""
PIECES_MAX = 64
SENDS_MAX = 8
"""Under way at once; one less than there are processors, if that is less: one of them is the loop's."""
_COPIED_MAX = 64
"""Shorter pieces, the heads of replies, are copied: to find out where they are costs more."""

# asm/unistd.h, the same on all machines that have them.
_SETUP, _ENTER = 425, 426
# linux/io_uring.h
_SENDMSG, _ASYNC = 9, 1 << 4
_RINGS_AT, _ENTRIES_AT = 0, 0x1000_0000
_ONE_MAPPING = 1
_MESSAGE = struct.Struct("<7Q")  # struct msghdr
_PIECE_COUNT, _PIECE_COUNT_AT = struct.Struct("<Q"), 24
_PARAMETERS = struct.Struct("<2I3I I I3I 10I 10I")
_ENTRY = struct.Struct("<BBHiQQIIQQQQ")
_COMPLETION = struct.Struct("<QiI")

_syscall = ctypes.PyDLL(None, use_errno=True).syscall  # neither waits, so the interpreter need not be let go of
_syscall.restype = ctypes.c_long

_OF_SOCKETS = frozenset({errno.EAGAIN, errno.EINTR, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
"""What sockets fail with; all else says that there are no workers for us."""

_Ended = Callable[[int], None]


def _address(memory: Buffer) -> int:
    """Where it is. Raises TypeError where it cannot be written, as Python does not tell then."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _Slot:
    """What the kernel is told of one send: struct msghdr, and what it points to."""

    __slots__ = ("address", "ended", "heads", "heads_address", "message", "vector")

    def __init__(self) -> None:
        # Views, as what somebody views cannot be moved.
        self.heads = memoryview(bytearray(PIECES_MAX * _COPIED_MAX))
        self.heads_address = _address(self.heads)
        self.vector = memoryview(bytearray(PIECES_MAX * 16)).cast("Q")
        self.message = memoryview(bytearray(_MESSAGE.size))
        self.address = _address(self.message)
        _MESSAGE.pack_into(self.message, 0, 0, 0, _address(self.vector), 0, 0, 0, 0)
        self.ended: _Ended | None = None

    def fill(self, pieces: Sequence[Buffer]) -> bool:
        """Names the pieces. False where one is long and cannot be written, as Python does not tell where that is."""
        vector, used = self.vector, 0
        for index, piece in enumerate(pieces):
            length = len(piece)
            if length <= _COPIED_MAX:
                self.heads[used : used + length] = piece
                vector[2 * index] = self.heads_address + used
                used += length
            else:
                try:
                    vector[2 * index] = _address(piece)
                except TypeError:
                    return False
            vector[2 * index + 1] = length
        _PIECE_COUNT.pack_into(self.message, _PIECE_COUNT_AT, len(pieces))
        return True


class _Ring:
    """The two queues that we share with the kernel. Raises OSError where there can be none."""

    def __init__(self, entries: int) -> None:
        parameters = bytearray(_PARAMETERS.size)
        place = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        self.fd = _syscall(ctypes.c_long(_SETUP), ctypes.c_long(entries), place)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "the kernel gives no ring")
        try:
            fields = _PARAMETERS.unpack(parameters)
            if not fields[5] & _ONE_MAPPING:
                raise OSError("the kernel is too old")
            to_do, done = fields[10:20], fields[20:30]
            length = max(to_do[6] + 4 * fields[0], done[5] + _COMPLETION.size * fields[1])
            self._queues = mmap.mmap(self.fd, length, flags=mmap.MAP_SHARED, offset=_RINGS_AT)
            self._entries = mmap.mmap(self.fd, _ENTRY.size * fields[0], flags=mmap.MAP_SHARED, offset=_ENTRIES_AT)
        except BaseException:
            os.close(self.fd)
            raise
        # A loop that goes away before its streams have ended gives it back all the same.
        self._give_back = weakref.finalize(self, os.close, self.fd)
        self._words = memoryview(self._queues).cast("I")
        self._tail, self._mask, self._order = to_do[1] // 4, self._words[to_do[2] // 4], to_do[6] // 4
        self._done_head, self._done_tail = done[0] // 4, done[1] // 4
        self._done_mask, self._done_at = self._words[done[2] // 4], done[5]

    def begin(self, fd: int, message_address: int, number: int) -> bool:
        """Begins to send a message. False, with nothing begun, where the kernel takes no more just now."""
        words = self._words
        tail = words[self._tail]
        index = tail & self._mask
        _ENTRY.pack_into(
            self._entries,
            index * _ENTRY.size,
            _SENDMSG,
            _ASYNC,
            0,
            fd,
            0,
            message_address,
            1,
            socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            number,
            0,
            0,
            0,
        )
        words[self._order + index] = index
        words[self._tail] = (tail + 1) & 0xFFFFFFFF
        if _syscall(ctypes.c_long(_ENTER), ctypes.c_long(self.fd), ctypes.c_long(1), ctypes.c_long(0), None) == 1:
            return True
        words[self._tail] = tail  # it was not taken
        return False

    def completions(self) -> list[tuple[int, int]]:
        """Number and result of each message whose sending has ended since."""
        words = self._words
        head, tail = words[self._done_head], words[self._done_tail]
        found = []
        while head != tail:
            at = self._done_at + (head & self._done_mask) * _COMPLETION.size
            number, result, _ = _COMPLETION.unpack_from(self._queues, at)
            found.append((number, result))
            head = (head + 1) & 0xFFFFFFFF
        words[self._done_head] = head
        return found

    def close(self) -> None:
        """Gives it back."""
        self._words.release()
        self._queues.close()
        self._entries.close()
        self._give_back()


class Sends:
    """The sends of one event loop; see `sends_of`."""

    def __init__(self, limit: int) -> None:
        self._users = 0
        self._slots = [_Slot() for _ in range(limit)]
        self._free = list(range(limit))
        self._ring: _Ring | None = None
        self._trial: tuple[socket.socket, socket.socket] | None = None  # while it goes on
        self._is_refused = False

    def enter(self) -> None:
        """One more stream may ask for sends, until it calls `leave`."""
        self._users += 1

    def leave(self) -> None:
        """A stream has ended, and so have its sends."""
        self._users -= 1
        self._close_unused()

    def begin(self, fd: int, pieces: Sequence[Buffer], ended: _Ended) -> bool:
        """Begins what sendmsg(2) does with these pieces, without waiting for room.

        `ended` is told how many bytes the kernel took, or an error number below zero; until then the caller keeps the
        pieces, unchanged. False, with nothing begun, where it had better send them itself.
        """
        if self._is_refused or self._trial is not None or not self._free or len(pieces) > PIECES_MAX:
            return False
        ring = self._ring
        if ring is None:
            self._open()
            return False
        number = self._free[-1]
        slot = self._slots[number]
        if not slot.fill(pieces) or not ring.begin(fd, slot.address, number):
            return False
        self._free.pop()
        slot.ended = ended
        return True

    def _open(self) -> None:
        """Asks for a ring, and begins to try it."""
        try:
            self._ring = ring = _Ring(len(self._slots))
            self._trial = ours, _ = _full_sockets()
        except OSError:
            self._is_refused = True
            return
        asyncio.get_running_loop().add_reader(ring.fd, self._collect)
        number = self._free.pop()
        slot = self._slots[number]
        slot.fill([b"?"])
        slot.ended = self._tried
        if not ring.begin(ours.fileno(), slot.address, number):
            self._free.append(number)
            self._tried(-errno.EBUSY)

    def _tried(self, result: int) -> None:
        """The trial has ended; its sockets are not closed before, as for all sends."""
        self._is_refused = self._is_refused or result != -errno.EAGAIN
        for sock in self._trial or ():
            sock.close()
        self._trial = None
        self._close_unused()

    def _close_unused(self) -> None:
        if not self._users and self._ring is not None and self._trial is None:
            asyncio.get_running_loop().remove_reader(self._ring.fd)
            self._ring.close()
            self._ring = None

    def _collect(self) -> None:
        if self._ring is None:
            return
        loop = asyncio.get_running_loop()
        for number, result in self._ring.completions():
            slot = self._slots[number]
            ended, slot.ended = slot.ended, None
            self._free.append(number)
            assert ended is not None, "the kernel told of a send that was not begun"
            if result < 0 and -result not in _OF_SOCKETS:
                self._is_refused = True
            loop.call_soon(ended, result)


def _full_sockets() -> tuple[socket.socket, socket.socket]:
    """Two that are connected, the first of which has no room for more."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(4 * KiB))
    return ours, theirs


_sends: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Sends] = weakref.WeakKeyDictionary()


def sends_of(loop: asyncio.AbstractEventLoop) -> Sends | None:
    """What sends for the streams of that loop; None where the loop shall do it itself.

    That is on a machine with one processor, and on others than x86-64: the two sides see each other's memory in order
    there, without the barriers that Python has no word for.
    """
    spare = min(SENDS_MAX, len(os.sched_getaffinity(0)) - 1)
    if spare < 1 or platform.machine() != "x86_64" or os.environ.get(SWITCH_VARIABLE) == "off":
        return None
    sends = _sends.get(loop)
    if sends is None:
        sends = _sends[loop] = Sends(spare)
    return sends
