"""The server's replies against the rules that implementers miss (rules 6 to 9, 11, 12), byte for byte."""

from __future__ import annotations

import errno
import struct

import pytest
from tests.nbd_world import DISK, Shelf, ask, chunk, entering, feed, request, sent, simple, transmitting

from fleecer.errors import LocalProtocolError
from fleecer.units import KiB
from fleecer.wire.nbd import ExportInfo, ServerCodec
from fleecer.wire.nbd import constants as nbd

# Rules 6, 7, 8: the forms of replies.


def test_rule_6_a_structured_read_is_one_chunk_that_ends_the_reply() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, 4096, 3))
    codec.reply_read(read, b"abc")
    assert sent(codec) == chunk(nbd.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 4096) + b"abc")


def test_rule_6_a_hole_tells_offset_and_size() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, 4096, 8192))
    assert codec.may_fragment(read)
    codec.reply_read_hole(read)
    assert sent(codec) == chunk(nbd.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", 4096, 8192))


def test_rule_6_parts_of_a_read_are_chunks_and_the_last_answered_ends_it() -> None:
    codec = transmitting()
    first, second, third, fourth = codec.split(ask(codec, request(nbd.CMD_READ, 4000, 3 * 4096)), 4096)
    assert [(part.offset, part.length) for part in (first, second, third, fourth)] == [
        (4000, 96),
        (4096, 4096),
        (8192, 4096),
        (12288, 4000),
    ]
    codec.reply_read(fourth, b"4" * 4000)
    codec.reply_error(second, errno.EACCES, "no")
    codec.reply_read_hole(third)
    codec.reply_read(first, b"1" * 96)
    assert sent(codec) == b"".join(
        [
            chunk(nbd.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 12288) + b"4" * 4000, done=False),
            chunk(nbd.REPLY_TYPE_ERROR_OFFSET, struct.pack(">IH2sQ", nbd.EPERM, 2, b"no", 4096), done=False),
            chunk(nbd.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", 8192, 4096), done=False),
            chunk(nbd.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 4000) + b"1" * 96),
        ]
    )
    for part in (first, second):
        with pytest.raises(LocalProtocolError, match="answered before"):
            codec.reply_error(part, errno.EIO)


def test_rule_6_only_a_read_that_may_be_fragmented_is_split_and_once() -> None:
    codec = transmitting()
    read = ask(codec, request(nbd.CMD_READ, 0, 8192))
    parts = codec.split(read, 4096)
    for again in (read, parts[0]):
        with pytest.raises(LocalProtocolError):
            codec.split(again, 512)
    whole = ask(codec, request(nbd.CMD_READ, 0, 8192, flags=nbd.CMD_FLAG_DF))
    written = ask(codec, request(nbd.CMD_WRITE, 0, data=b"x" * 8192))
    beyond = ask(codec, request(nbd.CMD_READ, DISK.size, 8192))
    old = transmitting(structured=False)
    for other, asked in ((codec, whole), (codec, written), (codec, beyond), (old, ask(old, request(0, 0, 8192)))):
        with pytest.raises(LocalProtocolError):
            other.split(asked, 4096)
        assert not asked.answered


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
    assert not codec.may_fragment(read)
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
    assert not codec.may_fragment(whole)
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


# Errors.

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
    codec.reply_error(ask(codec, request(nbd.CMD_WRITE_ZEROES, 0, 512, flags=nbd.CMD_FLAG_FAST_ZERO)), errno.ENOTSUP)
    assert sent(codec) == simple(nbd.ENOTSUP)


def test_rule_8_a_read_too_long_to_send_whole_is_told_apart() -> None:
    codec = transmitting()
    codec.reply_error(ask(codec, request(nbd.CMD_READ, 0, 512, flags=nbd.CMD_FLAG_DF)), errno.EOVERFLOW)
    assert sent(codec) == chunk(nbd.REPLY_TYPE_ERROR, struct.pack(">IH", nbd.EOVERFLOW, 0))
