"""From bytes to requests: which are refused and how (rules 8 and 10 to 16), and how payloads arrive."""

from __future__ import annotations

import errno
from typing import NamedTuple

import pytest
from tests.nbd_world import BYTEWISE, DISK, feed, only, request, sent, transmitting

from fleecer.errors import RemoteProtocolError
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import constants as nbd

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
