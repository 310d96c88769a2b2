"""What the client's codec sends, and what it makes of the answers of an honest and of a hostile server."""

from __future__ import annotations

import errno
import struct
import tracemalloc

import pytest
from tests.nbd_world import ALL_FLAGS, BYTEWISE, DISK, chunk, feed, ready, sent, simple

from fleecer.errors import LocalProtocolError, RemoteProtocolError
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ClientCodec, Reply
from fleecer.wire.nbd import constants as nbd


def data_chunk(offset: int, data: bytes, *, done: bool = True, cookie: int = 1) -> bytes:
    return chunk(nbd.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data, done=done, cookie=cookie)


def hole_chunk(offset: int, size: int, *, done: bool = True) -> bytes:
    return chunk(nbd.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, size), done=done)


def status_chunk(*extents: tuple[int, int], context_id: int = 7, done: bool = True) -> bytes:
    body = nbd.U32.pack(context_id) + b"".join(nbd.EXTENT.pack(*extent) for extent in extents)
    return chunk(nbd.REPLY_TYPE_BLOCK_STATUS, body, done=done)


def error_chunk(error: int, text: bytes = b"", *, kind: int = nbd.REPLY_TYPE_ERROR, tail: bytes = b"") -> bytes:
    return chunk(kind, nbd.ERROR_BODY.pack(error, len(text)) + text + tail)


# What may be asked for.


def test_requests_carry_cookies_of_their_own_and_write_data_goes_unjoined() -> None:
    codec = ready()
    data = b"payload"
    cookies = [codec.read(0, 5), codec.write(7, data, nbd.CMD_FLAG_FUA), codec.flush()]
    assert len(set(cookies)) == 3
    assert codec.in_flight == 3
    assert codec.outgoing[2] is data
    assert nbd.REQUEST.unpack(codec.outgoing[1]) == (nbd.REQUEST_MAGIC, 1, nbd.CMD_WRITE, cookies[1], 7, 7)


def refuse(codec: ClientCodec, command: str, *arguments: object) -> str:
    with pytest.raises(LocalProtocolError) as caught:
        getattr(codec, command)(*arguments)
    assert codec.outgoing == []
    assert codec.in_flight == 0
    return str(caught.value)


def test_what_the_protocol_forbids_is_not_sent() -> None:
    codec = ready()
    for command in ("read", "trim", "write_zeroes", "cache", "block_status"):
        for offset, length in ((0, 0), (-1, 1), (0, -1), (DISK.size, 1), (DISK.size - 1, 2), (0, 1 << 32)):
            assert "the export has 1048576 bytes" in refuse(codec, command, offset, length)
    assert "the export has" in refuse(codec, "write", 0, b"")
    assert "flags 0x2" in refuse(codec, "read", 0, 1, nbd.CMD_FLAG_NO_HOLE)


def test_what_the_server_does_not_offer_is_not_sent() -> None:
    bare = ready(flags=nbd.FLAG_HAS_FLAGS, structured=False)
    for command in ("trim", "write_zeroes", "cache", "block_status"):
        assert "does not offer" in refuse(bare, command, 0, 512)
    assert "does not offer" in refuse(bare, "flush")
    assert "flags 0x4" in refuse(bare, "read", 0, 1, nbd.CMD_FLAG_DF)
    assert "flags 0x1" in refuse(bare, "write", 0, b"x", nbd.CMD_FLAG_FUA)
    frozen = ready(flags=ALL_FLAGS | nbd.FLAG_READ_ONLY)
    assert "does not offer" in refuse(frozen, "write", 0, b"x")
    assert "does not offer" in refuse(frozen, "trim", 0, 1)
    slow = ready(flags=nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_WRITE_ZEROES)
    assert "flags 0x10" in refuse(slow, "write_zeroes", 0, 1, nbd.CMD_FLAG_FAST_ZERO)


def test_block_sizes_that_were_asked_for_are_kept_to() -> None:
    codec = ready(infos=(struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, 512, 4096, 8192),))
    assert "minimum block size, 512" in refuse(codec, "read", 1, 512)
    assert "minimum block size, 512" in refuse(codec, "trim", 512, 100)
    assert "longest payload is 8192" in refuse(codec, "read", 0, 16384)
    codec.trim(0, 16384)


def test_nothing_is_sent_before_transmission_or_after_goodbye() -> None:
    assert "not in transmission" in refuse(ClientCodec("disk"), "read", 0, 1)
    codec = ready()
    codec.disconnect()
    codec.disconnect()
    assert nbd.REQUEST.unpack(sent(codec))[2] == nbd.CMD_DISC
    assert "not in transmission" in refuse(codec, "flush")


