"""Requests done in the pass that parses them: the same answers as one by one, in the order sent, and no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.nbd_world import BYTEWISE, DISK, request, sent, transmitting

from fleecer.errors import IoError
from fleecer.ranges import Buffer
from fleecer.units import KiB
from fleecer.wire.nbd import AtOnce, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd

BLOCK = 4 * KiB
HEADER_BYTES = nbd.DATA_CHUNK.size


class Disk:
    """Memory, of which nothing is at hand from `far` on. `begun` has what was asked of it, in order."""

    def __init__(self, far: int = DISK.size) -> None:
        self.data = bytearray(b"\1" * DISK.size)
        self.far = far
        self.begun: list[tuple[str, int, int]] = []

    def read(self, offset: int, into: memoryview) -> bool:
        self.begun.append(("read", offset, len(into)))
        near = offset + len(into) <= self.far
        into[:] = self.data[offset : offset + len(into)] if near else b"?" * len(into)
        return near

    def write(self, offset: int, data: Buffer) -> bool:
        self.begun.append(("write", offset, len(data)))
        near = offset + len(data) <= self.far
        if near:
            self.data[offset : offset + len(data)] = data
        return near


def at_once(disk: Disk, left_bytes: int = 1 << 30) -> AtOnce:
    made = AtOnce()
    made.read, made.write, made.left_bytes = disk.read, disk.write, left_bytes
    return made


def taken(done: AtOnce) -> bytes | None:
    """What is to be sent after a pass; None where there was none."""
    replies, done.replies = done.replies, None
    return None if replies is None else bytes(replies[: done.filled])


def fed(codec: ServerCodec, data: bytes, done: AtOnce, piece: int = 1 << 30) -> tuple[list[Request], bytes]:
    """What is left to do of `data`, and what was answered."""
    requests: list[Request] = []
    answered = b""
    left = memoryview(data)
    while left:
        room = codec.receive_buffer()
        count = min(len(room), len(left), piece)
        room[:count] = left[:count]
        left = left[count:]
        while True:
            requests += codec.received(count, done)
            answered += (replies := taken(done)) or b""
            count = 0
            if replies is None or not done.is_full:
                break
    return requests, answered


def data_chunk(cookie: int, offset: int, data: bytes) -> bytes:
    flags, kind = nbd.REPLY_FLAG_DONE, nbd.REPLY_TYPE_OFFSET_DATA
    header = nbd.DATA_CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(data) + 8, offset)
    return header + data


def hole_chunk(cookie: int, offset: int, length: int) -> bytes:
    flags, kind = nbd.REPLY_FLAG_DONE, nbd.REPLY_TYPE_OFFSET_HOLE
    return nbd.HOLE_CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, 12, offset, length)


def simple(cookie: int, data: bytes = b"") -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie) + data


@BYTEWISE
@pytest.mark.parametrize("structured", [True, False])
def test_reads_and_writes_are_done_and_answered_in_order(structured: bool, piece: int) -> None:
    codec, disk = transmitting(structured=structured), Disk()
    disk.data[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    disk.data[2 * BLOCK : 2 * BLOCK + 8] = bytes(8)
    asked = (
        request(nbd.CMD_READ, 0, BLOCK, cookie=1)
        + request(nbd.CMD_READ, BLOCK, BLOCK, cookie=2)
        + request(nbd.CMD_WRITE, 1, data=b"abc", cookie=3)
        + request(nbd.CMD_READ, 0, 5, cookie=4)
        + request(nbd.CMD_READ, 2 * BLOCK, BLOCK, cookie=5)
    )
    done = at_once(disk)
    ended_in_zeroes = bytes(8) + b"\1" * (BLOCK - 8)
    requests, answered = fed(codec, asked, done, piece)
    assert not requests
    if structured:
        expected = data_chunk(1, 0, b"\1" * BLOCK) + hole_chunk(2, BLOCK, BLOCK) + simple(3)
        expected += data_chunk(4, 0, b"\1abc\1") + data_chunk(5, 2 * BLOCK, ended_in_zeroes)
    else:
        expected = simple(1, b"\1" * BLOCK) + simple(2, bytes(BLOCK)) + simple(3)
        expected += simple(4, b"\1abc\1") + simple(5, ended_in_zeroes)
    assert answered == expected


def test_what_was_done_is_counted() -> None:
    done = at_once(Disk())
    asked = request(nbd.CMD_READ, 0, 100) + request(nbd.CMD_WRITE, 0, data=b"x" * 10) + request(nbd.CMD_READ, 0, 1)
    fed(transmitting(), asked, done)
    assert (done.reads, done.bytes_read, done.writes, done.bytes_written) == (2, 101, 1, 10)


NOT_FOR_THIS = {
    "flush": request(nbd.CMD_FLUSH),
    "trim": request(nbd.CMD_TRIM, 0, BLOCK),
    "zeroes": request(nbd.CMD_WRITE_ZEROES, 0, BLOCK),
    "status": request(nbd.CMD_BLOCK_STATUS, 0, BLOCK),
    "read with a flag": request(nbd.CMD_READ, 0, BLOCK, flags=nbd.CMD_FLAG_DF),
    "write with FUA": request(nbd.CMD_WRITE, 0, data=b"x", flags=nbd.CMD_FLAG_FUA),
    "long read": request(nbd.CMD_READ, 0, AtOnce.READ_MAX_BYTES + 1),
    "read of nothing": request(nbd.CMD_READ, 0, 0),
    "read past the end": request(nbd.CMD_READ, DISK.size - 1, 2),
    "write past the end": request(nbd.CMD_WRITE, DISK.size - 1, data=b"xy"),
    "unknown": request(77, 0, BLOCK),
}


@pytest.mark.parametrize("other", NOT_FOR_THIS.values(), ids=NOT_FOR_THIS.keys())
def test_whatever_is_not_for_this_ends_it_and_is_parsed_with_all_that_follows(other: bytes) -> None:
    disk = Disk()
    before, after = request(nbd.CMD_READ, 7, 1, cookie=1), request(nbd.CMD_READ, 8, 1, cookie=2)
    requests, answered = fed(transmitting(), before + other + after, at_once(disk))
    assert answered == data_chunk(1, 7, b"\1")
    assert disk.begun == [("read", 7, 1)], "a later request overtook one that was asked before it"
    assert [one.cookie for one in requests] == [1, 2]


@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_WRITE])
def test_what_would_have_to_wait_ends_it(command: int) -> None:
    disk = Disk(far=BLOCK)
    far = request(command, BLOCK, 1 if command == nbd.CMD_READ else 0, data=b"x" if command == nbd.CMD_WRITE else b"")
    asked = request(nbd.CMD_READ, 0, 1, cookie=2) + far + request(nbd.CMD_READ, 1, 1, cookie=3)
    requests, answered = fed(transmitting(), asked, at_once(disk))
    assert answered == data_chunk(2, 0, b"\1")
    assert [(one.command, one.cookie) for one in requests] == [(command, 1), (nbd.CMD_READ, 3)]
    assert disk.begun[-1][1] == BLOCK
    if command == nbd.CMD_WRITE:
        assert requests[0].data == b"x"


@pytest.mark.parametrize("name", ["frozen", "coarse"])
def test_rules_of_the_export_hold(name: str) -> None:
    disk = Disk()
    codec = transmitting(name, contexts=(), infos=(nbd.INFO_BLOCK_SIZE,))
    requests, answered = fed(codec, request(nbd.CMD_WRITE, 512, data=b"x" * 100), at_once(disk))
    assert not answered
    assert not disk.begun
    assert requests[0].error == (nbd.EPERM if name == "frozen" else nbd.EINVAL)


def test_without_a_way_to_read_or_to_write_that_is_left() -> None:
    for missing in ("read", "write"):
        disk = Disk()
        done = at_once(disk)
        setattr(done, missing, None)
        asked = request(nbd.CMD_READ, 0, 1) if missing == "read" else request(nbd.CMD_WRITE, 0, data=b"x")
        requests, answered = fed(transmitting(), asked, done)
        assert len(requests) == 1
        assert not answered
        assert not disk.begun


def test_no_more_is_done_than_is_allowed() -> None:
    disk = Disk()
    done = at_once(disk, left_bytes=2 * (AtOnce.REQUEST_BYTES + 100))
    asked = b"".join(request(nbd.CMD_READ, 0, 100, cookie=cookie) for cookie in range(5))
    requests, answered = fed(transmitting(), asked, done)
    assert len(disk.begun) == 2
    assert [one.cookie for one in requests] == [2, 3, 4]
    assert len(answered) == 2 * (HEADER_BYTES + 100)


def test_replies_that_fill_the_memory_are_sent_before_more_is_done() -> None:
    disk = Disk()
    count = 3 * AtOnce.REPLIES_BYTES // BLOCK
    codec, done = transmitting(), at_once(disk)
    asked = b"".join(request(nbd.CMD_READ, 0, BLOCK, cookie=cookie) for cookie in range(count))
    room = codec.receive_buffer()
    room[: len(asked)] = asked
    assert (codec.received(len(asked), done), done.is_full) == ([], True)
    assert AtOnce.REPLIES_BYTES - HEADER_BYTES - BLOCK < done.filled <= AtOnce.REPLIES_BYTES
    requests, answered = [], taken(done) or b""
    while done.is_full:
        requests += codec.received(0, done)
        answered += taken(done) or b""
    assert not requests
    assert len(answered) == count * (HEADER_BYTES + BLOCK)


def test_writes_fill_the_memory_too() -> None:
    count = AtOnce.REPLIES_BYTES // nbd.SIMPLE_REPLY.size + 1
    asked = b"".join(request(nbd.CMD_WRITE, 0, data=b"x", cookie=cookie) for cookie in range(count))
    requests, answered = fed(transmitting(), asked, at_once(Disk()))
    assert not requests
    assert answered == b"".join(map(simple, range(count)))


@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_WRITE])
def test_a_failure_is_handed_on_and_what_follows_is_done(command: int) -> None:
    disk = Disk()

    def failing(offset: int, _: object) -> bool:
        raise IoError(5, "disk0", "request", offset)

    done = at_once(disk)
    if command == nbd.CMD_READ:
        done.read, asked, after = failing, request(command, 3, 1), request(nbd.CMD_WRITE, 0, data=b"y", cookie=2)
    else:
        done.write, asked, after = failing, request(command, 3, data=b"xx"), request(nbd.CMD_READ, 0, 1, cookie=2)
    codec = transmitting()
    codec.receive_buffer()[: len(asked + after)] = asked + after
    assert not codec.received(len(asked + after), done)
    assert done.failed is not None
    failed, error = done.failed
    assert (failed.command, failed.cookie, failed.offset) == (command, 1, 3)
    assert isinstance(error, IoError)
    assert done.is_full, "there is more to do"
    assert taken(done) == b""
    assert not codec.received(0, done)
    assert taken(done) == (simple(2) if command == nbd.CMD_READ else data_chunk(2, 0, b"\1"))
    codec.reply_error(failed, 5, "no")
    assert sent(codec)


Asked = tuple[int, int, int]
ASKED: st.SearchStrategy[list[Asked]] = st.lists(
    st.tuples(
        st.sampled_from([nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_FLUSH, nbd.CMD_TRIM]),
        st.integers(0, DISK.size // BLOCK - 1),
        st.sampled_from([1, 512, BLOCK, AtOnce.READ_MAX_BYTES, AtOnce.READ_MAX_BYTES + 1]),
    ),
    max_size=30,
)


@given(asked=ASKED, far=st.integers(0, DISK.size), piece=st.sampled_from([1 << 30, 4097, 100]))
def test_every_request_is_answered_just_as_it_is_without(asked: list[Asked], far: int, piece: int) -> None:
    def encoded(cookie: int, one: Asked) -> bytes:
        command, block, length = one
        offset = min(block * BLOCK, DISK.size - length)
        if command == nbd.CMD_FLUSH:
            return request(command, cookie=cookie)
        data = bytes([cookie]) * length if command == nbd.CMD_WRITE else b""
        return request(command, offset, length, cookie=cookie, data=data)

    def run(far: int, answer: Callable[[ServerCodec, Request, Disk], None]) -> tuple[list[bytes], bytearray]:
        codec, disk = transmitting(), Disk(far)
        disk.data[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
        answers: list[bytes] = []
        for cookie, one in enumerate(asked):
            requests, answered = fed(codec, encoded(cookie, one), at_once(disk), piece)
            for left in requests:
                answer(codec, left, disk)
            answers.append(answered + sent(codec))
        return answers, disk.data

    def answer(codec: ServerCodec, left: Request, disk: Disk) -> None:
        start, stop = left.offset, left.offset + left.length
        if left.command == nbd.CMD_READ:
            data = bytes(disk.data[start:stop])
            (codec.reply_read if any(data) else lambda one, _: codec.reply_read_hole(one))(left, data)
            return
        if left.command == nbd.CMD_WRITE:
            disk.data[start:stop] = left.data
        codec.reply_done(left)

    assert run(far, answer) == run(0, answer)
