"""Sends aside: order, whose memory it is until when, every kind of end, and what is done where none can be had.

Each rule is tried on a stand-in for the kernel, which a test can hold up and which looks at the memory no sooner than
it ends a send, and where possible on the kernel itself.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import errno
import gc
import os
import platform
import random
import select
import socket
import struct
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from tests.unit.net.test_stream import Collector, turns

from fleecer.net import sends
from fleecer.net.sends import BYTES_MAX, BYTES_MIN, PIECES_MAX, SENDS_MAX, SWITCH_VARIABLE, sends_of
from fleecer.net.stream import SocketStream
from fleecer.units import KiB, MiB

LONG = BYTES_MIN


class StandIn:
    """Behaves as `_Ring`, and sends when it is told to, but for a trial, of which `trial` is the result; with None that
    does not end. `most` is what it takes of a message."""

    made: list[StandIn]
    refuses = False
    trial: int | None = -errno.EAGAIN

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.begun: collections.deque[tuple[int, int, int]] = collections.deque()
        self.most = 1 << 30
        self._is_trial = True
        self._closed = False
        self._done: list[tuple[int, int]] = []
        self.made.append(self)

    def begin(self, fd: int, message_address: int, number: int) -> bool:
        if self.refuses:
            return False
        self.begun.append((fd, message_address, number))
        assert len(self.begun) <= self.entries
        if self._is_trial:
            self._is_trial = False
            if self.trial is not None:
                self.end(self.trial)
        return True

    def end(self, result: int | None = None) -> None:
        """Ends the oldest send, with `result` or by what the socket takes."""
        fd, message_address, number = self.begun.popleft()
        if result is None:
            _, _, vector, count, *_ = struct.unpack("<7Q", ctypes.string_at(message_address, 56))
            ranges = struct.iter_unpack("<QQ", ctypes.string_at(vector, 16 * count))
            message = b"".join(ctypes.string_at(address, length) for address, length in ranges)
            try:
                with socket.socket(fileno=os.dup(fd)) as sock:  # as the kernel, it looks at the number only now
                    result = sock.send(message[: self.most], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError as error:
                result = -(error.errno or errno.EIO)
        self._done.append((number, result))
        os.eventfd_write(self.fd, 1)

    def completions(self) -> list[tuple[int, int]]:
        os.eventfd_read(self.fd)
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        assert not self.begun, "the ring is given back while it sends"
        self._closed = True
        os.close(self.fd)

    def is_closed(self) -> bool:
        return self._closed


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The stand-ins that are made in this test."""
    made: list[StandIn] = []
    monkeypatch.setattr(StandIn, "made", made, raising=False)
    monkeypatch.setattr(sends, "_Ring", StandIn)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    return made


@pytest.fixture
def kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the kernel; a skip that says why where it does not send for us."""
    try:
        sends._Ring(1).close()
    except OSError as error:
        pytest.skip(f"this kernel gives no io_uring: {error}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as made:
        yield made


class Pair:
    """A stream, what hears of it, and the bare socket at its other end."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        for end in (ours, self.peer):
            end.setblocking(False)
        self.stream = SocketStream(ours, "peer")
        self.end = Collector()
        self.stream.begin(self.end)

    def read(self) -> bytes:
        """What has come by now."""
        found = bytearray()
        try:
            while data := self.peer.recv(1 * MiB):
                found += data
        except BlockingIOError:
            pass
        return bytes(found)

    async def read_exactly(self, count: int) -> bytes:
        found = bytearray()
        async with asyncio.timeout(20):
            while len(found) < count:
                found += self.read()
                await asyncio.sleep(0.001)
        return bytes(found)

    async def over(self) -> None:
        self.stream.abort()
        self.peer.close()
        await self.end.ended()


def long(seed: int, length: int = LONG) -> bytearray:
    return bytearray(random.Random(seed).randbytes(length))


async def tried_pair() -> Pair:
    """A pair, after the trial of the ring."""
    pair, other = Pair(), Pair()
    other.stream.send([long(0)], aside=True)
    assert other.read() == long(0), "it was sent aside before there was a trial"
    own = sends_of(asyncio.get_running_loop())
    assert own is not None
    async with asyncio.timeout(20):
        while own._trial is not None:
            await asyncio.sleep(0.001)
    await other.over()
    return pair


# On the kernel itself.


