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

QMP_SOCKET = "qmp.sock"
NBD_SOCKET = "nbd.sock"
LOCK_FILE = "daemon.lock"
_SOCKET_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, the last one is zero


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
    if len(os.fsencode(os.path.join(path, NBD_SOCKET))) > _SOCKET_PATH_MAX:
        raise UsageError(
            f"run directory {quoted(path)}: its sockets' paths would be longer than {_SOCKET_PATH_MAX} bytes; "
            "choose a shorter one"
        )
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.stat(path)
        lock = os.open(os.path.join(path, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise IoError(error.errno or errno.EIO, path, "make the run directory") from error
    try:
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise UsageError(f"run directory {quoted(path)} can be written to by other users; make it yours alone")
        _lock(lock, path)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        yield path
    finally:
        os.close(lock)


def _lock(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        whom = f"process {holder}" if holder.isdecimal() else "another process"
        raise InUse(f"run directory {quoted(path)} is in use by {whom}") from None
    except OSError as error:
        raise IoError(error.errno or errno.ENOLCK, path, "lock the run directory") from error
