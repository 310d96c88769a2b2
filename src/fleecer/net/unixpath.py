"""Paths of unix sockets, which the system limits to far less than those of files."""

from __future__ import annotations

import os

from fleecer.errors import UsageError, quoted

SOCKET_PATH_BYTES_MAX = 107
"""unix(7): sun_path has 108 bytes, the last of which is zero."""


def check_socket_path(path: str) -> None:
    """Raises UsageError for a path at which no socket can be."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"socket path {quoted(path)} has {length} bytes, more than the {SOCKET_PATH_BYTES_MAX} that the system "
            "takes; choose a shorter one"
        )
    if not path or "\0" in path:
        raise UsageError(f"socket path {quoted(path)} is empty or has a NUL in it; name a file")
