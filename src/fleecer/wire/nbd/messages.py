"""The values that both roles exchange with their owner: exports, requests, replies; and the translation of errors.

`Request` and `Reply` are made once per request on the hot path: structures that are made in C, which cannot be in a
reference cycle, without checks or properties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import msgspec

from fleecer.errors import NotFound, UsageError, quoted
from fleecer.ranges import Buffer, is_power_of_two
from fleecer.units import MiB
from fleecer.wire.nbd.constants import (
    BLOCK_SIZE_MIN_MAX,
    BLOCK_SIZE_PREFERRED_MIN,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_READ,
    CMD_WRITE_ZEROES,
    EINVAL,
    EIO,
    ENOTSUP,
    EOVERFLOW,
    ERROR_OF_ERRNO,
    FLAG_CAN_MULTI_CONN,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    SIZE_MAX,
    STRING_MAX_BYTES,
)

_NO_MAXIMUM = 0xFFFFFFFF


class ExportUnknown(NotFound):
    """The server has no such export, or does not show it to us. Its own words, if any, end the message."""

    def __init__(self, name: str, words: str) -> None:
        super().__init__("export", name)
        if words:
            self.args = (f"{self}: the server says {quoted(words)}",)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """What a server says about an export. Sizes are bytes.

    contexts              names of the metadata contexts it offers, each "namespace:leaf"
    can_multi_conn        a flush on one connection covers what was written on all
    block_size_min        requests should be multiples (a power of two, at most 64 KiB)
    block_size_preferred  requests are served best so (a power of two, at least 512)
    block_size_max        longest request

    Raises UsageError for values that the protocol cannot carry or forbids ("Block size constraints", "Conventions").
    """

    name: str
    description: str = ""
    size: int
    read_only: bool = False
    can_multi_conn: bool = False
    can_trim: bool = False
    can_fast_zero: bool = False
    rotational: bool = False
    block_size_min: int = 1
    block_size_preferred: int = 4096
    block_size_max: int = 32 * MiB
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UsageError(f"export {quoted(self.name)}: {problem}")

    def _problem(self) -> str:
        smallest, preferred, largest = self.block_size_min, self.block_size_preferred, self.block_size_max
        for text in (self.name, self.description, *self.contexts):
            if not is_string(text):
                return f"{quoted(text)} is no NBD string (UTF-8, no NUL, at most {STRING_MAX_BYTES} bytes)"
        if not 0 <= self.size <= SIZE_MAX:
            return f"size {self.size} is not in 0..{SIZE_MAX}"
        if not is_power_of_two(smallest) or smallest > BLOCK_SIZE_MIN_MAX:
            return f"minimum block size {smallest} is no power of two up to {BLOCK_SIZE_MIN_MAX}"
        if not is_power_of_two(preferred) or preferred < max(smallest, BLOCK_SIZE_PREFERRED_MIN):
            return f"preferred block size {preferred} is no power of two from {max(smallest, BLOCK_SIZE_PREFERRED_MIN)}"
        if largest != _NO_MAXIMUM and (largest % smallest or not 0 < largest < _NO_MAXIMUM):
            return f"maximum block size {largest} is no multiple of the minimum {smallest} in 32 bits"
        if largest < min(preferred, self.size):
            return f"maximum block size {largest} is below the preferred one, {preferred}"
        return ""

    def transmission_flags(self, structured: bool) -> int:
        """The flags that announce this export ("Transmission flags")."""
        flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE
        if self.rotational:
            flags |= FLAG_ROTATIONAL
        if self.can_multi_conn:
            flags |= FLAG_CAN_MULTI_CONN
        if structured:
            flags |= FLAG_SEND_DF
        if self.read_only:
            return flags | FLAG_READ_ONLY
        if self.can_trim:
            flags |= FLAG_SEND_TRIM
        if self.can_fast_zero:
            flags |= FLAG_SEND_FAST_ZERO
        return flags | FLAG_SEND_WRITE_ZEROES


class Catalogue(Protocol):
    """Where a server codec looks exports up. The empty name asks for the default export, if there is one.

    The methods say no with None; what they raise is a bug, and reaches the caller of `received`.
    """

    def names(self) -> Iterable[tuple[str, str]]:
        """Name and description of each export that may be listed."""

    def find(self, name: str) -> ExportInfo | None:
        """What `name` offers; None if it does not exist. No side effect."""

    def enter(self, name: str) -> ExportInfo | None:
        """Takes the export into use by this connection, in the moment the client is told that transmission begins.

        Called once for each such attempt; None (it vanished, it is full, it is not for this client) refuses it.
        """


class Parts(msgspec.Struct, gc=False, eq=False):
    """A read that is answered in parts: `left` is how many have no reply yet."""

    left: int


class Request(msgspec.Struct, gc=False, eq=False):
    """One request of a client.

    command, flags  CMD_* and CMD_FLAG_* of `constants`; the flags were checked, and FUA is legal on every command
    cookie          the client's mark for it, echoed in the reply
    offset, length  bytes of the export, inside it unless `error` is set; a length of 0 asks for nothing and succeeds
    data            the payload of a write, private to the request; else empty
    error, message  not 0: the request breaks a rule and must be answered by `reply_error` with just these
    answered        set by the codec with the final reply
    parts           this is a part of a read, and what it shares with the others; see `ServerCodec.split`
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: Buffer = b""
    error: int = 0
    message: str = ""
    answered: bool = False
    parts: Parts | None = None


