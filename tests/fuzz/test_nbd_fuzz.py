"""Hostile bytes into both roles of the NBD codec: replies, or a failure; never another exception, and bounded memory.

Every stream is fed whole and byte by byte: both must parse the same, say the same, and end the same.
"""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.nbd_world import HELLO, Receiving, Shelf, entering, feed, info_option, meta_option, option, request, sent

from fleecer.errors import FleecerError, LocalProtocolError
from fleecer.units import MiB
from fleecer.wire.nbd import ClientCodec, ExportInfo, Reply, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd

EXAMPLES = int(os.environ.get("FLEECER_FUZZ_EXAMPLES", "150"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
MEMORY_MAX_BYTES = 4 * MiB

DISK = ExportInfo(
    name="disk", size=1 << 20, can_trim=True, can_fast_zero=True, contexts=("base:allocation", "x-test:other")
)
FROZEN = ExportInfo(name="frozen", size=1 << 20, read_only=True, block_size_min=512)

small = st.integers(0, 3)
edges = st.sampled_from([0, 1, 511, 512, 4096, 65536, 65537, (1 << 20) - 1, 1 << 20, 1 << 31, (1 << 32) - 1])
wide = st.one_of(edges, st.sampled_from([1 << 32, 1 << 63, (1 << 64) - 1]))
names = st.sampled_from(["disk", "frozen", "", "nowhere", "n" * 4096, "n" * 4097, "a\0"])
queries = st.lists(st.sampled_from(["base:allocation", "base:", "x-test:", "x-test:other", "nocolon", ""]), max_size=4)

# What a client may say, valid and nearly so.
options = st.one_of(
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(
        info_option,
        st.sampled_from([nbd.OPT_INFO, nbd.OPT_GO]),
        names,
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
    ),
    st.builds(meta_option, st.sampled_from([nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT]), names, queries),
    st.just(option(nbd.OPT_STRUCTURED_REPLY)),
)
requests = st.one_of(
    st.builds(
        lambda command, offset, length, flags, cookie: request(command, offset, length, flags=flags, cookie=cookie),
        st.integers(0, 9).filter(lambda command: command != nbd.CMD_WRITE),
        wide,
        edges,
        st.sampled_from([0, 1, 2, 4, 8, 16, 32, 0xFFFF]),
        small,
    ),
    st.builds(
        lambda offset, flags, data: request(nbd.CMD_WRITE, offset, flags=flags, data=data),
        wide,
        st.sampled_from([0, 1, 32]),
        st.binary(max_size=200),
    ),
)


@st.composite
def mutated(draw: st.DrawFn, base: st.SearchStrategy[bytes]) -> bytes:
    """A valid stream, or one with bytes changed, cut out or put in."""
    data = bytearray(draw(base))
    for _ in range(draw(small)):
        at = draw(st.integers(0, len(data)))
        kind = draw(small)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 30))]
        else:
            data[at:at] = draw(st.binary(max_size=30))
    return bytes(data)


client_streams = st.one_of(
    st.binary(max_size=300),
    mutated(st.lists(options, max_size=6).map(lambda said: HELLO + b"".join(said))),
    mutated(
        st.tuples(
            st.sampled_from(
                [
                    entering("disk", contexts=DISK.contexts),
                    entering("disk", structured=False),
                    entering("frozen", infos=(nbd.INFO_BLOCK_SIZE,)),
                ]
            ),
            st.lists(requests, max_size=8),
        ).map(lambda said: said[0] + b"".join(said[1]))
    ),
)


def answer(codec: ServerCodec, asked: Request) -> None:
    if asked.error:
        codec.reply_error(asked, asked.error, asked.message)
    elif asked.command == nbd.CMD_READ:
        codec.reply_read(asked, bytes(asked.length))
    elif asked.command == nbd.CMD_BLOCK_STATUS:
        codec.reply_status(asked, [(context, [(asked.length, 0)]) for context in codec.contexts])
    else:
        codec.reply_done(asked)


def seen(asked: Request) -> tuple[object, ...]:
    fields = (asked.command, asked.flags, asked.cookie, asked.offset, asked.length, asked.error, asked.message)
    return (*fields, bytes(asked.data))


def end(codec: Receiving[Request] | Receiving[Reply]) -> tuple[bool, str]:
    assert codec.failure is None or isinstance(codec.failure, FleecerError)
    return codec.finished, str(codec.failure)


def peak_of(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@FUZZ
@given(client_streams)
def test_a_server_survives_any_client(said: bytes) -> None:
    outcomes = []
    for piece in (1 << 30, 1):
        codec = ServerCodec(Shelf(DISK, FROZEN))
        asked = feed(codec, said, piece)
        events = [seen(one) for one in asked]
        replies = sent(codec)
        for one in asked:
            answer(codec, one)
        assert all(one.answered for one in asked)
        outcomes.append((events, replies, end(codec), sent(codec)))
    assert outcomes[0] == outcomes[1]


@FUZZ
@given(client_streams)
def test_a_server_takes_memory_for_what_came_not_for_what_was_announced(said: bytes) -> None:
    # One announced payload within its limit is the exception, hence the limit below.
    assert peak_of(lambda: feed(ServerCodec(Shelf(DISK, FROZEN), payload_max=1 * MiB), said)) < MEMORY_MAX_BYTES


# What a server may say.


def option_reply(number: int, kind: int, data: bytes) -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def chunk(kind: int, cookie: int, body: bytes, flags: int) -> bytes:
    return nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(body)) + body


