"""Two streams joined in memory, for what runs over a `Stream`: servers and clients without sockets.

As with a socket there is room for a bounded number of bytes on the way ("in the kernel"); what does not fit waits at
the sender and shows in `queued_bytes` until the receiver takes something. Delivery is by the event loop, never from
inside a call to a stream. What is sent aside stays where it is for some turns of the loop, and leaves as it is by then:
whoever changes it too early will see.
"""

from __future__ import annotations

import asyncio
import collections
import errno
from collections.abc import Callable, Sequence

from fleecer.errors import IoError
from fleecer.net.stream import Receiver, Stream
from fleecer.ranges import Buffer
from fleecer.units import KiB

BUFFER_BYTES = 64 * KiB
_ASIDE_TURNS = 1  # how much longer what is sent aside stays than to the next turn of the loop
_RECEIVES_MAX = 4  # deliveries in one turn of the loop, as SocketStream has it


class _Pipe:
    """One direction: the bytes on the way, and how each end learns of the other."""

    def __init__(self, room: int) -> None:
        self.held = bytearray()
        self.room = room
        self.wanted = False  # whether the writer waits for room
        self.writer_gone = False
        self.reset = False  # the writer left something unread in the other direction
        self.reader_gone = False
        self.on_change: Callable[[], None] = lambda: None  # for the reader
        self.on_room: Callable[[], None] = lambda: None  # for the writer


class MemoryStream(Stream):
    """One end. Made by `memory_streams`. `send_count` tells how often something was sent here."""

    def __init__(self, peer: str, outward: _Pipe, inward: _Pipe, piece_bytes: int) -> None:
        self.peer = peer
        self.queued_bytes = 0
        self.send_count = 0
        self.sent_bytes = 0
        self._outward = outward
        self._inward = inward
        self._piece_bytes = piece_bytes
        self._aside = ()
        self._aside_at = 0
        self._end_error: IoError | None = None
        self._loop = asyncio.get_running_loop()
        self._receiver: Receiver | None = None
        self._queue: collections.deque[memoryview] = collections.deque()
        self._paused = True
        self._closing = False
        self._ended = False
        self._delivery_due = False
        inward.on_change = self._deliver_soon
        outward.on_room = self._have_room

    def begin(self, receiver: Receiver) -> None:
        """See `Stream.begin`."""
        self._receiver = receiver
        self.resume()

    def pause(self) -> None:
        """See `Stream.pause`."""
        self._paused = True

    def resume(self) -> None:
        """See `Stream.resume`."""
        if self._paused and not self._closing and not self._ended:
            self._paused = False
            self._deliver_soon()

    def send(self, pieces: Sequence[Buffer], *, aside: bool = False) -> None:
        """See `Stream.send`."""
        if self._ended or self._closing:
            return
        self.send_count += 1
        if aside and pieces and not self._queue and not self._aside:
            self._aside = tuple(pieces)
            self._aside_at = self.sent_bytes
            self.sent_bytes += sum(map(len, pieces))
            self._loop.call_soon(self._send_aside, _ASIDE_TURNS)
            return
        for piece in pieces:
            self._queue.append(memoryview(piece))
            self.queued_bytes += len(piece)
            self.sent_bytes += len(piece)
        if not self._aside:
            self._push()

    def _send_aside(self, turns: int) -> None:
        """What is sent aside leaves `turns` turns from now."""
        if turns:
            self._loop.call_soon(self._send_aside, turns - 1)
            return
        pieces, self._aside = self._aside, ()
        if self._ended:
            self._tell_end()
            return
        self._queue.extendleft(map(memoryview, reversed(pieces)))
        self.queued_bytes += sum(map(len, pieces))
        self._have_room()

    def close(self) -> None:
        """See `Stream.close`."""
        if not self._ended and not self._closing:
            self._paused = self._closing = True
            if not self._queue and not self._aside:
                self._end(None)

    def abort(self) -> None:
        """See `Stream.abort`."""
        self._end(None)

    def _push(self) -> None:
        """Sends on its way what there is room for."""
        pipe = self._outward
        if pipe.reader_gone:
            self._end(IoError(errno.EPIPE, self.peer, "send"))
            return
        while self._queue and (pipe.room or not self._queue[0]):
            piece = self._queue.popleft()
            taken = min(len(piece), pipe.room)
            pipe.held += piece[:taken]
            pipe.room -= taken
            self.queued_bytes -= taken
            if taken < len(piece):
                self._queue.appendleft(piece[taken:])
        pipe.wanted = bool(self._queue)
        pipe.on_change()

    def _have_room(self) -> None:
        """The other end has taken something, or is gone."""
        if self._ended or self._aside or not self._queue:
            return
        self._push()
        if self._ended or self._queue:
            return
        if self._closing:
            self._end(None)
        elif self._receiver is not None:
            self._receiver.sent()

    def _deliver_soon(self) -> None:
        if not self._delivery_due and not self._paused and not self._ended:
            self._delivery_due = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivery_due = False
        receiver, pipe = self._receiver, self._inward
        assert receiver is not None, "a stream is read only after `begin`"
        for _ in range(_RECEIVES_MAX):
            if self._paused or self._ended or not pipe.held:
                break
            room = receiver.receive_buffer()
            assert len(room), "the receiver named an empty buffer"
            count = min(len(room), len(pipe.held), self._piece_bytes)
            room[:count] = pipe.held[:count]
            del pipe.held[:count]
            pipe.room += count
            if pipe.wanted:
                self._loop.call_soon(pipe.on_room)
            receiver.received(count)
        if pipe.held:
            self._deliver_soon()
        elif pipe.writer_gone and not self._paused:
            self._end(IoError(errno.ECONNRESET, self.peer, "receive") if pipe.reset else None)

    def _end(self, error: IoError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._queue.clear()
        self.queued_bytes = 0
        # As with sockets: who leaves something unread resets the connection.
        self._outward.writer_gone, self._outward.reset = True, bool(self._inward.held)
        self._inward.reader_gone = True
        self._inward.held.clear()
        self._outward.on_change()
        self._loop.call_soon(self._inward.on_room)
        self._end_error = error
        if not self._aside:
            self._loop.call_soon(self._tell_end)

    def _tell_end(self) -> None:
        if self._receiver is not None:
            self._receiver.closed(self._end_error)


def memory_streams(
    *, buffer_bytes: int = BUFFER_BYTES, piece_bytes: int = 1 << 30
) -> tuple[MemoryStream, MemoryStream]:
    """Two ends of one connection.

    `buffer_bytes` may be on the way in each direction; a receiver gets at most `piece_bytes` at a time.
    """
    one, other = _Pipe(buffer_bytes), _Pipe(buffer_bytes)
    return MemoryStream("right end", one, other, piece_bytes), MemoryStream("left end", other, one, piece_bytes)
