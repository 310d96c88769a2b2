"""The client's codec: how it negotiates with servers of every age, and what it makes of a hostile one's answers."""

from __future__ import annotations

import errno
import struct
import tracemalloc
from typing import NamedTuple

import pytest

from fleecer.errors import LocalProtocolError, NotFound, RemoteProtocolError, UsageError
from fleecer.testing.nbd import feed, sent, string
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ClientCodec, ExportUnknown, Reply
from fleecer.wire.nbd import constants as nbd
from fleecer.wire.nbd.client_handshake import Mode

BYTEWISE = pytest.mark.parametrize("piece", [1 << 30, 1], ids=["whole", "bytewise"])
SIZE = 1 * MiB
GREETING = b"NBDMAGICIHAVEOPT\0\3"
ALL_FLAGS = 0xFFF & ~nbd.FLAG_READ_ONLY


def rep(option: int, kind: int, data: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def info_export(size: int = SIZE, flags: int = ALL_FLAGS) -> bytes:
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


def data_chunk(offset: int, data: bytes, *, done: bool = True, cookie: int = 1) -> bytes:
    return chunk(nbd.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data, done=done, cookie=cookie)


def hole_chunk(offset: int, size: int, *, done: bool = True) -> bytes:
    return chunk(nbd.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, size), done=done)


def status_chunk(*extents: tuple[int, int], context_id: int = 7, done: bool = True) -> bytes:
    body = nbd.U32.pack(context_id) + b"".join(nbd.EXTENT.pack(*extent) for extent in extents)
    return chunk(nbd.REPLY_TYPE_BLOCK_STATUS, body, done=done)


def error_chunk(error: int, text: bytes = b"", *, kind: int = nbd.REPLY_TYPE_ERROR, tail: bytes = b"") -> bytes:
    return chunk(kind, nbd.ERROR_BODY.pack(error, len(text)) + text + tail)


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


def ready(*, flags: int = ALL_FLAGS, infos: tuple[bytes, ...] = (), structured: bool = True) -> ClientCodec:
    codec = ClientCodec("disk")
    agreed = STRUCTURED + CONTEXT if structured else rep(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_UNSUP)
    feed(codec, GREETING + agreed + went(nbd.OPT_GO, info_export(flags=flags), *infos))
    assert codec.ready
    sent(codec)
    return codec


def options_sent(data: bytes) -> list[int]:
    """The options in what a client sent after its flags."""
    found = []
    data = data[4:]
    while data:
        magic, option, length = nbd.OPTION.unpack_from(data)
        assert magic == nbd.OPTION_MAGIC
        found.append(option)
        data = data[nbd.OPTION.size + length :]
    return found


# The handshake, as a table: what the server says, and what comes of it.


class Handshake(NamedTuple):
    said: bytes
    options: list[int]
    end: str  # "ready", "finished", "open", or a part of the failure's message
    mode: Mode = "go"


S, M, G, E, A = (
    nbd.OPT_STRUCTURED_REPLY,
    nbd.OPT_SET_META_CONTEXT,
    nbd.OPT_GO,
    nbd.OPT_EXPORT_NAME,
    nbd.OPT_ABORT,
)
INFO_ALL = rep(nbd.OPT_LIST_META_CONTEXT, nbd.REP_META_CONTEXT, bytes(4) + b"x-a:b")
INFO_ALL += rep(nbd.OPT_LIST_META_CONTEXT, nbd.REP_ACK)

