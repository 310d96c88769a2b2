"""NBD in memory: bytes for both codecs to be fed with, codecs in each state, and both roles joined without a socket."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import pytest

from fleecer.errors import FleecerError
from fleecer.ranges import Buffer
from fleecer.units import MiB
from fleecer.wire.nbd import ClientCodec, ExportInfo, Reply, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd

Event = TypeVar("Event", covariant=True)

HELLO = nbd.U32.pack(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)
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
    return nbd.OPTION.pack(nbd.OPTION_MAGIC, number, len(data)) + data


def string(text: str) -> bytes:
    return nbd.U32.pack(len(text.encode())) + text.encode()


def info_option(number: int, name: str, infos: Sequence[int] = ()) -> bytes:
    """INFO or GO."""
    return option(number, string(name) + nbd.U16.pack(len(infos)) + b"".join(map(nbd.U16.pack, infos)))


def meta_option(number: int, name: str, queries: Sequence[str] = ()) -> bytes:
    """LIST_META_CONTEXT or SET_META_CONTEXT."""
    return option(number, string(name) + nbd.U32.pack(len(queries)) + b"".join(map(string, queries)))


def entering(name: str, *, structured: bool = True, contexts: Sequence[str] = (), infos: Sequence[int] = ()) -> bytes:
    """All that a client sends from its first byte to transmission."""
    data = HELLO
    if structured:
        data += option(nbd.OPT_STRUCTURED_REPLY)
    if contexts:
        data += meta_option(nbd.OPT_SET_META_CONTEXT, name, contexts)
    return data + info_option(nbd.OPT_GO, name, infos)


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, data: bytes = b""
) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length or len(data)) + data


# Bytes that a server sends.


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


def option_replies(data: bytes) -> list[OptionReply]:
    """The replies to options that `data` consists of."""
    replies: list[OptionReply] = []
    while data:
        _, number, kind, length = nbd.OPTION_REPLY.unpack_from(data)
        end = nbd.OPTION_REPLY.size + length
        replies.append(OptionReply(number, kind, data[nbd.OPTION_REPLY.size : end]))
        data = data[end:]
    return replies


# A server's codec, and the exports it offers.

BYTEWISE = pytest.mark.parametrize("piece", [1 << 30, 1], ids=["whole", "bytewise"])

DISK = ExportInfo(
    name="disk",
    description="a disk",
    size=1 * MiB,
    can_multi_conn=True,
    can_trim=True,
    can_fast_zero=True,
    contexts=("base:allocation", "x-test:one", "x-test:two"),
)
READ_ONLY = ExportInfo(name="frozen", size=1 * MiB, read_only=True, can_trim=True, can_fast_zero=True, rotational=True)
COARSE = ExportInfo(name="coarse", size=1 * MiB, block_size_min=512, block_size_max=1 * MiB)
HUGE = ExportInfo(name="huge", size=1 << 40, contexts=("base:allocation",))
GREETING_BYTES = 18


def server(*, full: tuple[str, ...] = ()) -> ServerCodec:
    codec = ServerCodec(Shelf(DISK, READ_ONLY, COARSE, HUGE, full=full))
    assert len(sent(codec)) == GREETING_BYTES
    return codec


def negotiating() -> ServerCodec:
    codec = server()
    feed(codec, HELLO)
    return codec


def transmitting(
    name: str = "disk",
    *,
    structured: bool = True,
    contexts: tuple[str, ...] = ("base:allocation",),
    infos: tuple[int, ...] = (),
) -> ServerCodec:
    codec = server()
    feed(codec, entering(name, structured=structured, contexts=contexts if structured else (), infos=infos))
    assert codec.export is not None
    sent(codec)
    return codec


def only(requests: list[Request]) -> Request:
    (one,) = requests
    return one


def ask(codec: ServerCodec, data: bytes) -> Request:
    return only(feed(codec, data))


def replies(codec: ServerCodec, data: bytes) -> list[OptionReply]:
    assert feed(codec, data) == []
    return option_replies(sent(codec))


def kinds(codec: ServerCodec, data: bytes) -> list[int]:
    return [reply.kind for reply in replies(codec, data)]


# What a server says, and a client's codec that has heard it.

GREETING = b"NBDMAGICIHAVEOPT\0\3"
ALL_FLAGS = 0xFFF & ~nbd.FLAG_READ_ONLY


def rep(option: int, kind: int, data: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def info_export(size: int = DISK.size, flags: int = ALL_FLAGS) -> bytes:
    return struct.pack(">HQH", nbd.INFO_EXPORT, size, flags)


def went(option: int = nbd.OPT_GO, *infos: bytes) -> bytes:
    """A server's consent to INFO or GO."""
    return b"".join(rep(option, nbd.REP_INFO, info) for info in infos or (info_export(),)) + rep(option, nbd.REP_ACK)


STRUCTURED = rep(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK)
SET = nbd.OPT_SET_META_CONTEXT
CONTEXT = rep(SET, nbd.REP_META_CONTEXT, nbd.U32.pack(7) + b"base:allocation") + rep(SET, nbd.REP_ACK)
ACCEPTED = GREETING + STRUCTURED + CONTEXT + went()


def chunk(kind: int, body: bytes = b"", *, cookie: int = 1, done: bool = True) -> bytes:
    return nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(body)) + body


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


def ready(*, flags: int = ALL_FLAGS, infos: tuple[bytes, ...] = (), structured: bool = True) -> ClientCodec:
    codec = ClientCodec("disk")
    agreed = STRUCTURED + CONTEXT if structured else rep(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_UNSUP)
    feed(codec, GREETING + agreed + went(nbd.OPT_GO, info_export(flags=flags), *infos))
    assert codec.ready
    sent(codec)
    return codec
