"""The NBD client: the codec's client role on a stream, with any number of requests in flight.

Invariants:
- A request ends with the server's answer, or, when the connection is lost or the server breaks the protocol, with an
  IoError that says which; none is left waiting.
- Once the server has said that it is shutting down, nothing more is asked of it ("Terminating the transmission phase").
- What a read returns is private to its caller.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

from fleecer.errors import FleecerError, IoError, RemoteProtocolError, quoted, told
from fleecer.net.stream import Stream
from fleecer.ranges import Buffer
from fleecer.wire.nbd import ClientCodec, ExportInfo, Reply
from fleecer.wire.nbd.constants import (
    CMD_FLAG_NO_HOLE,
    COMMAND_NAMES,
    FLAG_SEND_FLUSH,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
)

ALLOCATION = "base:allocation"
HANDSHAKE_TIMEOUT_S = 30.0


class NbdClient:
    """One connection to one export. Made by `connect`; ended by `close`."""

    def __init__(self, stream: Stream, codec: ClientCodec) -> None:
        self._stream = stream
        self._codec = codec
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost: IoError | None = None
        self._send_due = False

    @classmethod
    async def connect(
        cls,
        stream: Stream,
        export_name: str,
        *,
        contexts: Sequence[str] = (ALLOCATION,),
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> NbdClient:
        """Negotiates `export_name` on a new stream. Raises what the server said, or IoError; then it is closed."""
        client = cls(stream, ClientCodec(export_name, contexts=contexts))
        stream.begin(client)
        client._send()
        try:
            async with asyncio.timeout(timeout_s):
                await client._ready
        except TimeoutError:
            stream.abort()
            detail = f"the server did not answer in {timeout_s:g} s"
            raise IoError(errno.ETIMEDOUT, stream.peer, "NBD handshake", detail=detail) from None
        except BaseException:
            stream.abort()
            raise
        return client

    @property
    def info(self) -> ExportInfo:
        """What the server said of the export."""
        assert self._codec.info is not None, "connect returned only after the server had told"
        return self._codec.info

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that block status answers for."""
        return tuple(self._codec.contexts)

    @property
    def can_flush(self) -> bool:
        """Whether the server offers flush."""
        return bool(self._codec.flags & FLAG_SEND_FLUSH)

    @property
    def can_zero(self) -> bool:
        """Whether the server offers write-zeroes."""
        return bool(self._codec.flags & FLAG_SEND_WRITE_ZEROES)

    @property
    def can_trim(self) -> bool:
        """Whether the server offers trim."""
        return bool(self._codec.flags & FLAG_SEND_TRIM)

    # Requests. Each raises IoError with the server's error number and words, or when the connection is lost.

    async def pread(self, offset: int, length: int) -> Buffer:
        """`length` bytes at `offset`."""
        self._check()
        return (await self._reply(self._codec.read(offset, length))).data

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes `data`, which must not change until this returns."""
        self._check()
        cookie = self._codec.write(offset, data)
        end = self._stream.sent_bytes + sum(map(len, self._codec.outgoing))
        await self._reply(cookie)
        if end > self._stream.taken_bytes:
            # What is not sent yet would be sent as it is by then, and whoever wrote may use the memory again.
            self._lose(RemoteProtocolError("a write was answered before all of it was sent"))
            self._stream.abort()
            self._check()

    async def flush(self) -> None:
        """Makes durable what the server has acknowledged."""
        self._check()
        await self._reply(self._codec.flush())

    async def trim(self, offset: int, length: int) -> None:
        """Hints that the range is not needed."""
        self._check()
        await self._reply(self._codec.trim(offset, length))

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Makes the range read as zeroes."""
        self._check()
        await self._reply(self._codec.write_zeroes(offset, length, 0 if unmap else CMD_FLAG_NO_HOLE))

    async def block_status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """For each context the (length, flags) runs from `offset` on; may stop early."""
        self._check()
        return (await self._reply(self._codec.block_status(offset, length))).extents

    async def close(self) -> None:
        """Says goodbye and returns when the connection is gone. Nothing may be in flight. Idempotent."""
        if not self._ended.done():
            self._codec.disconnect()
            self._send()
            self._stream.close()
        await asyncio.shield(self._ended)

    def _check(self) -> None:
        if self._lost is not None:
            raise IoError(self._lost.errno, self._stream.peer, "NBD request", detail=self._lost.detail)

    async def _reply(self, cookie: int) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[cookie] = future
        if not self._send_due:  # all requests made in this turn of the loop leave in one send
            self._send_due = True
            asyncio.get_running_loop().call_soon(self._send)
        reply = await future
        if reply.error:
            words = f"the server says {quoted(reply.message)}" if reply.message else ""
            raise IoError(
                reply.error,
                self.info.name or "NBD export",
                COMMAND_NAMES[reply.command],
                reply.offset,
                reply.length,
                words,
            )
        return reply

    def _send(self) -> None:
        self._send_due = False
        if self._codec.outgoing:
            self._stream.send(self._codec.outgoing)
            self._codec.outgoing.clear()

    # What the stream calls.

    def receive_buffer(self) -> memoryview:
        """See `Receiver`."""
        return self._codec.receive_buffer()

    def received(self, count: int) -> None:
        """See `Receiver`."""
        for reply in self._codec.received(count):
            future = self._replies.pop(reply.cookie)
            if not future.done():
                future.set_result(reply)
            if reply.error == errno.ESHUTDOWN and self._lost is None:
                detail = "the server is shutting down"
                self._lost = IoError(errno.ESHUTDOWN, self._stream.peer, "NBD connection", detail=detail)
                self._codec.disconnect()
        self._send()
        if self._codec.ready and not self._ready.done():
            self._ready.set_result(None)
        if self._codec.failure is not None:
            self._lose(self._codec.failure)
            self._stream.abort()

    def sent(self) -> None:
        """See `Receiver`."""

    def closed(self, error: IoError | None) -> None:
        """See `Receiver`."""
        self._codec.eof()
        self._lose(error or self._codec.failure or IoError(errno.ESHUTDOWN, self._stream.peer, "NBD", detail="closed"))
        if not self._ended.done():
            self._ended.set_result(None)

    def _lose(self, cause: FleecerError) -> None:
        if self._lost is None:
            code = cause.errno if isinstance(cause, IoError) else errno.EIO
            self._lost = IoError(code, self._stream.peer, "NBD connection", detail=told(cause))
        if not self._ready.done():
            self._ready.set_exception(cause)
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(self._lost)
