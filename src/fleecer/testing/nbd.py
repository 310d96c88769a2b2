"""NBD in memory: both codecs joined without a socket, bytes to feed them with, and a record of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from fleecer.errors import FleecerError
from fleecer.ranges import Buffer
from fleecer.wire.nbd import ClientCodec, ExportInfo, Reply, Request, ServerCodec
from fleecer.wire.nbd.constants import (
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    U16,
    U32,
)

Event = TypeVar("Event", covariant=True)

HELLO = U32.pack(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
"""A client's first bytes."""


class Receiving(Protocol[Event]):
    """What both codecs have in common."""

    outgoing: list[Buffer]
    finished: bool
    failure: FleecerError | None

    def receive_buffer(self) -> memoryview: ...

    def received(self, count: int) -> Sequence[Event]: ...


class Shelf:
    """A catalogue of fixed exports. `entered` records who came in; names in `full` are listed, but refused."""

    def __init__(self, *exports: ExportInfo, full: Iterable[str] = ()) -> None:
        self.exports = {export.name: export for export in exports}
        self.full = set(full)
        self.entered: list[str] = []

    def names(self) -> list[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> ExportInfo | None:
        return self.exports.get(name)

    def enter(self, name: str) -> ExportInfo | None:
        self.entered.append(name)
        return None if name in self.full else self.exports.get(name)


def feed(codec: Receiving[Event], data: Buffer, piece: int = 1 << 30) -> list[Event]:
    """Lets `codec` receive `data`, at most `piece` bytes at a time; returns all that it parsed."""
    events: list[Event] = []
    left = memoryview(data)
    while left:
        room = codec.receive_buffer()
        count = min(len(room), len(left), piece)
        room[:count] = left[:count]
        events += codec.received(count)
        left = left[count:]
    return events


def sent(codec: Receiving[object]) -> bytes:
    """What the codec wants to send, as one piece; its list is cleared."""
    data = b"".join(codec.outgoing)
    codec.outgoing.clear()
    return data


class ConnectionPair:
    """A server's and a client's codec, joined. `answer` is called for each request as it is parsed."""

    def __init__(
        self, server: ServerCodec, client: ClientCodec, answer: Callable[[ServerCodec, Request], None]
    ) -> None:
        self.server = server
        self.client = client
        self._answer = answer

    def run(self, piece: int = 1 << 30) -> list[Reply]:
        """Moves bytes both ways, at most `piece` at a time, until neither side has any; returns the replies."""
        replies: list[Reply] = []
        while self.server.outgoing or self.client.outgoing:
            replies += feed(self.client, sent(self.server), piece)
            for request in feed(self.server, sent(self.client), piece):
                self._answer(self.server, request)
        return replies


# Bytes that a client sends.


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def string(text: str) -> bytes:
    return U32.pack(len(text.encode())) + text.encode()


def info_option(number: int, name: str, infos: Sequence[int] = ()) -> bytes:
    """INFO or GO."""
    return option(number, string(name) + U16.pack(len(infos)) + b"".join(map(U16.pack, infos)))


def meta_option(number: int, name: str, queries: Sequence[str] = ()) -> bytes:
    """LIST_META_CONTEXT or SET_META_CONTEXT."""
    return option(number, string(name) + U32.pack(len(queries)) + b"".join(map(string, queries)))


def entering(name: str, *, structured: bool = True, contexts: Sequence[str] = (), infos: Sequence[int] = ()) -> bytes:
    """All that a client sends from its first byte to transmission."""
    data = HELLO
    if structured:
        data += option(OPT_STRUCTURED_REPLY)
    if contexts:
        data += meta_option(OPT_SET_META_CONTEXT, name, contexts)
    return data + info_option(OPT_GO, name, infos)


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, data: bytes = b""
) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length or len(data)) + data


# Bytes that a server sends.


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


def option_replies(data: bytes) -> list[OptionReply]:
    """The replies to options that `data` consists of."""
    replies: list[OptionReply] = []
    while data:
        _, number, kind, length = OPTION_REPLY.unpack_from(data)
        end = OPTION_REPLY.size + length
        replies.append(OptionReply(number, kind, data[OPTION_REPLY.size : end]))
        data = data[end:]
    return replies