@pytest.mark.usefixtures("kernels_own")
def test_what_the_kernel_sends_aside_arrives_in_its_place_and_its_memory_is_used_no_longer_than_told(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    asides = 0
    begin = sends._Ring.begin

    def counted(ring: Any, *arguments: Any) -> bool:
        nonlocal asides
        asides += 1
        return begin(ring, *arguments)

    monkeypatch.setattr(sends._Ring, "begin", counted)

    async def scenario() -> None:
        pair = await tried_pair()
        stream = pair.stream
        generator = random.Random(1)
        expected, found = bytearray(), bytearray()
        used: collections.deque[tuple[int, list[bytearray]]] = collections.deque()
        for _ in range(200):
            pieces = [
                bytearray(generator.randbytes(generator.choice((16, 28, 65, 4096, 64 * KiB, 300 * KiB))))
                for _ in range(generator.randrange(1, 8))
            ]
            expected += b"".join(pieces)
            stream.send(pieces, aside=generator.random() < 0.8)
            used.append((stream.sent_bytes, pieces))
            for _ in range(generator.randrange(3)):
                found += pair.read()
                await asyncio.sleep(0)
            while used and used[0][0] <= stream.taken_bytes:  # as whoever uses the memory again does
                for piece in used.popleft()[1]:
                    piece[:] = bytes(len(piece))
        found += await pair.read_exactly(len(expected) - len(found))
        assert found == expected
        await turns()
        assert stream.taken_bytes == stream.sent_bytes == len(expected)
        assert stream.queued_bytes == 0
        await pair.over()

    runner.run(scenario())
    assert asides > 10


@pytest.mark.usefixtures("kernels_own")
def test_a_stream_that_ends_while_the_kernel_sends_leaves_nothing_behind(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        before = set(os.listdir("/proc/self/fd"))
        for number in range(20):
            pair = await tried_pair()
            pair.stream.send([long(number, 1 * MiB)], aside=True)
            assert pair.stream.taken_bytes == 0
            if number % 2:
                pair.peer.close()
            await pair.over()
        assert set(os.listdir("/proc/self/fd")) == before

    runner.run(scenario())


@pytest.mark.usefixtures("kernels_own")
def test_a_message_to_who_is_gone_ends_the_stream_with_an_error(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        pair.stream.pause()  # so that the end is not read
        pair.peer.close()
        pair.stream.send([long(1)], aside=True)
        error = await pair.end.ended()
        assert error is not None
        assert (error.errno, error.operation) == (errno.EPIPE, "send")

    runner.run(scenario())


@pytest.mark.usefixtures("kernels_own")
def test_what_was_for_who_is_gone_reaches_nobody_else(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        first = await tried_pair()
        for number in range(300):
            gone = Pair()
            gone.stream.send([long(number)], aside=True)
            gone.stream.abort()
            pair = Pair()  # which gets the same descriptors, if they are free
            await gone.end.ended()
            assert pair.read() == b""
            gone.peer.close()
            await pair.over()
        await first.over()

    runner.run(scenario())


@pytest.mark.usefixtures("kernels_own")
def test_who_does_not_read_holds_no_worker(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        pair, other = await tried_pair(), Pair()
        data = long(1, 16 * MiB)
        pair.stream.send([data], aside=True)
        async with asyncio.timeout(20):
            while not pair.stream.queued_bytes:  # once the kernel has said how much of it there was room for
                await asyncio.sleep(0)
        other.stream.send([long(2)], aside=True)  # for which there is but that worker
        assert other.stream.taken_bytes == 0
        assert await other.read_exactly(LONG) == long(2)
        assert await pair.read_exactly(len(data)) == data
        await pair.over()
        await other.over()

    runner.run(scenario())


# On the stand-in.


def test_memory_counts_as_taken_when_the_kernel_says_so_and_not_before(
    runner: asyncio.Runner, rings: list[StandIn]
) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        stream = pair.stream
        stream.send([b"before"])
        first, second = long(1), long(2)
        stream.send([b"head", first], aside=True)
        assert (stream.taken_bytes, stream.queued_bytes) == (6, 0)
        stream.send([b"next", second])
        stream.send([b"tail"], aside=True)
        await turns()
        assert (stream.taken_bytes, stream.queued_bytes) == (6, len(second) + 8)
        assert pair.read() == b"before"
        assert pair.end.sent_count == 0
        first[0] ^= 0xFF  # which shows that it is looked at no sooner
        rings[0].end()
        await turns()
        assert pair.read() == b"head" + first
        assert len(rings[0].begun) == 1, "what had to wait is long, and may go the same way"
        assert (stream.taken_bytes, stream.queued_bytes) == (6 + 4 + len(first), 0)
        assert pair.end.sent_count == 1, "there is room for more while it is sent"
        rings[0].end()
        await turns()
        assert pair.read() == b"next" + second + b"tail"
        assert stream.taken_bytes == stream.sent_bytes
        assert pair.end.sent_count == 2
        await pair.over()

    runner.run(scenario())


@pytest.mark.parametrize("most", [1, 4, 5, 70_000, LONG + 3])
def test_what_the_kernel_had_no_room_for_follows(runner: asyncio.Runner, rings: list[StandIn], most: int) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        first = long(1)
        pair.stream.send([b"head", first], aside=True)
        pair.stream.send([b"tail"])
        rings[0].most = most
        rings[0].end()
        assert await pair.read_exactly(len(first) + 8) == b"head" + first + b"tail"
        await turns()
        assert pair.stream.taken_bytes == pair.stream.sent_bytes
        assert pair.stream.queued_bytes == 0
        await pair.over()

    runner.run(scenario())


def test_a_socket_without_room_is_waited_for(runner: asyncio.Runner, rings: list[StandIn]) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        first = long(1)
        pair.stream.send([first], aside=True)
        rings[0].end(-errno.EAGAIN)
        assert await pair.read_exactly(len(first)) == first
        await pair.over()

    runner.run(scenario())


@pytest.mark.parametrize("error", [errno.ECANCELED, errno.EINVAL, errno.ENOMEM, errno.EBADF])
def test_where_a_worker_fails_the_loop_sends_and_asks_it_no_more(
    runner: asyncio.Runner, rings: list[StandIn], error: int
) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        pair.stream.send([long(1)], aside=True)
        rings[0].end(-error)
        assert await pair.read_exactly(LONG) == long(1)
        await turns()
        pair.stream.send([long(2)], aside=True)
        assert not rings[0].begun
        assert pair.read() == long(2)
        assert not pair.end.endings
        await pair.over()

    runner.run(scenario())


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EAGAIN])
def test_what_is_a_sockets_own_fault_is_not_the_workers(
    runner: asyncio.Runner, rings: list[StandIn], error: int
) -> None:
    async def scenario() -> None:
        other, pair = await tried_pair(), Pair()
        pair.stream.send([long(1)], aside=True)
        rings[0].end(-error)
        await turns()
        other.stream.send([long(2)], aside=True)
        assert len(rings[0].begun) == 1
        rings[0].end()
        await turns()
        assert other.read() == long(2)
        await pair.over()
        await other.over()

    runner.run(scenario())


@pytest.mark.parametrize("result", [None, 1, -errno.ECANCELED, -errno.EINVAL])
def test_a_ring_that_fails_its_trial_is_not_used(
    runner: asyncio.Runner, rings: list[StandIn], monkeypatch: pytest.MonkeyPatch, result: int | None
) -> None:
    monkeypatch.setattr(StandIn, "trial", result)

    async def scenario() -> None:
        pair = Pair()
        for number in range(3):
            pair.stream.send([long(number)], aside=True)
            assert pair.read() == long(number)
            await turns()
            assert len(rings[0].begun) == (result is None)
        await pair.over()
        assert len(rings) == 1
        assert rings[0].is_closed() == (result is not None), "a trial that goes on needs its ring"
        if result is None:
            rings[0].end(-errno.EAGAIN)
            await turns()
            assert rings[0].is_closed()

    runner.run(scenario())


def test_close_waits_for_what_is_sent_aside(runner: asyncio.Runner, rings: list[StandIn]) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        first, second = long(1), long(2)
        pair.stream.send([first], aside=True)
        pair.stream.send([second], aside=True)
        pair.stream.close()
        await turns()
        assert not pair.end.endings
        rings[0].end()
        await turns()
        assert not pair.end.endings
        rings[0].end()
        assert await pair.end.ended() is None
        assert pair.read() == first + second
        assert pair.peer.recv(1) == b""
        pair.peer.close()

    runner.run(scenario())


def test_what_is_left_over_at_close_is_sent_before_the_end(runner: asyncio.Runner, rings: list[StandIn]) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        first = long(1)
        pair.stream.send([first], aside=True)
        pair.stream.close()
        rings[0].most = 70_000
        rings[0].end()
        assert await pair.end.ended() is None
        assert pair.read() == first
        pair.peer.close()

    runner.run(scenario())


@pytest.mark.parametrize("result", [None, -errno.EPIPE])
def test_a_stream_that_is_aborted_has_not_ended_before_the_kernel_lets_go_of_its_memory(
    runner: asyncio.Runner, rings: list[StandIn], result: int | None
) -> None:
    async def scenario() -> None:
        pair, other = await tried_pair(), Pair()
        pair.stream.send([b"before"])
        pair.stream.send([long(1)], aside=True)
        pair.stream.send([b"after"])
        pair.stream.abort()
        await turns()
        assert not pair.end.endings
        assert pair.stream.taken_bytes == 6, "the kernel still has all of it"
        os.fstat(pair.stream._fd)  # nobody else can have the number
        rings[0].end(result)
        assert await pair.end.ended() is None
        assert not rings[0].is_closed(), "another stream may need it"
        await other.over()
        assert rings[0].is_closed()
        pair.peer.close()

    runner.run(scenario())


def test_a_buffer_is_held_until_it_is_sent_and_no_longer(runner: asyncio.Runner, rings: list[StandIn]) -> None:
    class Held(bytearray):
        pass

    async def scenario() -> None:
        pair = await tried_pair()
        data = Held(long(1))
        seen = weakref.ref(data)
        pair.stream.send([data], aside=True)
        pair.stream.abort()
        del data
        await turns()
        gc.collect()
        assert seen() is not None
        rings[0].end()
        await pair.end.ended()
        gc.collect()
        assert seen() is None
        pair.peer.close()

    runner.run(scenario())


def test_no_more_are_under_way_than_there_are_processors_to_spare(
    runner: asyncio.Runner, rings: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(processors: int, limit: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
        pairs = [await tried_pair(), *(Pair() for _ in range(limit))]
        data = long(1)
        for pair in pairs:
            pair.stream.send([data], aside=True)
        ring = rings[-1]
        assert [pair.read() for pair in pairs] == [b""] * limit + [data], "the last one was sent by the loop"
        assert (len(ring.begun), ring.entries) == (limit, limit)
        ring.end()
        await turns()
        pairs[-1].stream.send([data], aside=True)
        assert len(ring.begun) == limit
        while ring.begun:
            ring.end()
        for pair in pairs:
            await pair.over()

    for processors, limit in ((3, 2), (100, SENDS_MAX)):
        runner.run(scenario(processors, limit))
        sends._sends.clear()  # a loop asks but once how many processors there are


@pytest.mark.parametrize(
    "pieces",
    [
        [long(1, LONG - 1)],
        [bytes(long(1))],
        [b"head", bytes(long(1)), bytearray(b"tail")],
        [long(1, LONG // PIECES_MAX)] * (PIECES_MAX + 1),
        [long(1, BYTES_MAX), b"."],
    ],
    ids=["too little", "read-only", "read-only in the middle", "too many", "too much"],
)
def test_what_a_worker_cannot_send_or_not_gain_by_is_sent_at_once(
    runner: asyncio.Runner, rings: list[StandIn], pieces: list[bytes | bytearray]
) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        pair.stream.send(pieces, aside=True)
        assert not pair.stream.sends_aside
        assert await pair.read_exactly(pair.stream.sent_bytes) == b"".join(pieces)
        await turns()
        pair.stream.send([long(2)], aside=True)
        assert rings[0].begun, "the next one is sent aside"
        rings[0].end()
        await turns()
        assert pair.read() == long(2)
        await pair.over()

    runner.run(scenario())


async def test_over_tcp_the_loop_sends(rings: list[StandIn]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    with theirs:
        stream = SocketStream(ours, "theirs")
        stream.send([long(1)], aside=True)
        assert theirs.recv(LONG, socket.MSG_WAITALL) == long(1)
        stream.abort()
        await turns()
    assert not rings


def test_what_is_not_said_to_go_aside_does_not(runner: asyncio.Runner, rings: list[StandIn]) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        pair.stream.send([long(1)])
        assert pair.read() == long(1)
        assert not rings[0].begun
        pair.stream.send([long(1)], aside=True)
        pair.stream.send([long(2)], aside=True)
        pair.stream.send([long(3)])
        rings[0].end()
        await turns()
        assert not rings[0].begun
        assert pair.read() == long(1) + long(2) + long(3)
        await pair.over()

    runner.run(scenario())


def test_where_the_kernel_takes_no_more_the_loop_sends(runner: asyncio.Runner, rings: list[StandIn]) -> None:
    async def scenario() -> None:
        pair = await tried_pair()
        pair.stream.send([long(1)], aside=True)
        rings[0].end()
        await turns()
        rings[0].refuses = True
        pair.stream.send([long(2)], aside=True)
        assert pair.read() == long(1) + long(2)
        rings[0].refuses = False
        pair.stream.send([long(3)], aside=True)
        assert len(rings[0].begun) == 1
        rings[0].end()
        await turns()
        assert pair.read() == long(3)
        await pair.over()

    runner.run(scenario())


# Where there is none.


def refuse(*_: Any) -> int:
    ctypes.set_errno(errno.EPERM)
    return -1


@pytest.mark.parametrize("why", ["switched off", "one processor", "another machine", "refused", "not taken"])
def test_without_a_ring_all_is_sent_by_the_loop(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0} if why == "one processor" else {0, 1})
    if why == "switched off":
        monkeypatch.setenv(SWITCH_VARIABLE, "off")
    elif why == "another machine":
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    elif why == "refused":
        monkeypatch.setattr(sends, "_syscall", refuse)
    elif why == "not taken":
        monkeypatch.setattr(sends._Ring, "begin", lambda *_: False)

    async def scenario() -> None:
        assert (sends_of(asyncio.get_running_loop()) is None) == (why not in ("refused", "not taken"))
        before = set(os.listdir("/proc/self/fd"))
        pair = Pair()
        for number in range(3):
            pair.stream.send([long(number)], aside=True)
            assert pair.stream.taken_bytes == pair.stream.sent_bytes
            assert pair.read() == long(number)
        await pair.over()
        assert set(os.listdir("/proc/self/fd")) == before

    runner.run(scenario())


@pytest.mark.usefixtures("kernels_own")
def test_a_message_that_the_kernel_refused_is_not_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = sends._Ring(2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        slots = [sends._Slot(), sends._Slot()]
        assert slots[0].fill([b"refused"])
        assert slots[1].fill([b"taken"])
        with monkeypatch.context() as patch:
            patch.setattr(sends, "_syscall", refuse)
            assert not ring.begin(ours.fileno(), slots[0].address, 0)
        assert ring.begin(ours.fileno(), slots[1].address, 1)
        found: list[tuple[int, int]] = []
        while not found:
            found = ring.completions()
        assert found == [(1, 5)]
        assert theirs.recv(100) == b"taken"
    ring.close()


@pytest.mark.usefixtures("kernels_own")
def test_the_kernel_takes_what_there_is_room_for_and_nothing_where_there_is_none() -> None:
    ring = sends._Ring(1)
    ours, theirs = socket.socketpair()
    data = long(1, 16 * MiB)
    slot = sends._Slot()
    results = []
    with ours, theirs:
        assert slot.fill([data])
        for _ in range(2):
            assert ring.begin(ours.fileno(), slot.address, 0)
            assert select.select([ring.fd], [], [], 20)[0], "it waits for room"
            results += [result for _, result in ring.completions()]
    ring.close()
    assert 0 < results[0] < len(data)
    assert results[1] == -errno.EAGAIN


@pytest.mark.usefixtures("kernels_own")
def test_a_ring_goes_round() -> None:
    ring = sends._Ring(2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        slot = sends._Slot()
        for number in range(50):
            assert slot.fill([b"%d" % number, bytearray(b"." * 100)])
            assert ring.begin(ours.fileno(), slot.address, number)
            found: list[tuple[int, int]] = []
            while not found:
                found = ring.completions()
            assert found == [(number, len(theirs.recv(200)))]
    ring.close()


@pytest.mark.usefixtures("kernels_own")
def test_a_loop_that_goes_away_with_streams_open_takes_the_ring_along() -> None:
    before = set(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        pair = Pair()
        pair.stream.send([long(1)], aside=True)
        await pair.read_exactly(LONG)
        pair.stream._sock.close()  # type: ignore[union-attr]
        pair.peer.close()

    with asyncio.Runner() as runner:
        runner.run(scenario())
    del runner
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