HANDSHAKES = {
    "everything is granted": Handshake(ACCEPTED, [S, M, G], "ready"),
    "no structured replies, so no contexts": Handshake(GREETING + rep(S, nbd.REP_ERR_UNSUP) + went(), [S, G], "ready"),
    "structured replies are against policy": Handshake(
        GREETING + rep(S, nbd.REP_ERR_POLICY, b"no") + went(), [S, G], "ready"
    ),
    "no contexts": Handshake(GREETING + STRUCTURED + rep(M, nbd.REP_ERR_UNSUP) + went(), [S, M, G], "ready"),
    "a context, then an error": Handshake(
        GREETING + STRUCTURED + CONTEXT[:-20] + rep(M, nbd.REP_ERR_TOO_BIG) + went(), [S, M, G], "ready"
    ),
    "no GO": Handshake(
        GREETING + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNSUP) + struct.pack(">QH", SIZE, 1),
        [S, M, G, E],
        "ready",
    ),
    "no GO, and zeroes after the flags": Handshake(
        b"NBDMAGICIHAVEOPT\0\1" + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNSUP) + struct.pack(">QH124x", SIZE, 1),
        [S, M, G, E],
        "ready",
    ),
    "the zeroes are not all there": Handshake(
        b"NBDMAGICIHAVEOPT\0\1" + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNSUP) + struct.pack(">QH123x", SIZE, 1),
        [S, M, G, E],
        "open",
    ),
    "plain newstyle": Handshake(b"NBDMAGICIHAVEOPT\0\2" + struct.pack(">QH", SIZE, 1), [E], "ready"),
    "plain newstyle cannot list": Handshake(b"NBDMAGICIHAVEOPT\0\2", [], "knows no options", "list"),
    "old style": Handshake(b"NBDMAGIC\0\0\x42\2\x81\x86\x12\x53" + bytes(136), [], "old style"),
    "an unknown style": Handshake(b"NBDMAGICNBDMAGIC\0\0", [], "is unknown"),
    "another protocol": Handshake(b"HTTP/1.1 400 Bad Request\r\n", [], "no NBD server"),
    "no such export": Handshake(
        GREETING + STRUCTURED + rep(M, nbd.REP_ERR_UNKNOWN) + rep(G, nbd.REP_ERR_UNKNOWN, b"never heard of\n it"),
        [S, M, G, A],
        "export 'disk' does not exist: the server says 'never heard of\\n it'",
    ),
    "no such export, without a word": Handshake(
        GREETING + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNKNOWN), [S, M, G, A], "export 'disk' does not exist"
    ),
    "the server demands TLS": Handshake(GREETING + rep(S, nbd.REP_ERR_TLS_REQD), [S, A], "it demands TLS first"),
    "the server is going": Handshake(
        GREETING + STRUCTURED + rep(M, nbd.REP_ERR_SHUTDOWN, b"bye"), [S, M, A], "it is shutting down: 'bye'"
    ),
    "an error that is not known": Handshake(
        GREETING + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERROR_BIT + 99), [S, M, G, A], "error 99"
    ),
    "reply magic is wrong": Handshake(GREETING + bytes(20), [S], "magic 0x0 is wrong"),
    "a reply to another option": Handshake(GREETING + rep(G, nbd.REP_ACK), [S], "it is for option 7"),
    "a reply type out of place": Handshake(GREETING + rep(S, nbd.REP_INFO), [S], "type 3"),
    "an ACK with data": Handshake(GREETING + rep(S, nbd.REP_ACK, b"x"), [S], "type 1 with 1 bytes"),
    "a reply of four GiB": Handshake(
        GREETING + nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, S, 1, 0xFFFFFFFF), [S], "the limit is 65536"
    ),
    "GO without the export's size": Handshake(
        GREETING + STRUCTURED + CONTEXT + rep(G, nbd.REP_ACK), [S, M, G], "without telling its size"
    ),
    "information too short": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, b"\0"), [S, M, G], "has 1 bytes, it needs 2"
    ),
    "unknown information is ignored": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, b"\0\x99strange", info_export()), [S, M, G], "ready"
    ),
    "a size that no file has": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, info_export(size=1 << 63)), [S, M, G], "describes the export wrongly"
    ),
    "flags without HAS_FLAGS": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, info_export(flags=2)), [S, M, G], "lack HAS_FLAGS"
    ),
    "a minimum block size of zero": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, info_export(), struct.pack(">HIII", 3, 0, 4096, 1 << 20)),
        [S, M, G],
        "minimum block size 0",
    ),
    "block sizes cut short": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, info_export(), b"\0\3\0\0"), [S, M, G], "has 4 bytes, not 14"
    ),
    "a name that is no UTF-8": Handshake(
        GREETING + STRUCTURED + CONTEXT + went(G, info_export(), b"\0\1\xff"), [S, M, G], "is no NBD string"
    ),
    "a context that was not asked for": Handshake(
        GREETING + STRUCTURED + rep(M, nbd.REP_META_CONTEXT, bytes(4) + b"x-evil:x") + rep(M, nbd.REP_ACK),
        [S, M],
        "'x-evil:x' was not asked for",
    ),
    "a context twice": Handshake(
        GREETING + STRUCTURED + CONTEXT[:-20] + CONTEXT[:-20] + rep(M, nbd.REP_ACK), [S, M], "comes twice"
    ),
    "a list": Handshake(
        GREETING
        + rep(nbd.OPT_LIST, nbd.REP_SERVER, string("a") + b"first")
        + rep(nbd.OPT_LIST, nbd.REP_SERVER, string(""))
        + rep(nbd.OPT_LIST, nbd.REP_ACK),
        [nbd.OPT_LIST, A],
        "finished",
        "list",
    ),
    "a list is refused": Handshake(
        GREETING + rep(nbd.OPT_LIST, nbd.REP_ERR_POLICY),
        [nbd.OPT_LIST, A],
        "option LIST, its policy forbids it",
        "list",
    ),
    "a listed name longer than the reply": Handshake(
        GREETING + rep(nbd.OPT_LIST, nbd.REP_SERVER, nbd.U32.pack(9) + b"a") + rep(nbd.OPT_LIST, nbd.REP_ACK),
        [nbd.OPT_LIST],
        "a name of 9 bytes",
        "list",
    ),
    "info": Handshake(
        GREETING + STRUCTURED + INFO_ALL + went(nbd.OPT_INFO),
        [S, nbd.OPT_LIST_META_CONTEXT, nbd.OPT_INFO, A],
        "finished",
        "info",
    ),
    "info is unknown": Handshake(
        GREETING + STRUCTURED + INFO_ALL + rep(nbd.OPT_INFO, nbd.REP_ERR_UNSUP),
        [S, nbd.OPT_LIST_META_CONTEXT, nbd.OPT_INFO, A],
        "it does not know the option",
        "info",
    ),
}


