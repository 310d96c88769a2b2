"""The receiving half that both roles share: where the next bytes go, and how a handshake script waits for them.

Invariants:
- `receive_buffer` is never empty. Small messages gather in one shared buffer; a large payload of which only a part has
  arrived has a buffer of its own, and its rest is received straight into that.
- While such a payload is incomplete the shared buffer is empty.
- Memory follows what has been received, not what was announced, save for one payload that passed its limit check: the
  shared buffer of a connection that is still negotiating starts small and doubles only when it is full.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from fleecer import spares
from fleecer.errors import FleecerError
from fleecer.ranges import Buffer
from fleecer.units import KiB

Result = TypeVar("Result")
Script = Generator[None, None, Result]
"""A handshake: it yields whenever it needs more bytes than have arrived."""

HANDSHAKE_BUFFER_BYTES = 2 * KiB
TRANSMISSION_BUFFER_BYTES = 256 * KiB
WAITING_MAX_BYTES = 64 * KiB
"""Payloads up to this wait in the shared buffer until they are complete; longer ones are received in place."""
_NARROW_BYTES = 16 * KiB


class Codec:
    """One connection's incoming bytes, outgoing buffers, and whether it is over.

    outgoing   buffers to be sent, in order; the owner sends them and clears the list
    finished   nothing more is parsed: after a clean end, or after `failure`
    failure    what the peer did wrong, or why it refused us; None otherwise
    """

    __slots__ = ("_buffer", "_end", "_narrow", "_rest", "_start", "_view", "failure", "finished", "outgoing")

    def __init__(self) -> None:
        self.outgoing: list[Buffer] = []
        self.finished = False
        self.failure: FleecerError | None = None
        self._buffer: bytearray | spares.Memory = bytearray(HANDSHAKE_BUFFER_BYTES)  # a slice of it is a copy
        self._view = memoryview(self._buffer)
        self._start = 0  # first byte not yet parsed; 0 between calls
        self._end = 0  # end of the bytes received
        self._rest: memoryview | None = None  # what is still to come of a payload received in place
        self._narrow = False  # whether the next message is probably another payload too long for the shared buffer

    @property
    def awaits_payload(self) -> bool:
        """Whether what comes next is the rest of a payload that is received in place."""
        return self._rest is not None

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; tell `received` how many came. Valid until then."""
        if self._rest is not None:
            return self._rest
        end = self._end
        if self._narrow:
            # After one such payload the next is likely: its header is fetched, and little that must then be copied.
            return self._view[end : end + _NARROW_BYTES]
        if end == len(self._buffer):
            self._enlarge(2 * end)
        return self._view[end:]

    def _fill_rest(self, count: int) -> bool:
        """Takes note of `count` bytes received in place; whether that payload is now complete."""
        assert self._rest is not None
        assert count <= len(self._rest), "more bytes than there was room for"
        self._rest = self._rest[count:] if count < len(self._rest) else None
        return self._rest is None

    def _receive_in_place(self, body: memoryview, start: int) -> None:
        """The bytes from `start` on are the first of `body`; the others are to be received into it."""
        arrived = self._end - start
        body[:arrived] = self._view[start : self._end]
        self._start = self._end = 0
        self._rest = body[arrived:]
        self._narrow = len(body) >= TRANSMISSION_BUFFER_BYTES

    def _compact(self) -> None:
        """Moves what is not parsed yet to the start of the shared buffer."""
        start, left = self._start, 0 if self.finished else self._end - self._start
        if start and left:
            self._view[:left] = self._view[start : start + left]
        self._start, self._end = 0, left

    def _enlarge(self, size: int) -> None:
        buffer = spares.memory(size)
        buffer[: self._end] = self._view[: self._end]
        self._buffer = buffer
        self._view = memoryview(buffer)

    def _take(self, count: int) -> Script[bytes]:
        """The next `count` bytes, for a handshake script."""
        while self._end - self._start < count:
            yield
        start = self._start
        self._start = start + count
        return self._view[start : self._start].tobytes()

    def _fail(self, failure: FleecerError) -> None:
        self.failure = failure
        self.finished = True
