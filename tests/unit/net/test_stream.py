"""Streams: the promises of `Stream`, kept by sockets on either event loop and by the fake in memory."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvloop

from fleecer.errors import IoError, UsageError
from fleecer.net.stream import _SO_SNDBUFFORCE, _UNIX_SEND_BYTES, SocketStream, Stream, connect_tcp, connect_unix
from fleecer.testing.streams import memory_streams
from fleecer.units import KiB, MiB

Pair = tuple[Stream, Stream]


class Setting(NamedTuple):
    """A kind of stream and the loop it runs on."""

    loop_factory: Callable[[], asyncio.AbstractEventLoop]
    pair: Callable[[], Pair]

    def run(self, scenario: Callable[[Pair], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            streams = self.pair()
            try:
                async with asyncio.timeout(20):
                    await scenario(streams)
            finally:
                for stream in streams:
                    stream.abort()
                await asyncio.sleep(0)

        with asyncio.Runner(loop_factory=self.loop_factory) as runner:
            runner.run(whole())


def unix_pair() -> Pair:
    left, right = socket.socketpair()
    streams = SocketStream(left, "right"), SocketStream(right, "left")
    for end in (left, right):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KiB)
    return streams


def wide_unix_pair() -> Pair:
    left, right = socket.socketpair()
    for end in (left, right):
        end.setblocking(False)
    return SocketStream(left, "right"), SocketStream(right, "left")


def tcp_pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    for end in (left, right):
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return SocketStream(left, "right"), SocketStream(right, "left")


SETTINGS = {
    "unix on asyncio": Setting(asyncio.new_event_loop, unix_pair),
    "unix on uvloop": Setting(uvloop.new_event_loop, unix_pair),
    "wide unix on asyncio": Setting(asyncio.new_event_loop, wide_unix_pair),
    "wide unix on uvloop": Setting(uvloop.new_event_loop, wide_unix_pair),
    "TCP on asyncio": Setting(asyncio.new_event_loop, tcp_pair),
    "TCP on uvloop": Setting(uvloop.new_event_loop, tcp_pair),
    "memory": Setting(asyncio.new_event_loop, memory_streams),
    "memory in small pieces": Setting(
        asyncio.new_event_loop, lambda: memory_streams(buffer_bytes=16 * KiB, piece_bytes=1000)
    ),
}


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return SETTINGS[request.param]


class Collector:
    """A receiver that keeps everything. `on_received` is called after each delivery."""

    def __init__(self, room: int = 64 * KiB) -> None:
        self.data = bytearray()
        self.deliveries = 0
        self.sent_count = 0
        self.endings: list[IoError | None] = []
        self.on_received: Callable[[], None] = lambda: None
        self._room = memoryview(bytearray(room))
        self._changed = asyncio.Event()
        self.inside = False  # a test sets it around a call to the stream

    def receive_buffer(self) -> memoryview:
        return self._room

    def received(self, count: int) -> None:
        assert not self.endings, "bytes came after the end"
        assert not self.inside, "bytes were delivered from inside a call to the stream"
        assert count > 0
        self.data += self._room[:count]
        self.deliveries += 1
        self._changed.set()
        self.on_received()

    def sent(self) -> None:
        assert not self.endings, "sent was told after the end"
        self.sent_count += 1
        self._changed.set()

    def closed(self, error: IoError | None) -> None:
        assert not self.inside, "closed was called from inside a call to the stream"
        self.endings.append(error)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def ended(self) -> IoError | None:
        await self.until(lambda: bool(self.endings))
        await turns()
        assert len(self.endings) == 1, "closed was called more than once"
        return self.endings[0]


async def turns() -> None:
    """Some rounds of the loop, so that whatever is due has happened."""
    for _ in range(20):
        await asyncio.sleep(0)


def begun(streams: Pair) -> tuple[Collector, Collector]:
    ends = Collector(), Collector()
    for stream, end in zip(streams, ends, strict=True):
        stream.begin(end)
    return ends


def test_bytes_arrive_in_the_order_of_send_whatever_the_kernel_takes_at_once(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, _ = streams
        mine, theirs = begun(streams)
        generator = random.Random(1)
        expected = bytearray()
        for count in (1, 2, 700, 1500, 3):  # more pieces than one sendmsg takes, empty ones among them
            pieces = [generator.randbytes(generator.choice((0, 1, 27, 700, 4096))) for _ in range(count)]
            expected += b"".join(pieces)
            left.send(pieces)
        left.send([memoryview(expected)[:100], bytearray(b"tail"), bytes(2 * MiB)])
        expected = expected + expected[:100] + b"tail" + bytes(2 * MiB)
        assert left.queued_bytes, "the test needs a queue"
        await theirs.until(lambda: len(theirs.data) == len(expected))
        assert theirs.data == expected
        await mine.until(lambda: mine.sent_count > 0)
        assert left.queued_bytes == 0
        assert mine.sent_count == 1

    setting.run(scenario)


def test_both_directions_at_once_do_not_mix(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, theirs = begun(streams)
        one, other = random.Random(2).randbytes(MiB), random.Random(3).randbytes(MiB)
        left.send([one])
        right.send([other])
        await theirs.until(lambda: len(theirs.data) == MiB)
        await mine.until(lambda: len(mine.data) == MiB)
        assert mine.data == other
        assert theirs.data == one

    setting.run(scenario)


def test_a_paused_receiver_gets_nothing_and_the_sender_queues(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        _, theirs = begun(streams)
        right.pause()
        right.pause()
        data = random.Random(4).randbytes(12 * MiB)
        left.send([data])
        await turns()
        before = left.queued_bytes
        assert before > 0
        left.send([b"more"])
        assert left.queued_bytes == before + 4
        assert not theirs.data
        right.resume()
        right.resume()
        await theirs.until(lambda: len(theirs.data) == len(data) + 4)
        assert theirs.data == data + b"more"

    setting.run(scenario)


def test_a_receiver_that_pauses_while_it_receives_gets_no_more(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        _, theirs = begun(streams)
        theirs.on_received = right.pause
        left.send([bytes(8 * MiB)])
        await theirs.until(lambda: theirs.deliveries > 0)
        await turns()
        assert theirs.deliveries == 1
        right.resume()
        await theirs.until(lambda: theirs.deliveries > 1)
        await turns()
        assert theirs.deliveries == 2

    setting.run(scenario)


def test_close_sends_what_is_queued_and_then_ends_both_sides_in_order(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, _ = streams
        mine, theirs = begun(streams)
        data = random.Random(5).randbytes(4 * MiB)
        left.send([data])
        assert left.queued_bytes
        left.close()
        left.close()
        left.send([b"too late"])
        assert await theirs.ended() is None
        assert theirs.data == data
        assert await mine.ended() is None

    setting.run(scenario)


def test_close_without_a_queue_ends_at_once_but_not_inside_the_call(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, _ = streams
        mine, theirs = begun(streams)
        mine.inside = theirs.inside = True
        left.close()
        mine.inside = theirs.inside = False
        assert await mine.ended() is None
        assert await theirs.ended() is None
        left.abort()
        left.close()
        left.resume()
        await turns()
        assert mine.endings == [None]

    setting.run(scenario)


def test_after_close_nothing_more_is_delivered(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, theirs = begun(streams)
        right.pause()
        left.send([bytes(8 * MiB)])  # so that close has to wait
        right.send([b"after"])
        left.close()
        left.resume()
        await turns()
        assert not mine.data
        assert not mine.endings
        right.resume()
        await theirs.until(lambda: len(theirs.data) == 8 * MiB)
        assert await mine.ended() is None
        assert not mine.data

    setting.run(scenario)


def test_abort_drops_the_queue(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, theirs = begun(streams)
        right.pause()
        left.send([bytes(12 * MiB)])
        mine.inside = theirs.inside = True
        left.abort()
        left.abort()
        mine.inside = theirs.inside = False
        assert left.queued_bytes == 0
        right.resume()
        assert await mine.ended() is None
        await theirs.ended()
        assert len(theirs.data) < 12 * MiB

    setting.run(scenario)


def test_abort_ends_a_close_that_waits_for_a_client_who_does_not_read(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, _ = begun(streams)
        right.pause()
        left.send([bytes(12 * MiB)])
        left.close()
        await turns()
        assert not mine.endings
        left.abort()
        assert await mine.ended() is None

    setting.run(scenario)


def test_a_peer_that_is_gone_shows_at_the_next_send_as_an_error(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, theirs = begun(streams)
        left.pause()  # so that the end is not read
        right.abort()
        await theirs.ended()
        while not mine.endings:
            mine.inside = True
            left.send([b"x" * 1000])
            mine.inside = False
            await asyncio.sleep(0)
        error = await mine.ended()
        assert error is not None
        assert error.errno in (errno.EPIPE, errno.ECONNRESET)
        assert error.operation == "send"
        left.send([b"ignored"])

    setting.run(scenario)


def test_a_peer_that_dies_while_we_have_a_queue_ends_the_stream_with_an_error(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, _ = begun(streams)
        left.pause()
        right.pause()
        left.send([bytes(12 * MiB)])
        await turns()
        right.abort()
        error = await mine.ended()
        assert error is not None
        assert error.errno in (errno.EPIPE, errno.ECONNRESET)
        assert left.queued_bytes == 0

    setting.run(scenario)


@pytest.mark.parametrize("last_words", [[], [b"last words"]], ids=["silent", "after a little"])
def test_a_peer_that_leaves_something_unread_resets_the_connection(setting: Setting, last_words: list[bytes]) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, _ = begun(streams)
        right.pause()
        left.send([b"never read"])
        await turns()
        if last_words:
            right.send(last_words)
        right.abort()
        error = await mine.ended()
        assert error is not None
        assert error.errno == errno.ECONNRESET

    setting.run(scenario)


def test_what_a_peer_sent_before_it_closed_is_received_first(setting: Setting) -> None:
    async def scenario(streams: Pair) -> None:
        left, right = streams
        mine, _ = begun(streams)
        left.pause()
        right.send([b"last words"])
        right.close()
        await turns()
        left.resume()
        assert await mine.ended() is None
        assert mine.data == b"last words"

    setting.run(scenario)


# Connecting.


async def test_connecting_where_nobody_listens_names_the_place(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "absent.sock")
    with pytest.raises(IoError) as caught:
        await connect_unix(path)
    assert str(caught.value) == f"connect on '{path}': No such file or directory"
    assert caught.value.errno == errno.ENOENT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(IoError, match=rf"connect on '127\.0\.0\.1:{port}'") as caught:
        await connect_tcp("127.0.0.1", port)
    assert caught.value.errno == errno.ECONNREFUSED


async def test_connecting_to_a_path_too_long_for_a_socket_is_an_error_of_ours() -> None:
    with pytest.raises(UsageError, match="has 205 bytes, more than the 107 that the system takes"):
        await connect_unix("/tmp/" + "x" * 200)


async def test_tcp_connections_are_tried_address_by_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()

        async def two_addresses(*_: object, **__: object) -> list[tuple[object, ...]]:
            kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            return [(*kind, ("127.0.0.1", 1)), (*kind, ("127.0.0.1", port))]

        loop.getaddrinfo = two_addresses  # type: ignore[method-assign,assignment]
        stream = await connect_tcp("two.example", port)
        accepted, _ = await loop.sock_accept(listener)
        accepted.close()
        stream.abort()
    assert stream.peer == f"two.example:{port}"


async def test_what_is_sent_while_older_bytes_wait_does_not_overtake_them() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        for end in (ours, theirs):
            end.setblocking(False)
        stream = SocketStream(ours, "theirs")
        stream.begin(Collector())
        data = random.Random(6).randbytes(2 * MiB)
        stream.send([data])
        assert stream.queued_bytes
        found = bytearray(theirs.recv(4 * MiB))  # now the kernel has room, but the loop has not run
        stream.send([b"tail"])
        while len(found) < len(data) + 4:
            await asyncio.sleep(0)
            try:
                found += theirs.recv(4 * MiB)
            except BlockingIOError:
                continue
        assert found == data + b"tail"
        stream.abort()
        await asyncio.sleep(0)


# The fake's own promises.


async def test_memory_streams_hold_no_more_on_the_way_than_their_buffer() -> None:
    left, right = memory_streams(buffer_bytes=1000)
    ends = begun((left, right))
    right.pause()
    left.send([bytes(700), bytes(700)])
    assert left.queued_bytes == 400
    right.resume()
    await ends[1].until(lambda: len(ends[1].data) == 1400)
    assert (left.send_count, left.sent_bytes) == (1, 1400)


async def test_memory_streams_deliver_no_more_at_once_than_their_piece() -> None:
    left, right = memory_streams(piece_bytes=1)
    ends = begun((left, right))
    left.send([b"abcdef"])
    await ends[1].until(lambda: len(ends[1].data) == 6)
    assert ends[1].deliveries == 6


class Limited(socket.socket):
    """A socket of somebody who may not go past the system's limit."""

    def setsockopt(self, level: int, option: int, value: Any, *more: Any) -> None:
        if option == _SO_SNDBUFFORCE:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        super().setsockopt(level, option, value, *more)


@pytest.mark.parametrize("kind", [socket.socket, Limited])
async def test_a_unix_socket_takes_as_much_as_the_system_lets_it(kind: type[socket.socket]) -> None:
    limit = int(Path("/proc/sys/net/core/wmem_max").read_text())
    with kind(socket.AF_UNIX) as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        stream = SocketStream(sock, "nobody")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * min(_UNIX_SEND_BYTES, limit) > before
        stream.abort()
        await asyncio.sleep(0)
