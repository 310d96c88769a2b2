"""The one tree of errors: what went wrong, with which object, and what may be done about it.

    FleecerError                  anything a user or peer is told; one line, no traceback
    +-- UsageError                what was asked for makes no sense; ask differently
    +-- ProtocolError             a peer or a caller broke a protocol's rules
    |   +-- RemoteProtocolError   they did: drop the connection
    |   +-- LocalProtocolError    we did: a bug, or a misuse of a codec
    +-- FormatError               an image is not what it says (path, and where in it)
    |   +-- UnsupportedFormat     sound, but beyond us
    |   +-- CorruptImage          broken; nothing was written to it
    +-- IoError                   a request failed (errno, node, operation, offset, length)
    |   +-- CannotOpen            an image could not be opened
    |   +-- SnapshotBroken        the snapshot can no longer be read; the disk itself is fine
    +-- GraphError                the block graph does not allow it
    |   +-- NotFound              no such node, export, job, snapshot
    |   +-- InUse                 still needed by something that is named
    |   +-- PermissionConflict    somebody else writes, or must not
    +-- JobError                  a job cannot do that in the state it is in

Invariants: every error tells the object, the value and the limit in one line of text; an `OSError` is wrapped once,
where it is raised (storage/ and net/); `errno` is what an NBD client is told, after one translation in wire/nbd.
Text that came from a guest, an image or a peer is quoted by `quoted` before it enters a message.
"""

from __future__ import annotations

import errno as _errno
import os

QUOTED_CHARACTERS_MAX = 256


class FleecerError(Exception):
    """Base of everything that Fleecer reports. `errno` is the POSIX number closest to the cause."""

    errno: int = _errno.EIO


class UsageError(FleecerError):
    """The request itself is wrong; nothing was done."""

    errno = _errno.EINVAL


class ProtocolError(FleecerError):
    """A protocol's rules were broken."""

    errno = _errno.EPROTO


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules; the connection cannot go on."""


class LocalProtocolError(ProtocolError):
    """This side broke the rules; nothing was sent."""


class FormatError(FleecerError):
    """An image cannot be used. `path` names it (or the node it is read through)."""

    errno = _errno.EINVAL

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"image {quoted(path)}: {problem}")
        self.path = path
        self.problem = problem


class UnsupportedFormat(FormatError):
    """The image is sound as far as we can tell, but uses what we do not know or were told not to guess."""

    errno = _errno.ENOTSUP


class CorruptImage(FormatError):
    """The image contradicts itself. Nothing was written because of it, save its own corrupt mark where that is said."""

    errno = _errno.EIO


class IoError(FleecerError):
    """A request to a node or a storage failed.

    `errno` is never 0. `offset` and `length` are bytes, both 0 where the operation has no range. What the range holds
    after a failed write is, for every sector, the old or the new bytes.
    """

    def __init__(
        self, errno: int, node: str, operation: str, offset: int = 0, length: int = 0, detail: str = ""
    ) -> None:
        place = f" of {length} bytes at {offset}" if length else ""
        super().__init__(f"{operation}{place} on {quoted(node)}: {detail or os.strerror(errno)}")
        self.errno = errno or _errno.EIO
        self.node = node
        self.operation = operation
        self.offset = offset
        self.length = length
        self.detail = detail


class CannotOpen(IoError):
    """An image could not be opened. `why` follows its name; `needed_by` is the image whose header names it, if any."""

    def __init__(self, errno: int, path: str, why: str, *, needed_by: str = "") -> None:
        super().__init__(errno, path, "open", detail=why)
        image = f"image {quoted(needed_by)}: its backing file" if needed_by else "image"
        self.args = (f"{image} {quoted(path)} {why}",)
        self.why = why
        self.needed_by = needed_by


class SnapshotBroken(IoError):
    """A snapshot was given up. `cause` is the first failure; the disk and its writers are not affected."""

    def __init__(self, snapshot: str, cause: str) -> None:
        super().__init__(_errno.EIO, snapshot, "read", detail=cause)
        self.args = (f"snapshot {quoted(snapshot)} is broken: {cause}",)
        self.cause = cause


class GraphError(FleecerError):
    """The block graph, as it stands, forbids the request; it was left as it was."""

    errno = _errno.EBUSY


class NotFound(GraphError):
    """No object of that kind and name."""

    errno = _errno.ENOENT

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {quoted(name)} does not exist")
        self.kind = kind
        self.name = name


class InUse(GraphError):
    """The object is needed by another, which the message names."""


class PermissionConflict(GraphError):
    """Granting this would let two parties change, or rely on, the same data."""

    errno = _errno.EPERM


class JobError(FleecerError):
    """A job does not allow that verb in its present state."""

    errno = _errno.EBUSY


def quoted(text: str) -> str:
    """Text from outside, made fit for one line: quoted, escaped, and cut at `QUOTED_CHARACTERS_MAX` characters."""
    shown = text if len(text) <= QUOTED_CHARACTERS_MAX else text[:QUOTED_CHARACTERS_MAX] + "..."
    if shown.isprintable() and "'" not in shown and "\\" not in shown:  # as most of it is
        return f"'{shown}'"
    escaped = "".join(c if c.isprintable() and c not in "'\\" else ascii(c)[1:-1] for c in shown)
    return f"'{escaped}'"


def told(error: BaseException) -> str:
    """One line that tells what happened, for a user, whatever the exception's type."""
    if isinstance(error, OSError) and error.strerror:
        subject = f"{quoted(os.fsdecode(error.filename))}: " if error.filename is not None else ""
        return f"{subject}{error.strerror}"
    text = str(error) or type(error).__name__
    return " ".join(text.split())