def from_server() -> bytes:
    """What our own server says to a client until transmission."""
    server, client = ServerCodec(Shelf(DISK)), ClientCodec("disk")
    said = b""
    while server.outgoing or client.outgoing:
        words = sent(server)
        said += words
        feed(client, words)
        feed(server, sent(client))
    assert client.ready
    return said


GREETED = from_server()
PLAIN = b"NBDMAGICIHAVEOPT\0\3" + option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_UNSUP, b"")
PLAIN += option_reply(nbd.OPT_GO, nbd.REP_INFO, nbd.INFO_EXPORT_BODY.pack(0, 1 << 20, 0xF7D & ~nbd.FLAG_READ_ONLY))
PLAIN += option_reply(nbd.OPT_GO, nbd.REP_ACK, b"")

cookies = st.integers(0, 6)
offsets = st.sampled_from([0, 4096, 4100, 4608, 5119, 5120, (1 << 64) - 1])
done = st.sampled_from([0, 1, 1, 0xFFFF])
answers = st.one_of(
    st.builds(nbd.SIMPLE_REPLY.pack, st.just(nbd.SIMPLE_REPLY_MAGIC), st.sampled_from([0, 5, 99]), cookies),
    st.builds(
        lambda cookie, offset, data, flags: chunk(1, cookie, offset.to_bytes(8, "big") + data, flags),
        cookies,
        offsets,
        st.sampled_from([b"", b"x", b"x" * 512, b"x" * 1024, b"x" * 1025]),
        done,
    ),
    st.builds(
        lambda cookie, offset, size, flags: chunk(2, cookie, nbd.HOLE_BODY.pack(offset, size), flags),
        cookies,
        offsets,
        st.sampled_from([0, 1, 512, 1024, 0xFFFFFFFF]),
        done,
    ),
    st.builds(
        lambda cookie, context, runs, flags: chunk(
            5, cookie, nbd.U32.pack(context) + b"".join(nbd.EXTENT.pack(*run) for run in runs), flags
        ),
        cookies,
        small,
        st.lists(st.tuples(edges, small), max_size=4),
        done,
    ),
    st.builds(
        lambda cookie, kind, error, text, tail, flags: chunk(
            kind, cookie, nbd.ERROR_BODY.pack(error, len(text)) + text + tail, flags
        ),
        cookies,
        st.sampled_from([0x8001, 0x8002, 0x8077]),
        st.sampled_from([0, 5, 28, 777]),
        st.binary(max_size=10),
        st.sampled_from([b"", (4096).to_bytes(8, "big"), bytes(8)]),
        done,
    ),
    st.builds(chunk, small, cookies, st.binary(max_size=20), done),
)
server_streams = st.one_of(
    st.binary(max_size=300),
    mutated(st.just(GREETED)),
    mutated(st.lists(answers, max_size=8).map(lambda said: GREETED + b"".join(said))),
    mutated(st.lists(answers, max_size=4).map(lambda said: PLAIN + b"".join(said))),
)


def ask_all(codec: ClientCodec) -> None:
    """One request of each kind, with cookies 1, 2 ..., as far as the server's flags and sizes allow."""
    asks: list[Callable[[], int]] = [
        lambda: codec.read(4096, 1024),
        lambda: codec.read(4096, 1024, nbd.CMD_FLAG_DF),
        lambda: codec.write(0, b"x" * 512),
        codec.flush,
        lambda: codec.block_status(4096, 1024),
        lambda: codec.block_status(4096, 1024, nbd.CMD_FLAG_REQ_ONE),
    ]
    for ask in asks:
        with contextlib.suppress(LocalProtocolError):
            ask()


def listened(said: bytes, piece: int) -> tuple[list[Reply], ClientCodec, bytes]:
    """Lets a client hear `said`; once it is ready, which must be after a known greeting, it asks for things."""
    greeting = len(GREETED if said.startswith(GREETED) else PLAIN)
    codec = ClientCodec("disk")
    replies = feed(codec, said[:greeting], piece)
    spoken = sent(codec)
    if codec.ready:
        ask_all(codec)
        spoken += sent(codec)
    replies += feed(codec, said[greeting:], piece)
    codec.eof()
    return replies, codec, spoken + sent(codec)


@FUZZ
@given(server_streams)
def test_a_client_survives_any_server(said: bytes) -> None:
    outcomes = []
    for piece in (1 << 30, 1):
        replies, codec, spoken = listened(said, piece)
        for reply in replies:
            if reply.command == nbd.CMD_READ:
                assert len(reply.data) == (0 if reply.error else reply.length)
            if reply.command == nbd.CMD_BLOCK_STATUS and not reply.error:
                assert set(reply.extents) == {"base:allocation"}
                for runs in reply.extents.values():
                    assert 0 < sum(length for length, _ in runs) <= reply.length
                    assert all(length > 0 for length, _ in runs)
        events = [(r.cookie, r.error, r.message, bytes(r.data), r.extents) for r in replies]
        assert len({event[0] for event in events}) == len(events)
        outcomes.append((events, end(codec), spoken))
    assert outcomes[0] == outcomes[1]


@FUZZ
@given(server_streams)
def test_a_client_takes_memory_for_what_it_asked_for(said: bytes) -> None:
    assert peak_of(lambda: listened(said, 1 << 30)) < MEMORY_MAX_BYTES