class Reply(msgspec.Struct, gc=False, eq=False):
    """The outcome of a request that a client sent; while the request is in flight, its state inside the codec.

    cookie, command, flags, offset, length  as sent
    error, message  POSIX error number, 0 for success; the server's words as they came (quote them before showing)
    data            what was read: `length` bytes, private to the reply; else empty
    extents         block status: for each context (length, flags) runs from `offset` on, together at most `length`
    pieces          of a read in flight: the runs received so far as sorted (start, end) offsets
    chunks          content chunks received so far
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    error: int = 0
    message: str = ""
    data: bytearray = msgspec.field(default_factory=bytearray)
    extents: dict[str, list[tuple[int, int]]] = msgspec.field(default_factory=dict)
    pieces: list[tuple[int, int]] = msgspec.field(default_factory=list)
    chunks: int = 0


def error_value(errno_code: int, command: int, flags: int) -> int:
    """The error value that tells a client of `errno_code`; never 0.

    EOVERFLOW is for unfragmented reads and ENOTSUP for fast zeroing only ("Error values"); elsewhere both are EINVAL.
    What the protocol has no value for is EIO.
    """
    error = ERROR_OF_ERRNO.get(errno_code, EIO)
    if error == EOVERFLOW and not (command == CMD_READ and flags & CMD_FLAG_DF):
        return EINVAL
    if error == ENOTSUP and not (command == CMD_WRITE_ZEROES and flags & CMD_FLAG_FAST_ZERO):
        return EINVAL
    return error


def is_string(text: str) -> bool:
    """Whether `text` is fit to be sent as a string ("Conventions")."""
    try:
        return "\0" not in text and len(text.encode()) <= STRING_MAX_BYTES
    except UnicodeEncodeError:
        return False


def decode_string(data: bytes) -> str | None:
    """A string from the peer; None if it breaks the protocol's rules for strings ("Conventions")."""
    if len(data) > STRING_MAX_BYTES or b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def encode_text(text: str) -> bytes:
    """`text` for a person at the other end: made legal, and cut between characters where it is too long."""
    data = text.replace("\0", " ").encode(errors="replace")
    if len(data) > STRING_MAX_BYTES:
        data = data[:STRING_MAX_BYTES].decode(errors="ignore").encode()
    return data