@BYTEWISE
@pytest.mark.parametrize("case", HANDSHAKES.values(), ids=HANDSHAKES.keys())
def test_a_handshake_ends_as_it_must(case: Handshake, piece: int) -> None:
    codec = ClientCodec("disk", mode=case.mode)
    assert feed(codec, case.said, piece) == []
    assert options_sent(sent(codec)) == case.options
    end = str(codec.failure) if codec.failure else "ready" if codec.ready else "finished" if codec.finished else "open"
    assert case.end in end
    assert not (codec.ready and codec.finished)


def test_an_unknown_export_is_not_found() -> None:
    codec = ClientCodec("disk", contexts=())
    feed(codec, GREETING + STRUCTURED + rep(G, nbd.REP_ERR_UNKNOWN))
    assert isinstance(codec.failure, ExportUnknown)
    assert isinstance(codec.failure, NotFound)
    assert codec.failure.name == "disk"


def test_the_server_s_account_of_the_export_is_kept() -> None:
    codec = ClientCodec("disk")
    infos = (info_export(), b"\0\1Disk", b"\0\2a disk", struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, 512, 4096, 1 * MiB))
    feed(codec, GREETING + STRUCTURED + CONTEXT + went(G, *infos))
    info = codec.info
    assert info is not None
    assert (info.name, info.description, info.size) == ("Disk", "a disk", SIZE)
    assert (info.block_size_min, info.block_size_preferred, info.block_size_max) == (512, 4096, 1 * MiB)
    assert info.can_multi_conn
    assert info.can_trim
    assert info.can_fast_zero
    assert not info.read_only
    assert info.contexts == codec.contexts == ("base:allocation",)
    assert codec.flags == ALL_FLAGS


def test_a_list_keeps_names_and_descriptions_and_info_keeps_contexts() -> None:
    listing, info = ClientCodec("", mode="list"), ClientCodec("disk", mode="info")
    feed(listing, HANDSHAKES["a list"].said)
    feed(info, HANDSHAKES["info"].said)
    assert listing.listed == [("a", "first"), ("", "")]
    assert info.info is not None
    assert info.info.contexts == ("x-a:b",)


def test_an_endless_list_ends_the_session() -> None:
    codec = ClientCodec("", mode="list")
    entry = rep(nbd.OPT_LIST, nbd.REP_SERVER, string("n" * 4000) + b"d" * 60_000)
    feed(codec, GREETING)
    for _ in range(300):
        feed(codec, entry)
    assert "more than 16777216 bytes" in str(codec.failure)


def test_contexts_sent_before_an_error_do_not_count() -> None:
    codec = ClientCodec("disk")
    feed(codec, HANDSHAKES["a context, then an error"].said)
    assert codec.ready
    assert codec.contexts == ()
    assert codec.info is not None
    assert codec.info.contexts == ()


def test_contexts_with_the_same_id_are_refused() -> None:
    codec = ClientCodec("disk", contexts=("x-a:1", "x-a:2"))
    entries = b"".join(rep(M, nbd.REP_META_CONTEXT, bytes(4) + name) for name in (b"x-a:1", b"x-a:2"))
    feed(codec, GREETING + STRUCTURED + entries + rep(M, nbd.REP_ACK))
    assert "different IDs" in str(codec.failure)


@pytest.mark.parametrize("name", ["n" * 4097, "a\0b", "\ud800"])
def test_a_name_that_cannot_be_sent_is_refused_at_once(name: str) -> None:
    with pytest.raises(UsageError):
        ClientCodec(name)


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
        for offset, length in ((0, 0), (-1, 1), (0, -1), (SIZE, 1), (SIZE - 1, 2), (0, 1 << 32)):
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
    codec.block_status(0, SIZE)
    extents = [(8, i % 4) for i in range(SIZE // 8)]
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
    listing = ClientCodec("", mode="list")
    feed(listing, HANDSHAKES["a list"].said)
    listing.eof()
    assert listing.failure is None
