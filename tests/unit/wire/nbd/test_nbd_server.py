"""The server's codec against the rules of the protocol that implementers miss, byte for byte.

Each rule of the list below has tests that carry its number:
 1 no TLS: STARTTLS is an option like any unknown one    9 block status: extents
 2 options that are unknown, malformed or final          10 FUA on every command
 3 client flags, EXPORT_NAME                             11 write zeroes
 4 INFO and GO                                           12 which error for what
 5 metadata contexts                                     13 no extended headers, but their flag is survived
 6 structured replies                                    14 block sizes
 7 simple replies                                        15 disconnect and shutdown
 8 reads that must not be fragmented                     16 cache, descriptions
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

import pytest

from fleecer.errors import LocalProtocolError, RemoteProtocolError, UsageError
from fleecer.testing.nbd import (
    HELLO,
    OptionReply,
    Shelf,
    entering,
    feed,
    info_option,
    meta_option,
    option,
    option_replies,
    request,
    sent,
    string,
)
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ExportInfo, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd

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
BYTEWISE = pytest.mark.parametrize("piece", [1 << 30, 1], ids=["whole", "bytewise"])


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


def chunk(kind: int, body: bytes, *, done: bool = True, cookie: int = 1) -> bytes:
    return nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(body)) + body


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


# A table of whole sessions: what is sent in which state, and all that must come of it.


class Session(NamedTuple):
    given: bytes
    kinds: list[int]
    end: str  # "open", "finished", or a part of the failure's message
    export: str | None = None


SESSIONS = {
    "nothing sent, nothing happens": Session(b"", [], "open"),
    "flags only": Session(HELLO, [], "open"),
    "an unknown client flag closes (rule 3)": Session(b"\0\0\0\4", [], "client flags 0x4"),
    "a wrong option magic closes": Session(HELLO + bytes(16), [], "option magic"),
    "STARTTLS is unknown, as yet (rule 1)": Session(HELLO + option(nbd.OPT_STARTTLS), [nbd.REP_ERR_UNSUP], "open"),
    "EXTENDED_HEADERS is unknown (rule 13)": Session(
        HELLO + option(nbd.OPT_EXTENDED_HEADERS), [nbd.REP_ERR_UNSUP], "open"
    ),
    "an unknown option is consumed (rule 2)": Session(
        HELLO + option(77, b"x" * 1000) + option(nbd.OPT_LIST, b"!"), [nbd.REP_ERR_UNSUP, nbd.REP_ERR_INVALID], "open"
    ),
    "STRUCTURED_REPLY with data is invalid (rule 2)": Session(
        HELLO + option(nbd.OPT_STRUCTURED_REPLY, b"x") + option(nbd.OPT_STRUCTURED_REPLY),
        [nbd.REP_ERR_INVALID, nbd.REP_ACK],
        "open",
    ),
    "ABORT is acknowledged whatever it carries (rule 2)": Session(
        HELLO + option(nbd.OPT_ABORT, b"bye") + option(nbd.OPT_LIST), [nbd.REP_ACK], "finished"
    ),
    "a GO that fails leaves the session open (rule 4)": Session(
        HELLO + info_option(nbd.OPT_GO, "nowhere") + info_option(nbd.OPT_GO, "disk"),
        [nbd.REP_ERR_UNKNOWN, nbd.REP_INFO, nbd.REP_ACK],
        "open",
        "disk",
    ),
    "no option is taken after GO (rule 4)": Session(
        HELLO + info_option(nbd.OPT_GO, "disk") + option(nbd.OPT_LIST) + bytes(12),
        [nbd.REP_INFO, nbd.REP_ACK],
        "request magic",
        "disk",
    ),
    "a name longer than the option is invalid (rule 4)": Session(
        HELLO + option(nbd.OPT_GO, nbd.U32.pack(5) + b"disk" + b"\0\0"), [nbd.REP_ERR_INVALID], "open"
    ),
    "more requests for information than announced are invalid": Session(
        HELLO + option(nbd.OPT_INFO, string("disk") + b"\0\0\0\0"), [nbd.REP_ERR_INVALID], "open"
    ),
    "a name that is no UTF-8 is invalid": Session(
        HELLO + option(nbd.OPT_GO, nbd.U32.pack(1) + b"\xff\0\0"), [nbd.REP_ERR_INVALID], "open"
    ),
    "a name with NUL is invalid": Session(HELLO + info_option(nbd.OPT_GO, "a\0"), [nbd.REP_ERR_INVALID], "open"),
    "a name of 4097 bytes is invalid": Session(
        HELLO + info_option(nbd.OPT_GO, "n" * 4097), [nbd.REP_ERR_INVALID], "open"
    ),
    "contexts cannot be selected without structured replies (rule 5)": Session(
        HELLO + meta_option(nbd.OPT_SET_META_CONTEXT, "disk", ["base:allocation"]), [nbd.REP_ERR_INVALID], "open"
    ),
}


@BYTEWISE
@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS.keys())
def test_a_session_gets_the_replies_and_the_end_it_must(session: Session, piece: int) -> None:
    codec = server()
    assert feed(codec, session.given, piece) == []
    assert [reply.kind for reply in option_replies(sent(codec))] == session.kinds
    end = str(codec.failure) if codec.failure else "finished" if codec.finished else "open"
    assert session.end in end
    assert (codec.export.name if codec.export else None) == session.export


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert b"".join(ServerCodec(Shelf()).outgoing) == b"NBDMAGICIHAVEOPT\0\3"


# Rule 3.


@pytest.mark.parametrize("flags", [0, nbd.FLAG_FIXED_NEWSTYLE, nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES])
def test_rule_3_zeroes_follow_export_name_unless_the_client_declined_them(flags: int) -> None:
    codec = server()
    feed(codec, nbd.U32.pack(flags) + option(nbd.OPT_EXPORT_NAME, b"disk"))
    padding = b"" if flags & nbd.FLAG_NO_ZEROES else bytes(124)
    assert sent(codec) == struct.pack(">QH", DISK.size, DISK.transmission_flags(structured=False)) + padding
    assert codec.export is DISK


def test_rule_3_no_zeroes_follow_go() -> None:
    codec = server()
    feed(codec, nbd.U32.pack(nbd.FLAG_FIXED_NEWSTYLE) + info_option(nbd.OPT_GO, "disk"))
    assert [reply.kind for reply in option_replies(sent(codec))] == [nbd.REP_INFO, nbd.REP_ACK]


@pytest.mark.parametrize("name", [b"nowhere", b"\xff", b"n" * 5000])
def test_rule_3_a_bad_export_name_ends_the_session_without_a_word(name: bytes) -> None:
    codec = negotiating()
    feed(codec, option(nbd.OPT_EXPORT_NAME, name))
    assert codec.finished
    assert codec.failure is None
    assert sent(codec) == b""


# Rule 4.


@BYTEWISE
def test_rule_4_go_tells_size_and_flags_and_just_the_information_it_knows(piece: int) -> None:
    codec = negotiating()
    infos = [nbd.INFO_BLOCK_SIZE, nbd.INFO_NAME, nbd.INFO_DESCRIPTION, 999]
    feed(codec, info_option(nbd.OPT_GO, "disk", infos), piece)
    told = {reply.data[:2]: reply.data[2:] for reply in option_replies(sent(codec)) if reply.kind == nbd.REP_INFO}
    assert told == {
        b"\0\0": struct.pack(">QH", DISK.size, DISK.transmission_flags(structured=False)),
        b"\0\1": b"disk",
        b"\0\2": b"a disk",
        b"\0\3": struct.pack(">III", 1, 4096, 32 * MiB),
    }


def test_rule_4_info_and_go_say_the_same_and_only_go_enters() -> None:
    shelf = Shelf(DISK)
    codec = ServerCodec(shelf)
    sent(codec)
    feed(codec, HELLO)
    infos = [nbd.INFO_BLOCK_SIZE, nbd.INFO_NAME]
    first = replies(codec, info_option(nbd.OPT_INFO, "disk", infos))
    assert shelf.entered == []
    second = replies(codec, info_option(nbd.OPT_GO, "disk", infos))
    assert [(r.kind, r.data) for r in first] == [(r.kind, r.data) for r in second]
    assert shelf.entered == ["disk"]


def test_rule_4_an_export_that_vanished_or_is_full_is_refused_at_go() -> None:
    codec = server(full=("disk",))
    feed(codec, HELLO)
    assert kinds(codec, info_option(nbd.OPT_INFO, "disk")) == [nbd.REP_INFO, nbd.REP_ACK]
    assert kinds(codec, info_option(nbd.OPT_GO, "disk")) == [nbd.REP_ERR_UNKNOWN]
    assert codec.export is None


def test_rule_4_the_block_sizes_told_are_the_export_s_within_what_the_codec_takes() -> None:
    for codec, largest in ((server(), 1 * MiB), (ServerCodec(Shelf(COARSE), payload_max=512 * KiB), 512 * KiB)):
        sent(codec)
        feed(codec, HELLO + info_option(nbd.OPT_INFO, "coarse", [nbd.INFO_BLOCK_SIZE]))
        told = [reply.data for reply in option_replies(sent(codec))]
        assert struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, 512, 4096, largest) in told


# Rule 5.


def select(codec: ServerCodec, name: str, queries: list[str]) -> list[tuple[int, str]]:
    found = replies(codec, meta_option(nbd.OPT_SET_META_CONTEXT, name, queries))
    assert found[-1].kind == nbd.REP_ACK
    return [(int.from_bytes(reply.data[:4], "big"), reply.data[4:].decode()) for reply in found[:-1]]


def structured() -> ServerCodec:
    codec = negotiating()
    feed(codec, option(nbd.OPT_STRUCTURED_REPLY))
    sent(codec)
    return codec


def test_rule_5_selected_contexts_have_different_ids_and_doubles_count_once() -> None:
    selected = select(structured(), "disk", ["x-test:two", "base:allocation", "x-test:two"])
    assert sorted(name for _, name in selected) == ["base:allocation", "x-test:two"]
    assert len({context_id for context_id, _ in selected}) == 2


def test_rule_5_wildcards_and_unknown_names_select_nothing_and_are_no_error() -> None:
    assert select(structured(), "disk", ["base:", "x-test:", "other:thing", "base:new", "nocolon"]) == []
    assert select(structured(), "disk", []) == []


def listed(queries: list[str]) -> list[str]:
    found = replies(structured(), meta_option(nbd.OPT_LIST_META_CONTEXT, "disk", queries))
    assert found[-1].kind == nbd.REP_ACK
    assert all(reply.data[:4] == bytes(4) for reply in found[:-1])
    return [reply.data[4:].decode() for reply in found[:-1]]


def test_rule_5_listing_without_a_query_shows_all_and_a_namespace_shows_its_own() -> None:
    assert listed([]) == list(DISK.contexts)
    assert listed(["x-test:"]) == ["x-test:one", "x-test:two"]
    assert listed(["base:", "x-test:two", "other:"]) == ["base:allocation", "x-test:two"]
    assert listed(["x-test"]) == []


def entered_contexts(codec: ServerCodec, name: str) -> tuple[str, ...]:
    feed(codec, info_option(nbd.OPT_GO, name))
    assert codec.export is not None
    return codec.contexts


def test_rule_5_a_second_selection_replaces_the_first() -> None:
    codec = structured()
    select(codec, "disk", ["base:allocation"])
    select(codec, "disk", ["x-test:one"])
    assert entered_contexts(codec, "disk") == ("x-test:one",)


@pytest.mark.parametrize(
    "failing",
    [
        meta_option(nbd.OPT_SET_META_CONTEXT, "nowhere", ["base:allocation"]),
        option(nbd.OPT_SET_META_CONTEXT, b"\0\0"),
        option(nbd.OPT_SET_META_CONTEXT, string("disk") + nbd.U32.pack(1) + nbd.U32.pack(99) + b"base:"),
        option(nbd.OPT_SET_META_CONTEXT, string("disk") + nbd.U32.pack(0xFFFFFFFF)),
        meta_option(nbd.OPT_SET_META_CONTEXT, "disk", ["base:" + "x" * 5000]),
    ],
)
def test_rule_5_a_selection_that_fails_forgets_the_former(failing: bytes) -> None:
    codec = structured()
    select(codec, "disk", ["base:allocation"])
    (refusal,) = replies(codec, failing)
    assert refusal.kind in (nbd.REP_ERR_UNKNOWN, nbd.REP_ERR_INVALID)
    assert entered_contexts(codec, "disk") == ()


def test_rule_5_contexts_belong_to_the_export_they_were_selected_for() -> None:
    codec = structured()
    select(codec, "disk", ["base:allocation"])
    assert entered_contexts(codec, "huge") == ()
    status = ask(codec, request(nbd.CMD_BLOCK_STATUS, 0, 512))
    assert status.error == errno.EINVAL
    assert "metadata context" in status.message


def test_rule_5_a_context_that_vanished_before_go_is_dropped() -> None:
    shelf = Shelf(DISK)
    codec = ServerCodec(shelf)
    sent(codec)
    feed(codec, HELLO + option(nbd.OPT_STRUCTURED_REPLY))
    feed(codec, meta_option(nbd.OPT_SET_META_CONTEXT, "disk", ["base:allocation", "x-test:one"]))
    shelf.exports["disk"] = ExportInfo(name="disk", size=DISK.size, contexts=("base:allocation",))
    assert entered_contexts(codec, "disk") == ("base:allocation",)


# Rules 6, 7, 8: the forms of replies.


def test_rule_6_a_structured_read_is_one_chunk_that_ends_the_reply() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, 4096, 3))
    codec.reply_read(read, b"abc")
    assert sent(codec) == chunk(nbd.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 4096) + b"abc")


def test_rule_6_a_hole_tells_offset_and_size() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, 4096, 8192))
    assert codec.may_send_hole(read)
    codec.reply_read_hole(read)
    assert sent(codec) == chunk(nbd.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", 4096, 8192))


def test_rule_6_an_early_error_of_a_read_is_a_chunk_too() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, DISK.size, 1))
    codec.reply_error(read, read.error, read.message)
    text = read.message.encode()
    assert sent(codec) == chunk(nbd.REPLY_TYPE_ERROR, struct.pack(">IH", nbd.EINVAL, len(text)) + text)


@pytest.mark.parametrize("structured_replies", [True, False])
def test_rule_6_a_request_is_answered_once(structured_replies: bool) -> None:
    codec = transmitting(structured=structured_replies)
    for data in (request(nbd.CMD_READ, 0, 4), request(nbd.CMD_FLUSH)):
        asked = ask(codec, data)
        if asked.command == nbd.CMD_READ:
            codec.reply_read(asked, b"1234")
        else:
            codec.reply_done(asked)
        before = sent(codec)
        assert before
        with pytest.raises(LocalProtocolError, match="answered before"):
            codec.reply_error(asked, errno.EIO)
        with pytest.raises(LocalProtocolError):
            codec.reply_done(asked)
        with pytest.raises(LocalProtocolError):
            codec.reply_read(asked, b"1234")
        with pytest.raises(LocalProtocolError):
            codec.reply_read_hole(asked)
        assert sent(codec) == b""


def test_rule_6_a_read_is_not_answered_with_fewer_bytes_or_with_none() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, 0, 4))
    for wrong in (b"", b"123", b"12345"):
        with pytest.raises(LocalProtocolError):
            codec.reply_read(read, wrong)
    with pytest.raises(LocalProtocolError):
        codec.reply_done(read)
    assert not read.answered
    assert sent(codec) == b""


def test_rule_6_success_without_data_is_a_simple_reply_except_for_reads() -> None:
    codec = transmitting()
    codec.reply_done(ask(codec, request(nbd.CMD_WRITE, 0, data=b"x")))
    assert sent(codec) == simple()
    codec.reply_done(ask(codec, request(nbd.CMD_READ, 0, 0)))
    assert sent(codec) == chunk(nbd.REPLY_TYPE_NONE, b"")


def test_rule_7_without_structured_replies_data_and_errors_are_simple() -> None:
    codec = transmitting(structured=False)
    read = ask(codec, request(nbd.CMD_READ, 0, 3, cookie=7))
    assert not codec.may_send_hole(read)
    with pytest.raises(LocalProtocolError):
        codec.reply_read_hole(read)
    codec.reply_read(read, b"abc")
    assert sent(codec) == simple(cookie=7) + b"abc"
    codec.reply_error(ask(codec, request(nbd.CMD_READ, 0, 3, cookie=8)), errno.EIO, "lost on the wire")
    assert sent(codec) == simple(nbd.EIO, cookie=8)


def test_large_data_is_sent_as_its_own_buffer_and_small_data_behind_its_header() -> None:
    codec = transmitting()
    large, small = bytes(4096), bytes(1024)
    codec.reply_read(ask(codec, request(nbd.CMD_READ, 0, len(large))), large)
    assert len(codec.outgoing) == 2
    assert codec.outgoing[1] is large
    codec.reply_read(ask(codec, request(nbd.CMD_READ, 0, len(small))), memoryview(small))
    assert len(codec.outgoing) == 3


def test_rule_8_the_flag_df_is_offered_with_structured_replies_only_and_forbids_holes() -> None:
    assert DISK.transmission_flags(structured=True) & nbd.FLAG_SEND_DF
    assert not DISK.transmission_flags(structured=False) & nbd.FLAG_SEND_DF
    codec = transmitting()
    whole = ask(codec, request(nbd.CMD_READ, 0, 64 * KiB, flags=nbd.CMD_FLAG_DF))
    assert not whole.error
    assert not codec.may_send_hole(whole)
    with pytest.raises(LocalProtocolError):
        codec.reply_read_hole(whole)
    assert ask(transmitting(structured=False), request(nbd.CMD_READ, 0, 1, flags=nbd.CMD_FLAG_DF)).error == errno.EINVAL


# Rule 9.


def status_chunks(codec: ServerCodec) -> list[tuple[int, bool, int, list[tuple[int, int]]]]:
    """(type, done, context ID, extents) of each chunk sent."""
    data, chunks = sent(codec), []
    while data:
        _, flags, kind, _, length = nbd.CHUNK.unpack_from(data)
        body, data = data[20 : 20 + length], data[20 + length :]
        extents = list(nbd.EXTENT.iter_unpack(body[4:]))
        chunks.append((kind, bool(flags), int.from_bytes(body[:4], "big"), [(a, b) for a, b in extents]))
    return chunks


def test_rule_9_each_context_gets_one_chunk_and_only_the_last_is_done() -> None:
    codec = transmitting(contexts=("base:allocation", "x-test:one"))
    status = ask(codec, request(nbd.CMD_BLOCK_STATUS, 0, 8192))
    codec.reply_status(status, [("x-test:one", [(8192, 1)]), ("base:allocation", [(4096, 0), (4096, 3)])])
    first, second = status_chunks(codec)
    assert first[:2] == (nbd.REPLY_TYPE_BLOCK_STATUS, False)
    assert first[3] == [(8192, 1)]
    assert second[:2] == (nbd.REPLY_TYPE_BLOCK_STATUS, True)
    assert second[3] == [(4096, 0), (4096, 3)]
    assert first[2] != second[2]


EXTENTS: dict[str, tuple[int, list[tuple[int, int]], list[tuple[int, int]]]] = {
    "neighbours are merged": (0, [(512, 1), (512, 1), (512, 0)], [(1024, 1), (512, 0)]),
    "empty runs are dropped": (0, [(0, 3), (512, 1), (0, 2), (512, 1)], [(1024, 1)]),
    "the last is cut at the request's end": (0, [(4096, 1), (1 << 40, 0)], [(4096, 1), (4096, 0)]),
    "what lies behind the end is dropped": (0, [(8192, 1), (512, 0)], [(8192, 1)]),
    "one huge run is cut": (0, [(1 << 50, 3)], [(8192, 3)]),
    "an early end is allowed": (0, [(512, 1)], [(512, 1)]),
    "REQ_ONE leaves the first run, merged": (
        nbd.CMD_FLAG_REQ_ONE,
        [(512, 1), (512, 1), (512, 0), (512, 1)],
        [(1024, 1)],
    ),
    "REQ_ONE is cut too": (nbd.CMD_FLAG_REQ_ONE, [(9000, 1)], [(8192, 1)]),
}


@pytest.mark.parametrize(("flags", "given", "told"), EXTENTS.values(), ids=EXTENTS.keys())
def test_rule_9_extents_are_made_legal(flags: int, given: list[tuple[int, int]], told: list[tuple[int, int]]) -> None:
    codec = transmitting()
    codec.reply_status(ask(codec, request(nbd.CMD_BLOCK_STATUS, 0, 8192, flags=flags)), [("base:allocation", given)])
    ((_, done, _, extents),) = status_chunks(codec)
    assert done
    assert extents == told


def test_rule_9_no_more_than_128_ki_extents_are_sent() -> None:
    codec = ServerCodec(Shelf(ExportInfo(name="disk", size=1 << 40, contexts=("base:allocation",))))
    feed(codec, entering("disk", contexts=("base:allocation",)))
    sent(codec)
    status = ask(codec, request(nbd.CMD_BLOCK_STATUS, 0, 0xFFFFFFFF))
    codec.reply_status(status, [("base:allocation", [(512, i % 2) for i in range(128 * KiB + 10)])])
    ((_, _, _, extents),) = status_chunks(codec)
    assert len(extents) == 128 * KiB


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [("base:allocation", [])],
        [("base:allocation", [(0, 1)])],
        [("x-test:one", [(512, 0)])],
        [("base:allocation", [(512, 0)]), ("x-test:one", [(512, 0)])],
        [("base:allocation", [(512, 0)]), ("base:allocation", [(512, 0)])],
    ],
)
def test_rule_9_a_status_that_says_nothing_or_of_other_contexts_is_not_sent(
    answer: list[tuple[str, list[tuple[int, int]]]],
) -> None:
    codec = transmitting()
    status = ask(codec, request(nbd.CMD_BLOCK_STATUS, 0, 8192))
    with pytest.raises(LocalProtocolError):
        codec.reply_status(status, answer)
    assert sent(codec) == b""
    assert not status.answered
    with pytest.raises(LocalProtocolError):
        codec.reply_done(status)


# Rules 10 to 14: which requests are refused, and how.

FUA, NO_HOLE, DF, REQ_ONE, FAST = (
    nbd.CMD_FLAG_FUA,
    nbd.CMD_FLAG_NO_HOLE,
    nbd.CMD_FLAG_DF,
    nbd.CMD_FLAG_REQ_ONE,
    nbd.CMD_FLAG_FAST_ZERO,
)
PAYLOAD_LEN = 1 << 5


class Asked(NamedTuple):
    data: bytes
    error: int
    export: str = "disk"
    infos: tuple[int, ...] = ()


REFUSALS = {
    "rule 10: FUA on a read": Asked(request(nbd.CMD_READ, 0, 512, flags=FUA), 0),
    "rule 10: FUA on a write": Asked(request(nbd.CMD_WRITE, 0, flags=FUA, data=b"x"), 0),
    "rule 10: FUA on a flush": Asked(request(nbd.CMD_FLUSH, flags=FUA), 0),
    "rule 10: FUA on a trim": Asked(request(nbd.CMD_TRIM, 0, 512, flags=FUA), 0),
    "rule 10: FUA on a cache": Asked(request(nbd.CMD_CACHE, 0, 512, flags=FUA), 0),
    "rule 10: FUA on write zeroes": Asked(request(nbd.CMD_WRITE_ZEROES, 0, 512, flags=FUA), 0),
    "rule 10: FUA on block status": Asked(request(nbd.CMD_BLOCK_STATUS, 0, 512, flags=FUA | REQ_ONE), 0),
    "rule 11: NO_HOLE and FAST_ZERO": Asked(request(nbd.CMD_WRITE_ZEROES, 0, 512, flags=NO_HOLE | FAST), 0),
    "rule 11: FAST_ZERO where it is not offered": Asked(
        request(nbd.CMD_WRITE_ZEROES, 0, 512, flags=FAST), errno.EINVAL, "huge"
    ),
    "rule 11: 4 GiB of zeroes": Asked(request(nbd.CMD_WRITE_ZEROES, 0, 0xFFFFFFFF), 0, "huge"),
    "rule 12: read past the end": Asked(request(nbd.CMD_READ, DISK.size - 1, 2), errno.EINVAL),
    "rule 12: read where offset and length wrap 64 bits": Asked(request(nbd.CMD_READ, 2**64 - 1, 2), errno.EINVAL),
    "rule 12: trim past the end": Asked(request(nbd.CMD_TRIM, DISK.size, 1), errno.EINVAL),
    "rule 12: status past the end": Asked(request(nbd.CMD_BLOCK_STATUS, DISK.size, 1), errno.EINVAL),
    "rule 12: cache past the end": Asked(request(nbd.CMD_CACHE, DISK.size, 1), errno.EINVAL),
    "rule 12: write past the end": Asked(request(nbd.CMD_WRITE, DISK.size - 1, data=b"xx"), errno.ENOSPC),
    "rule 12: zeroes past the end": Asked(request(nbd.CMD_WRITE_ZEROES, DISK.size, 1), errno.ENOSPC),
    "rule 12: the last byte is inside": Asked(request(nbd.CMD_WRITE, DISK.size - 1, data=b"x"), 0),
    "rule 12: write on read-only": Asked(request(nbd.CMD_WRITE, 0, data=b"x"), errno.EPERM, "frozen"),
    "rule 12: trim on read-only": Asked(request(nbd.CMD_TRIM, 0, 1), errno.EPERM, "frozen"),
    "rule 12: zeroes on read-only": Asked(request(nbd.CMD_WRITE_ZEROES, 0, 1), errno.EPERM, "frozen"),
    "rule 12: flush on read-only": Asked(request(nbd.CMD_FLUSH), 0, "frozen"),
    "rule 12: unknown command": Asked(request(8, 0, 512), errno.EINVAL),
    "rule 12: unknown flag": Asked(request(nbd.CMD_READ, 0, 512, flags=1 << 15), errno.EINVAL),
    "rule 12: flag of another command": Asked(request(nbd.CMD_READ, 0, 512, flags=NO_HOLE), errno.EINVAL),
    "rule 12: cache with a flag of another": Asked(request(nbd.CMD_CACHE, 0, 512, flags=DF), errno.EINVAL),
    "rule 12: flush with a range": Asked(request(nbd.CMD_FLUSH, 0, 512), errno.EINVAL),
    "rule 12: trim where it is not offered": Asked(request(nbd.CMD_TRIM, 0, 512), errno.EINVAL, "huge"),
    "rule 12: read of nothing": Asked(request(nbd.CMD_READ, 0, 0), 0),
    "rule 12: read of nothing at the end": Asked(request(nbd.CMD_READ, DISK.size, 0), 0),
    "rule 12: write of nothing": Asked(request(nbd.CMD_WRITE, 0), 0),
    "rule 12: trim of nothing": Asked(request(nbd.CMD_TRIM, 0, 0), 0),
    "rule 12: zeroes of nothing": Asked(request(nbd.CMD_WRITE_ZEROES, 0, 0), 0),
    "rule 12: cache of nothing": Asked(request(nbd.CMD_CACHE, 0, 0), 0),
    "rule 12: status of nothing": Asked(request(nbd.CMD_BLOCK_STATUS, 0, 0), errno.EINVAL),
    "rule 13: PAYLOAD_LEN without extended headers": Asked(
        request(nbd.CMD_WRITE, 0, flags=PAYLOAD_LEN, data=b"x" * 600), errno.EINVAL
    ),
    "rule 14: unaligned read, sizes not asked for": Asked(request(nbd.CMD_READ, 1, 5), 0, "coarse"),
    "rule 14: unaligned read, sizes asked for": Asked(
        request(nbd.CMD_READ, 1, 512), errno.EINVAL, "coarse", (nbd.INFO_BLOCK_SIZE,)
    ),
    "rule 14: unaligned write, sizes asked for": Asked(
        request(nbd.CMD_WRITE, 0, data=b"x"), errno.EINVAL, "coarse", (nbd.INFO_BLOCK_SIZE,)
    ),
    "rule 14: unaligned zeroes, sizes asked for": Asked(
        request(nbd.CMD_WRITE_ZEROES, 512, 3), errno.EINVAL, "coarse", (nbd.INFO_BLOCK_SIZE,)
    ),
    "rule 14: aligned, sizes asked for": Asked(request(nbd.CMD_READ, 512, 512), 0, "coarse", (nbd.INFO_BLOCK_SIZE,)),
    "rule 14: 32 MiB are read whatever was advertised": Asked(request(nbd.CMD_READ, 0, 32 * MiB), 0, "huge"),
    "rule 14: more is not": Asked(request(nbd.CMD_READ, 0, 32 * MiB + 1), errno.EINVAL, "huge"),
    "rule 8: more, unfragmented, overflows": Asked(
        request(nbd.CMD_READ, 0, 32 * MiB + 1, flags=DF), errno.EOVERFLOW, "huge"
    ),
    "rule 16: cache": Asked(request(nbd.CMD_CACHE, 0, DISK.size), 0),
}


@BYTEWISE
@pytest.mark.parametrize("asked", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_request_that_breaks_a_rule_is_refused_and_the_next_is_served(asked: Asked, piece: int) -> None:
    codec = transmitting(asked.export, infos=asked.infos)
    first, second = feed(codec, asked.data + request(nbd.CMD_FLUSH, cookie=2), piece)
    assert first.error == asked.error
    assert bool(first.message) == bool(asked.error)
    assert "\n" not in first.message
    if first.error:
        assert not first.data
        codec.reply_error(first, first.error, first.message)
    assert (second.command, second.cookie, second.error) == (nbd.CMD_FLUSH, 2, 0)
    assert not codec.finished


ERRORS = {
    "EPERM": (errno.EPERM, nbd.EPERM),
    "EACCES": (errno.EACCES, nbd.EPERM),
    "EROFS": (errno.EROFS, nbd.EPERM),
    "EIO": (errno.EIO, nbd.EIO),
    "ENOMEM": (errno.ENOMEM, nbd.ENOMEM),
    "EINVAL": (errno.EINVAL, nbd.EINVAL),
    "ENOSPC": (errno.ENOSPC, nbd.ENOSPC),
    "EDQUOT": (errno.EDQUOT, nbd.ENOSPC),
    "EFBIG": (errno.EFBIG, nbd.ENOSPC),
    "ESHUTDOWN": (errno.ESHUTDOWN, nbd.ESHUTDOWN),
    "unknown to the protocol": (errno.ENOENT, nbd.EIO),
    "no error is no error": (0, nbd.EIO),
    "rule 12: EOVERFLOW is for unfragmented reads": (errno.EOVERFLOW, nbd.EINVAL),
    "rule 11: ENOTSUP is for fast zeroing": (errno.ENOTSUP, nbd.EINVAL),
}


@pytest.mark.parametrize(("code", "value"), ERRORS.values(), ids=ERRORS.keys())
def test_rule_12_an_errno_becomes_an_error_value(code: int, value: int) -> None:
    codec = transmitting(structured=False)
    codec.reply_error(ask(codec, request(nbd.CMD_WRITE_ZEROES, 0, 512)), code)
    assert sent(codec) == simple(value)


def test_rule_11_a_fast_zeroing_that_is_not_fast_is_told_apart() -> None:
    codec = transmitting(structured=False)
    codec.reply_error(ask(codec, request(nbd.CMD_WRITE_ZEROES, 0, 512, flags=FAST)), errno.ENOTSUP)
    assert sent(codec) == simple(nbd.ENOTSUP)


def test_rule_8_a_read_too_long_to_send_whole_is_told_apart() -> None:
    codec = transmitting()
    codec.reply_error(ask(codec, request(nbd.CMD_READ, 0, 512, flags=DF)), errno.EOVERFLOW)
    assert sent(codec) == chunk(nbd.REPLY_TYPE_ERROR, struct.pack(">IH", nbd.EOVERFLOW, 0))


# Transmission flags and block sizes (rules 10, 12, 14).


def test_transmission_flags_follow_the_export() -> None:
    always = nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_FLUSH | nbd.FLAG_SEND_FUA | nbd.FLAG_SEND_CACHE
    writable = nbd.FLAG_SEND_WRITE_ZEROES | nbd.FLAG_SEND_TRIM | nbd.FLAG_SEND_FAST_ZERO
    assert DISK.transmission_flags(structured=False) == always | nbd.FLAG_CAN_MULTI_CONN | writable
    assert READ_ONLY.transmission_flags(structured=False) == always | nbd.FLAG_READ_ONLY | nbd.FLAG_ROTATIONAL
    assert HUGE.transmission_flags(structured=True) == always | nbd.FLAG_SEND_WRITE_ZEROES | nbd.FLAG_SEND_DF


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "n" * 4097},
        {"name": "a\0b"},
        {"name": "\ud800"},
        {"description": "d" * 4097},
        {"contexts": ("base:" + "x" * 4096,)},
        {"size": -1},
        {"size": 1 << 63},
        {"block_size_min": 3},
        {"block_size_min": 128 * KiB, "block_size_preferred": 128 * KiB},
        {"block_size_preferred": 256},
        {"block_size_min": 8192},
        {"block_size_preferred": 5000},
        {"block_size_min": 512, "block_size_max": 1000},
        {"block_size_max": 0},
        {"block_size_max": 2048},
        {"block_size_max": 1 << 32},
    ],
)
def test_rule_14_an_export_that_the_protocol_cannot_describe_is_not_made(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"name": "disk", "size": 1 * MiB}
    with pytest.raises(UsageError, match="export '"):
        ExportInfo(**(fields | wrong))  # type: ignore[arg-type]


# Rule 15.


@BYTEWISE
def test_rule_15_disconnect_ends_parsing_and_open_requests_are_still_answered(piece: int) -> None:
    codec = transmitting()
    given = request(nbd.CMD_READ, 0, 4) + request(nbd.CMD_DISC) + request(nbd.CMD_READ, 0, 4)
    read = only(feed(codec, given, piece))
    assert codec.finished
    assert codec.failure is None
    codec.reply_read(read, b"1234")
    assert len(sent(codec)) == 32
    assert feed(codec, b"anything" * 100_000) == []


def test_rule_15_at_shutdown_options_are_refused_but_abort_is_not() -> None:
    codec = structured()
    codec.refuse_options = True
    assert kinds(codec, info_option(nbd.OPT_GO, "disk")) == [nbd.REP_ERR_SHUTDOWN]
    assert kinds(codec, option(nbd.OPT_LIST)) == [nbd.REP_ERR_SHUTDOWN]
    assert kinds(codec, option(77)) == [nbd.REP_ERR_SHUTDOWN]
    assert kinds(codec, option(nbd.OPT_ABORT)) == [nbd.REP_ACK]
    assert codec.finished


def test_rule_15_at_shutdown_export_name_ends_the_session() -> None:
    shelf = Shelf(DISK)
    codec = ServerCodec(shelf)
    codec.refuse_options = True
    feed(codec, HELLO + option(nbd.OPT_EXPORT_NAME, b"disk"))
    assert codec.finished
    assert shelf.entered == []


def test_rule_16_a_list_tells_names_and_descriptions() -> None:
    found = replies(negotiating(), option(nbd.OPT_LIST))
    assert [reply.kind for reply in found] == [nbd.REP_SERVER] * 4 + [nbd.REP_ACK]
    assert found[0].data == string("disk") + b"a disk"
    assert found[1].data == string("frozen")


# The flow of bytes.


@BYTEWISE
def test_requests_come_in_order_with_their_payloads(piece: int) -> None:
    codec = transmitting()
    given = b"".join(
        request(nbd.CMD_WRITE, i * 1000, cookie=i, data=bytes([i]) * (i * 100)) + request(nbd.CMD_READ, 0, 1)
        for i in range(1, 9)
    )
    requests = feed(codec, given, piece)
    assert [one.cookie for one in requests[::2]] == list(range(1, 9))
    for one in requests[::2]:
        assert bytes(one.data) == bytes([one.cookie]) * (one.cookie * 100)


@pytest.mark.parametrize("size", [64 * KiB - 28, 64 * KiB, 64 * KiB + 1, 256 * KiB - 28, 256 * KiB, 700 * KiB])
@pytest.mark.parametrize("piece", [1 << 30, 65_536, 4099])
def test_payloads_of_any_size_arrive_whole_and_private(size: int, piece: int) -> None:
    codec = transmitting()
    payloads = [bytes((i + k) % 251 for i in range(997)) * (size // 997 + 1) for k in range(3)]
    given = b"".join(request(nbd.CMD_WRITE, 0, cookie=k, data=payloads[k][:size]) for k in range(3))
    requests = feed(codec, given + request(nbd.CMD_FLUSH), piece)
    assert [bytes(one.data) for one in requests[:3]] == [payload[:size] for payload in payloads]
    assert requests[3].command == nbd.CMD_FLUSH
    room = codec.receive_buffer()
    room[:] = b"\xee" * len(room)
    assert [bytes(one.data) for one in requests[:3]] == [payload[:size] for payload in payloads]


def test_a_large_payload_is_received_where_it_stays() -> None:
    codec = transmitting()
    assert feed(codec, request(nbd.CMD_WRITE, 0, 512 * KiB) + b"begin") == []
    room = codec.receive_buffer()
    assert len(room) == 512 * KiB - 5
    room[-3:] = b"end"
    write = only(codec.received(len(room)))
    assert bytes(write.data[:5]) == b"begin"
    assert bytes(write.data[-3:]) == b"end"


def test_after_a_payload_longer_than_the_shared_buffer_the_next_header_is_fetched_alone() -> None:
    codec = transmitting()
    feed(codec, request(nbd.CMD_WRITE, 0, data=bytes(512 * KiB)))
    assert len(codec.receive_buffer()) < 64 * KiB
    feed(codec, request(nbd.CMD_FLUSH))
    assert len(codec.receive_buffer()) > 200 * KiB


@BYTEWISE
def test_requests_before_a_violation_are_returned_and_the_violation_is_told(piece: int) -> None:
    codec = transmitting()
    given = request(nbd.CMD_READ, 0, 4) + b"not a request at all, but 28 bytes"
    assert only(feed(codec, given, piece)).length == 4
    assert codec.finished
    assert isinstance(codec.failure, RemoteProtocolError)
    assert "request magic 0x6e6f7420" in str(codec.failure)


def test_after_the_end_bytes_are_taken_and_dropped() -> None:
    codec = transmitting()
    room = len(codec.receive_buffer())
    feed(codec, b"x" * (room // 2))
    assert codec.finished
    assert len(codec.receive_buffer()) == room
    assert feed(codec, b"x" * (2 * room)) == []
