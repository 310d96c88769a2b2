"""The server's half of the handshake against the rules that implementers miss, byte for byte.

The rules' numbers stand in the tests' names, here and in the other tests of the server's codec:
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
from tests.nbd_world import (
    BYTEWISE,
    COARSE,
    DISK,
    HELLO,
    HUGE,
    READ_ONLY,
    Shelf,
    ask,
    feed,
    info_option,
    kinds,
    meta_option,
    negotiating,
    option,
    option_replies,
    replies,
    request,
    sent,
    server,
    string,
)

from fleecer.errors import UsageError
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ExportInfo, ServerCodec
from fleecer.wire.nbd import constants as nbd

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


# Rules 15 and 16.


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
