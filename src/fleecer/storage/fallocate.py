"""Zeroing and freeing ranges of a file without writing them: fallocate(2), which `os` lacks.

Every function runs in a thread that may block, retries what a signal interrupted, and raises plain `OSError`; the
caller wraps it. Modes that a file does not support are remembered per file in a `Modes`.

On block devices fallocate is used as well, not the BLKDISCARD and BLKZEROOUT ioctls: it keeps the page cache right, and
punching there promises zeroes, while after BLKDISCARD a device may return anything.
"""

from __future__ import annotations

import ctypes
import errno
import os

from fleecer.ranges import zeroes
from fleecer.units import MiB

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# linux/magic.h: file systems that live in memory
_TMPFS_MAGIC = 0x01021994
_RAMFS_MAGIC = 0x858458F6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class Modes:
    """Which modes of fallocate a file has not refused yet."""

    __slots__ = ("_refused",)

    def __init__(self) -> None:
        self._refused: set[int] = set()

    def attempt(self, fd: int, mode: int, offset: int, length: int) -> bool:
        """Runs fallocate(2) and returns True, or False, nothing changed, where the file does not support `mode`.

        Raises OSError when it failed otherwise.
        """
        if mode in self._refused:
            return False
        try:
            fallocate(fd, mode, offset, length)
        except OSError as error:
            # ENOTTY comes from FUSE and old drivers, ENOSYS from file systems without the call.
            if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}:
                raise
            self._refused.add(mode)
            return False
        return True


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def zero_range(fd: int, modes: Modes, offset: int, length: int, *, unmap: bool) -> None:
    """Makes a range inside the file read as zeroes, in the cheapest way that the file supports.

    With `unmap` its space is freed if possible, else it is kept or allocated. After an OSError the range holds old
    bytes or zeroes. A range past the end of the file is left as it is, unless the zeroes had to be written out.
    """
    if unmap and modes.attempt(fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
        return
    if modes.attempt(fd, ZERO_RANGE | KEEP_SIZE, offset, length):
        return
    # tmpfs has no ZERO_RANGE, yet can punch and then allocate anew.
    if modes.attempt(fd, PUNCH_HOLE | KEEP_SIZE, offset, length) and modes.attempt(fd, KEEP_SIZE, offset, length):
        return
    write_zeroes(fd, offset, length)


def write_zeroes(fd: int, offset: int, length: int) -> None:
    """Writes zeroes out, a MiB at a time. Raises OSError."""
    end = offset + length
    while offset < end:
        count = os.pwrite(fd, zeroes(min(end - offset, MiB)), offset)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += count


def can_punch(fd: int, end: int) -> bool:
    """Whether holes can be punched: tried past the `end` of a regular file, where there is nothing to lose."""
    return Modes().attempt(fd, PUNCH_HOLE | KEEP_SIZE, end, 4096)


def is_in_memory(fd: int) -> bool:
    """Whether the file lies on tmpfs or ramfs, where no read waits for a disk."""
    buffer = ctypes.create_string_buffer(512)  # more than any struct statfs; its first field is f_type
    if _libc.fstatfs(fd, buffer):
        return False
    f_type = ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
    return f_type in {_TMPFS_MAGIC, _RAMFS_MAGIC}
