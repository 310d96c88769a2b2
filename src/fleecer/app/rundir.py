"""The run directory: where one daemon has its sockets, and where its clients find them.

Invariants: at most one daemon holds a run directory, by flock(2) on `daemon.lock` in it, which a crash releases; the
directory is its user's alone to write to. Sockets left by a crash are taken over where they are listened at.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from fleecer.errors import InUse, IoError, UsageError, quoted
from fleecer.net.unixpath import SOCKET_PATH_BYTES_MAX

QMP_SOCKET = "qmp.sock"
NBD_SOCKET = "nbd.sock"
LOCK_FILE = "daemon.lock"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_run_directory() -> str:
    """`/run/fleecer` for root, else `$XDG_RUNTIME_DIR/fleecer`. Raises UsageError where there is no such variable."""
    if os.geteuid() == 0:
        return "/run/fleecer"
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise UsageError("XDG_RUNTIME_DIR is not set, so there is no default run directory; name one with --run-dir")
    return os.path.join(base, "fleecer")


@contextlib.contextmanager
def claimed(path: str) -> Iterator[str]:
    """Holds a run directory, made if need be (mode 0700); inside, nobody else does. Gives its absolute path.

    Raises InUse naming the process that has it, UsageError for a directory unfit to hold sockets, IoError.
    """
    path = os.path.abspath(path)
    if len(os.fsencode(os.path.join(path, NBD_SOCKET))) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"run directory {quoted(path)}: its sockets' paths would be longer than {SOCKET_PATH_BYTES_MAX} bytes; "
            "choose a shorter one"
        )
    _make(path)
    try:
        lock = os.open(os.path.join(path, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        what = f"make {LOCK_FILE} in the run directory"
        raise IoError(error.errno or errno.EIO, path, what, detail=_advised(error)) from error
    try:
        _lock(lock, path)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        yield path
    finally:
        os.close(lock)


def _make(path: str) -> None:
    """Makes the directory, unless it is there, and sees that it is one that only this user can write to."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.stat(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"run directory {quoted(path)}: it, or a part of its path, is no directory; choose another with --run-dir"
        ) from error
    except OSError as error:
        what = "make the run directory"
        raise IoError(error.errno or errno.EIO, path, what, detail=_advised(error)) from error
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"run directory {quoted(path)} belongs to user {status.st_uid}, not to you ({os.geteuid()}); "
            "choose another with --run-dir"
        )
    if status.st_mode & _OTHERS_WRITE:
        raise UsageError(
            f"run directory {quoted(path)} can be written to by other users (mode {stat.S_IMODE(status.st_mode):o}); "
            "take that from them (chmod go-w), or choose another with --run-dir"
        )


def _advised(error: OSError) -> str:
    return f"{error.strerror}; choose another with --run-dir"


def _lock(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        whom = f"process {holder}" if holder.isdecimal() else "another process"
        raise InUse(
            f"run directory {quoted(path)} is in use by {whom}; stop that, or choose another with --run-dir"
        ) from None
    except OSError as error:
        raise IoError(error.errno or errno.ENOLCK, path, "lock the run directory") from error