# What the server answers.


def read(codec: ClientCodec, offset: int = 4096, length: int = 1024, flags: int = 0) -> None:
    codec.read(offset, length, flags)
    sent(codec)


PATTERN = bytes(range(256)) * 4
GOOD_READS = {
    "one data chunk": (data_chunk(4096, PATTERN), PATTERN),
    "one hole": (hole_chunk(4096, 1024), bytes(1024)),
    "data, then done": (data_chunk(4096, PATTERN, done=False) + chunk(nbd.REPLY_TYPE_NONE), PATTERN),
    "pieces in any order": (
        data_chunk(4608, PATTERN[512:768], done=False)
        + data_chunk(4096, PATTERN[:256], done=False)
        + data_chunk(4864, PATTERN[768:], done=False)
        + data_chunk(4352, PATTERN[256:512]),
        PATTERN,
    ),
    "a hole between data": (
        data_chunk(4096, PATTERN[:256], done=False)
        + data_chunk(4608, PATTERN[512:], done=False)
        + hole_chunk(4352, 256),
        PATTERN[:256] + bytes(256) + PATTERN[512:],
    ),
    "an unknown flag on a chunk": (
        nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, 0xFFFF, 1, 1, 1032) + struct.pack(">Q", 4096) + PATTERN,
        PATTERN,
    ),
}


@BYTEWISE
@pytest.mark.parametrize(("answer", "data"), GOOD_READS.values(), ids=GOOD_READS.keys())
def test_a_read_is_assembled(answer: bytes, data: bytes, piece: int) -> None:
    codec = ready()
    read(codec)
    (reply,) = feed(codec, answer, piece)
    assert (reply.error, bytes(reply.data)) == (0, data)
    assert codec.failure is None
    assert codec.in_flight == 0


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("size", [1, 64 * KiB, 64 * KiB + 1, 600 * KiB])
@pytest.mark.parametrize("piece", [1 << 30, 50_001])
def test_reads_of_any_size_arrive_whole_and_private(structured: bool, size: int, piece: int) -> None:
    codec = ready(structured=structured)
    contents = [bytes((k * 7 + i) % 253 for i in range(991)) * (size // 991 + 1) for k in (1, 2, 3)]
    for _ in contents:
        read(codec, 0, size)
    answers = b"".join(
        data_chunk(0, data[:size], cookie=cookie) if structured else simple(cookie=cookie) + data[:size]
        for cookie, data in enumerate(contents, start=1)
    )
    replies = feed(codec, answers, piece)
    room = codec.receive_buffer()
    room[:] = b"\xee" * len(room)
    assert [bytes(reply.data) for reply in replies] == [data[:size] for data in contents]


BAD_READS = {
    "outside, before": data_chunk(4095, PATTERN, done=False),
    "outside, before, in part": data_chunk(4000, b"x" * 97, done=False),
    "outside, behind": data_chunk(4097, PATTERN, done=False),
    "outside, behind, in part": data_chunk(5119, b"xx", done=False),
    "far outside": data_chunk(2**64 - 1, b"x"),
    "longer than asked for": data_chunk(4096, PATTERN + b"x"),
    "no data in a data chunk": data_chunk(4096, b""),
    "a data chunk shorter than its offset": chunk(nbd.REPLY_TYPE_OFFSET_DATA, b"1234567"),
    "a hole outside": hole_chunk(4096, 1025),
    "a hole of nothing": hole_chunk(4096, 0),
    "a hole of the wrong length": chunk(nbd.REPLY_TYPE_OFFSET_HOLE, bytes(13)),
    "a gap": data_chunk(4096, PATTERN[:1000]),
    "nothing at all": chunk(nbd.REPLY_TYPE_NONE),
    "twice the same": data_chunk(4096, PATTERN, done=False) + data_chunk(4096, PATTERN),
    "an overlap of one byte, from before": data_chunk(4196, b"x" * 100, done=False)
    + data_chunk(4096, b"x" * 101, done=False),
    "an overlap of one byte, from behind": data_chunk(4196, b"x" * 100, done=False)
    + data_chunk(4295, b"x" * 100, done=False),
    "an overlap of a hole": hole_chunk(4196, 100, done=False) + hole_chunk(4096, 1024, done=False),
    "a simple reply": simple() + PATTERN,
    "a simple error": simple(nbd.EIO),
    "block status": status_chunk((1024, 0)),
    "NONE with data": chunk(nbd.REPLY_TYPE_NONE, b"x"),
    "NONE that is not done": chunk(nbd.REPLY_TYPE_NONE, done=False),
    "an unknown type": chunk(99),
    "an unknown cookie": data_chunk(4096, PATTERN, cookie=2),
    "an unknown magic": b"\x67\x44\x66\x99" + bytes(16),
    "an error of zero": error_chunk(0),
    "an error chunk without room for an error": chunk(nbd.REPLY_TYPE_ERROR, b"12345"),
    "a message longer than its chunk": chunk(nbd.REPLY_TYPE_ERROR, nbd.ERROR_BODY.pack(5, 10) + b"short"),
    "an error chunk of four GiB": nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_ERROR, 1, 0xFFFFFFFF),
    "an error outside": error_chunk(5, kind=nbd.REPLY_TYPE_ERROR_OFFSET, tail=struct.pack(">Q", 4095)),
    "an error without its offset": error_chunk(5, kind=nbd.REPLY_TYPE_ERROR_OFFSET),
    "the same reply twice": data_chunk(4096, PATTERN) + data_chunk(4096, PATTERN),
}


@BYTEWISE
@pytest.mark.parametrize("answer", BAD_READS.values(), ids=BAD_READS.keys())
def test_an_answer_that_breaks_a_rule_ends_the_session(answer: bytes, piece: int) -> None:
    codec = ready()
    read(codec)
    replies = feed(codec, answer, piece)
    assert codec.finished
    assert isinstance(codec.failure, RemoteProtocolError)
    assert len(replies) == (1 if answer == BAD_READS["the same reply twice"] else 0)
    assert feed(codec, data_chunk(4096, PATTERN)) == []


def test_a_read_that_must_not_be_fragmented_takes_one_content_chunk_only() -> None:
    codec = ready()
    read(codec, flags=nbd.CMD_FLAG_DF)
    feed(codec, data_chunk(4096, PATTERN[:512], done=False) + data_chunk(4608, PATTERN[512:]))
    assert "must not be fragmented" in str(codec.failure)


def test_a_read_in_too_many_separate_pieces_ends_the_session() -> None:
    codec = ready()
    read(codec, 0, 64 * KiB)
    feed(codec, b"".join(hole_chunk(offset, 1, done=False) for offset in range(0, 64 * KiB, 2)))
    assert "more than 16384 separate pieces" in str(codec.failure)


def one_reply(codec: ClientCodec, answer: bytes) -> Reply:
    (reply,) = feed(codec, answer)
    assert codec.failure is None
    return reply


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (nbd.EPERM, errno.EPERM),
        (nbd.EIO, errno.EIO),
        (nbd.ENOMEM, errno.ENOMEM),
        (nbd.EINVAL, errno.EINVAL),
        (nbd.ENOSPC, errno.ENOSPC),
        (nbd.EOVERFLOW, errno.EOVERFLOW),
        (nbd.ENOTSUP, errno.ENOTSUP),
        (nbd.ESHUTDOWN, errno.ESHUTDOWN),
        (12345, errno.EINVAL),
    ],
)
def test_an_error_becomes_an_errno_with_the_server_s_words(value: int, code: int) -> None:
    codec = ready()
    read(codec)
    reply = one_reply(codec, error_chunk(value, "schön kaputt".encode()))
    assert (reply.error, reply.message, len(reply.data)) == (code, "schön kaputt", 0)


