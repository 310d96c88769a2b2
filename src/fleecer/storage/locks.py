"""Locks on images, by the rules of QEMU's file driver, so that it and we keep each other from harm.

For each permission p an opener holds a shared lock on byte 100 + p if it uses p, and on byte 200 + p if it does not let
others use p. It then asks whether anybody else holds 200 + p for a p it uses, or 100 + p for a p it does not share.
All locks are shared ones, so nobody ever waits; both openers of a race may be refused, never both let in.

The locks belong to the open file description (F_OFD_SETLK), not to the process: closing another descriptor of the same
file does not lose them, and a second open in this process conflicts like any other.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct

from fleecer.errors import IoError, PermissionConflict, quoted

_USED_BASE = 100
_UNSHARED_BASE = 200
_FLOCK = "hhqqi4x"  # struct flock: l_type, l_whence, l_start, l_len, l_pid


class Permission(enum.IntEnum):
    """QEMU's block permissions, by the number of their lock byte."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


_READS = frozenset({Permission.CONSISTENT_READ})
_WRITES = frozenset({Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE})
_CHANGES = frozenset({Permission.WRITE, Permission.RESIZE})


def lock_image(fd: int, path: str, *, writable: bool, force_share: bool = False) -> None:
    """Takes the locks of an opener that reads, or reads and writes, and puts up with no other writer.

    With `force_share` (QEMU's -U) a reader puts up with writers too. The locks go when the last descriptor of this open
    file description is closed. Raises PermissionConflict where somebody holds the image in a way that excludes this
    use, IoError where the file system has no locks; the caller then closes `fd`.
    """
    uses = _WRITES if writable else _READS
    unshared = _CHANGES if writable or not force_share else frozenset()
    try:
        for permission in uses:
            _hold(fd, _USED_BASE + permission)
        for permission in unshared:
            _hold(fd, _UNSHARED_BASE + permission)
        changed = any(_held_by_another(fd, _USED_BASE + permission) for permission in unshared)
        relied_on = any(_held_by_another(fd, _UNSHARED_BASE + permission) for permission in uses)
    except OSError as error:
        code = error.errno or errno.ENOLCK
        detail = f"{os.strerror(code)}; if nothing else uses it, open it without locking"
        raise IoError(code, path, "lock", detail=detail) from error
    if changed:
        raise PermissionConflict(f"image {quoted(path)}: another process holds it for writing (lock); stop it first")
    if relied_on:
        use = "writing" if writable else "reading"
        raise PermissionConflict(
            f"image {quoted(path)}: another process has it open and allows no {use} by others (lock); stop it first"
        )


def _hold(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _held_by_another(fd: int, byte: int) -> bool:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK
