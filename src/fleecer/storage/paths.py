"""Names and directories: which files they lead to, how they are made durable, and what a header may make us open.

A header is written by whoever had the image, its guest included. So a name in it is never a protocol or a JSON
description, and leads, symbolic links followed, into the image's own directory or one that the operator allowed.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Sequence

from fleecer.errors import UnsupportedFormat, quoted

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Equal for two names of the same file or block device, and for no others."""
    return (status.st_rdev, 0) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def file_identity(path: str) -> tuple[int, int] | None:
    """`identity_of` what is at `path` now; None where that cannot be told."""
    try:
        return identity_of(os.stat(path))
    except OSError:
        return None


def open_unnamed(directory: str) -> io.FileIO | None:
    """A new file without a name in `directory`, mode 0600; None where the file system has no such files.

    Raises OSError. It blocks: for a thread, as `sync_directory`.
    """
    try:
        return io.FileIO(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "rb+")
    except OSError as error:
        # EISDIR is what kernels and file systems without O_TMPFILE say.
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return None
        raise


def sync_directory(path: str) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def resolve_backing(image: str, named: str, allowed: Sequence[str] = ()) -> str:
    """The real path of the backing file `named` in the header of `image`, a path.

    Raises UnsupportedFormat for a name with a protocol prefix, or one that leads outside the image's directory and the
    directories `allowed`. Nothing is opened.
    """
    if _PROTOCOL.match(named):
        raise UnsupportedFormat(
            image, f"its backing file {quoted(named)} has a protocol prefix, which a header may not use"
        )
    if not named or "\0" in named:
        raise UnsupportedFormat(image, f"its backing file {quoted(named)} is no file name")
    directory = os.path.dirname(os.path.realpath(image))
    found = os.path.realpath(os.path.join(directory, named))
    for root in (directory, *(os.path.realpath(path) for path in allowed)):
        if os.path.commonpath((root, found)) == root:
            return found
    raise UnsupportedFormat(
        image,
        f"its backing file {quoted(named)} is outside {quoted(directory)}; "
        f"--allow-backing {quoted(os.path.dirname(found))} would allow it",
    )