def test_an_error_wins_over_data_that_came_with_it() -> None:
    codec = ready()
    read(codec)
    reply = one_reply(
        codec,
        data_chunk(4096, PATTERN, done=False)
        + error_chunk(5, b"half", kind=nbd.REPLY_TYPE_ERROR_OFFSET, tail=struct.pack(">Q", 4100)),
    )
    assert (reply.error, reply.message, len(reply.data)) == (errno.EIO, "half", 0)


def test_an_unknown_kind_of_error_is_an_error() -> None:
    codec = ready()
    read(codec)
    assert one_reply(codec, error_chunk(28, b"new", kind=0x8123, tail=b"whatever")).error == errno.ENOSPC


def test_an_error_text_beyond_the_protocol_s_limit_is_cut() -> None:
    codec = ready()
    read(codec)
    assert len(one_reply(codec, error_chunk(5, b"x" * 60_000)).message) == 4096


def test_commands_without_data_take_simple_and_structured_replies() -> None:
    codec = ready()
    answers = ((simple(cookie=1), 0), (chunk(nbd.REPLY_TYPE_NONE, cookie=2), 0), (simple(nbd.ENOSPC, 3), errno.ENOSPC))
    for cookie, (answer, code) in enumerate(answers, start=1):
        codec.write(0, b"x")
        reply = one_reply(codec, answer)
        assert (reply.cookie, reply.error) == (cookie, code)


def test_without_negotiation_a_structured_reply_ends_the_session() -> None:
    codec = ready(structured=False)
    read(codec)
    feed(codec, data_chunk(4096, PATTERN))
    assert "not negotiated" in str(codec.failure)


def test_a_simple_reply_in_the_midst_of_a_structured_one_ends_the_session() -> None:
    codec = ready()
    codec.block_status(0, 1024)
    feed(codec, status_chunk((1024, 0), done=False) + simple(nbd.EIO))
    assert "a simple reply" in str(codec.failure)


# Block status.


def status(answer: bytes, *, flags: int = 0, length: int = 8192) -> tuple[ClientCodec, list[Reply]]:
    codec = ready()
    codec.block_status(0, length, flags)
    return codec, feed(codec, answer)


def test_block_status_is_told_by_context_and_cut_at_the_request_s_end() -> None:
    for answer, extents in (
        (status_chunk((4096, 1), (4096, 0)), [(4096, 1), (4096, 0)]),
        (status_chunk((4096, 1), (0xFFFFFFFF, 3)), [(4096, 1), (4096, 3)]),
        (status_chunk((512, 2), done=False) + chunk(0), [(512, 2)]),
    ):
        codec, (reply,) = status(answer)
        assert codec.failure is None
        assert reply.extents == {"base:allocation": extents}


def test_a_long_block_status_is_received_in_place() -> None:
    codec = ready()
    codec.block_status(0, DISK.size)
    extents = [(8, i % 4) for i in range(DISK.size // 8)]
    (reply,) = feed(codec, status_chunk(*extents), 10_000)
    assert reply.extents["base:allocation"] == extents


BAD_STATUS = {
    "an empty extent": (status_chunk((0, 0)), 0),
    "no extent": (chunk(nbd.REPLY_TYPE_BLOCK_STATUS, nbd.U32.pack(7)), 0),
    "half an extent": (chunk(nbd.REPLY_TYPE_BLOCK_STATUS, bytes(10)), 0),
    "an extent behind the end": (status_chunk((8192, 0), (1, 0)), 0),
    "two extents for REQ_ONE": (status_chunk((512, 0), (512, 1)), nbd.CMD_FLAG_REQ_ONE),
    "an overlong extent for REQ_ONE": (status_chunk((8193, 0)), nbd.CMD_FLAG_REQ_ONE),
    "an unknown context": (status_chunk((512, 0), context_id=8), 0),
    "a context twice": (status_chunk((512, 0), done=False) + status_chunk((512, 0)), 0),
    "no context": (chunk(nbd.REPLY_TYPE_NONE), 0),
    "a simple reply": (simple(), 0),
    "data": (data_chunk(0, b"x"), 0),
    "too many": (
        nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_BLOCK_STATUS, 1, 4 + 8 * (MiB + 1)),
        0,
    ),
}


@pytest.mark.parametrize(("answer", "flags"), BAD_STATUS.values(), ids=BAD_STATUS.keys())
def test_block_status_that_breaks_a_rule_ends_the_session(answer: bytes, flags: int) -> None:
    codec, replies = status(answer, flags=flags)
    assert replies == []
    assert isinstance(codec.failure, RemoteProtocolError)


def test_block_status_may_fail_with_a_simple_reply() -> None:
    codec, (reply,) = status(simple(nbd.EIO))
    assert codec.failure is None
    assert (reply.error, reply.extents) == (errno.EIO, {})


# Memory, and the end.


def test_an_answer_takes_no_more_memory_than_was_asked_for() -> None:
    codec = ready()
    read(codec)
    tracemalloc.start()
    feed(codec, nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_OFFSET_DATA, 1, 0xFFFFFFFF))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert codec.finished
    assert peak < 64 * KiB


def test_replies_before_a_violation_are_returned() -> None:
    codec = ready()
    read(codec)
    (reply,) = feed(codec, data_chunk(4096, PATTERN) + simple(cookie=99))
    assert reply.data == PATTERN
    assert "cookie 99" in str(codec.failure)


def test_the_end_of_the_stream_is_a_failure_unless_we_said_goodbye() -> None:
    negotiating = ClientCodec("disk")
    negotiating.eof()
    assert "during the handshake for export 'disk'" in str(negotiating.failure)
    reading = ready()
    read(reading)
    reading.disconnect()
    reading.eof()
    assert "with 1 requests in flight" in str(reading.failure)
    idle = ready()
    idle.eof()
    assert isinstance(idle.failure, RemoteProtocolError)
    leaving = ready()
    leaving.disconnect()
    leaving.eof()
    assert leaving.failure is None
    assert leaving.finished
