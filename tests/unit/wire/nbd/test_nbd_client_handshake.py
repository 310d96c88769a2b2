"""How the client's codec negotiates with servers of every age, and with hostile ones."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest
from tests.nbd_world import (
    ACCEPTED,
    ALL_FLAGS,
    BYTEWISE,
    CONTEXT,
    DISK,
    GREETING,
    STRUCTURED,
    feed,
    info_export,
    rep,
    sent,
    string,
    went,
)

from fleecer.errors import NotFound, UsageError
from fleecer.units import MiB
from fleecer.wire.nbd import ClientCodec, ExportUnknown
from fleecer.wire.nbd import constants as nbd
from fleecer.wire.nbd.client_handshake import Mode


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
        GREETING + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNSUP) + struct.pack(">QH", DISK.size, 1),
        [S, M, G, E],
        "ready",
    ),
    "no GO, and zeroes after the flags": Handshake(
        b"NBDMAGICIHAVEOPT\0\1" + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNSUP) + struct.pack(">QH124x", 512, 1),
        [S, M, G, E],
        "ready",
    ),
    "the zeroes are not all there": Handshake(
        b"NBDMAGICIHAVEOPT\0\1" + STRUCTURED + CONTEXT + rep(G, nbd.REP_ERR_UNSUP) + struct.pack(">QH123x", 512, 1),
        [S, M, G, E],
        "open",
    ),
    "plain newstyle": Handshake(b"NBDMAGICIHAVEOPT\0\2" + struct.pack(">QH", DISK.size, 1), [E], "ready"),
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
    assert (info.name, info.description, info.size) == ("Disk", "a disk", DISK.size)
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


def test_the_end_of_the_stream_after_a_list_is_no_failure() -> None:
    codec = ClientCodec("", mode="list")
    feed(codec, HANDSHAKES["a list"].said)
    codec.eof()
    assert codec.failure is None
