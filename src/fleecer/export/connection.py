"""One NBD client's connection: bytes in, requests run to completion where they need not wait, replies out.

Invariants:
- Every request gets exactly one final reply. One that ends without it, or with an answer that does not fit it, is
  answered EIO and logged as a bug; with `Server.raise_internal_errors` the loop's exception handler hears of it.
- Replies made in one turn leave in one send, but for those to what was done at once, which go before. No request
  spans a send: a client that does not read holds no claim. Nor does a long read, each part of which is a request here;
  what of it has no room waits, in its place among the requests.
- Memory is bounded: no request starts while `IN_FLIGHT_BYTES_MAX` bytes are in flight, or `QUEUED_BYTES_MAX` queued;
  besides, one long turn may be with a worker of the kernel's.
- A connection that ends waits for its requests in flight; their replies are dropped, their effects are not.
- Who asks for much has turns: after `TURN_BYTES` of replies others go first, and in each turn of the event loop the
  server has somebody go on, by as much as it allows.
- A client that does not read delays nobody else, nor the end of its own connection by more than `STOP_GRACE_S`.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import functools
import logging
from typing import TYPE_CHECKING

from fleecer import eager, spares
from fleecer.errors import FleecerError, IoError, LocalProtocolError, told
from fleecer.export.export import Export
from fleecer.net.stream import Stream
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce, is_zero
from fleecer.trials import Trials
from fleecer.units import KiB, MiB
from fleecer.waiters import Waiters
from fleecer.wire.nbd import AtOnce, Request, ServerCodec
from fleecer.wire.nbd.constants import CMD_BLOCK_STATUS, CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_WRITE, EXTENT

if TYPE_CHECKING:
    from fleecer.export.server import Server

IN_FLIGHT_MAX = 256
IN_FLIGHT_BYTES_MAX = 32 * MiB
QUEUED_BYTES_MAX = 256 * KiB
STOP_GRACE_S = 1.0
"""How long a client that is sent away has to read its last replies."""
TURN_BYTES = 256 * KiB
"""Replies gathered before they are sent although more requests are at hand, and others have their turn."""
PART_BYTES = 512 * KiB
"""Longer reads are answered in parts of this length, where the client allows it. Memory for one is small enough to be
in the processor's cache when it is sent, and soon used again; others have their turn in between."""
SKIPS_MAX = 16
"""Where what comes first has to wait again and again, only one time in so many it is tried before all is parsed."""
_STATUS_BYTES = 1 * MiB
"""What the answer to a block-status request may take in memory."""

_log = logging.getLogger(__name__)


class Connection:
    """A client, from greeting to end. Made by `Server`, which provides the exports."""

    def __init__(self, server: Server, stream: Stream) -> None:
        self.stream = stream
        self.export: Export | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server = server
        self._codec = ServerCodec(server.catalogue(self))
        self._waiting: collections.deque[Request] = collections.deque()  # parsed, not started
        self._flushes: list[Request] = []  # started once all that came with them is done or started
        self._at_once = AtOnce()
        self._trials = Trials(SKIPS_MAX)  # of doing at once what is not parsed yet
        self._in_flight = 0  # started, and not ended at once
        self._in_flight_bytes = 0
        self._ready_bytes = 0  # what the replies in the codec's `outgoing` took
        # Large buffers of replies that are sent, and where in the stream each ends: spare once the kernel has it all.
        self._sending: collections.deque[tuple[int, Buffer]] = collections.deque()
        self._has_spares = False  # whether some are in the replies not sent yet
        self._refusing = False  # we are going: new requests get ESHUTDOWN
        self._finishing = False  # nothing more is read; the stream is closed once all that was asked is answered
        self._gone = False  # the stream has ended
        self._send_due = False
        self._awaits_turn = False
        self._idle: Waiters | None = None  # there once somebody waits
        self._closing = False  # all is answered, and the stream closes once that is sent
        self._last_replies: asyncio.TimerHandle | None = None  # ends the time to read them

    def begin(self) -> None:
        """Greets the client and starts to listen to it."""
        self.stream.begin(self)
        self._send()

    # What the stream calls.

    def receive_buffer(self) -> memoryview:
        """See `Receiver`."""
        return self._codec.receive_buffer()

    def received(self, count: int) -> None:
        """Parses what came and runs it, as far as the limits allow."""
        at_once = self._prepare_at_once()
        requests = self._codec.received(count, at_once)
        done = bytes_read = 0
        while at_once is not None and at_once.replies is not None:
            done += at_once.reads + at_once.writes
            bytes_read += at_once.bytes_read
            self._send_done(at_once, at_once.replies)
            if at_once.is_full:
                requests = self._codec.received(0, at_once)
        tried = at_once is not None and at_once.tried
        if done:
            self._trials.paid()
        elif tried:
            self._trials.in_vain()
        if self._waiting:
            self._waiting.extend(requests)
        elif requests or done:
            if requests:
                self._run(requests, bytes_read + done * AtOnce.REQUEST_BYTES, tried=tried)
            if bytes_read + self._ready_bytes >= TURN_BYTES:
                self._server.note_turn()
            elif not self._waiting:
                self._server.note_little(self, done + len(requests))
        self._send()
        if self._codec.finished:
            self._finish()

    def sent(self) -> None:
        """The client has read its replies: go on where the queue held us up."""
        self._spare()
        self._go_on()

    def closed(self, error: IoError | None) -> None:
        """The stream is gone. What is in flight ends by itself."""
        if error is not None and error.errno not in (errno.EPIPE, errno.ECONNRESET):  # a client may just go
            self._server.note_drop(self.stream.peer, told(error))
        self._gone = self._finishing = True
        self._waiting.clear()
        self._settle()

    # Requests.

    def _prepare_at_once(self) -> AtOnce | None:
        """What does requests before anything else is done with them; None where they have to wait for others."""
        export = self.export
        if export is None or self._codec.awaits_payload:
            return None
        if self._waiting or self._refusing or self._holds_enough():
            return None
        if not self._trials.is_due():
            return None
        at_once = self._at_once
        at_once.tried = False
        at_once.read, at_once.write = export.at_once()
        at_once.left_bytes = self._server.turn_bytes
        return at_once if at_once.read is not None or at_once.write is not None else None

    def _holds_enough(self) -> bool:
        """Whether nothing more is to be begun until something of what we hold has ended."""
        return (
            self._in_flight_bytes > IN_FLIGHT_BYTES_MAX
            or self._in_flight + len(self._flushes) >= IN_FLIGHT_MAX
            or self.stream.queued_bytes > QUEUED_BYTES_MAX
        )

    def _send_done(self, at_once: AtOnce, replies: Buffer) -> None:
        """Sends the replies to what was done in a pass, and takes note of it."""
        export = self.export
        assert export is not None, "requests come only after an export was entered"
        export.reads += at_once.reads
        export.bytes_read += at_once.bytes_read
        export.writes += at_once.writes
        export.bytes_written += at_once.bytes_written
        at_once.replies = None
        stream = self.stream
        queued_bytes = stream.queued_bytes
        if at_once.filled:
            piece = memoryview(replies)[: at_once.filled]
            # What waits behind others does so as a copy: a few bytes are no reason to hold all of that memory.
            stream.send([bytes(piece) if queued_bytes else piece])
        if stream.queued_bytes and not queued_bytes:
            self._sending.append((stream.sent_bytes, replies))
        else:
            spares.give(replies)
        if self._holds_enough():
            at_once.left_bytes = 0
        if at_once.failed is not None:
            self._fail(*at_once.failed)

    def _run(self, requests: list[Request], used_bytes: int = 0, *, tried: bool = False) -> None:
        """Answers what needs no wait; starts the rest.

        Most requests are read or written by a single call, and cost no coroutine. Nothing else runs between them, so
        what makes that call is found once for all. `tried` says that the first one would have to wait: it was tried.
        """
        export = self.export
        assert export is not None, "requests come only after an export was entered"
        read: ReadAtOnce | None = None
        write: WriteAtOnce | None = None
        is_found = False  # what reads and writes
        turn_bytes = self._server.turn_bytes
        for index, request in enumerate(requests):
            if used_bytes + self._ready_bytes + index * AtOnce.REQUEST_BYTES >= turn_bytes:
                self._send(has_more=True)
                self._leave(requests[index:])
                self._await_turn()
                break
            if self._holds_enough():
                self._leave(requests[index:])
                break
            length = 0 if request.error else request.length
            if length > PART_BYTES and self._codec.may_fragment(request):
                self._run_parts(request, export)
                if self._waiting:
                    self._leave(requests[index + 1 :])
                    break
                is_found = False
                continue
            if not is_found and not tried:
                read, write = (None, None) if self._refusing else export.at_once()
                is_found = True
            try:
                if length and request.command == CMD_READ and not self._refusing:
                    data = spares.take_filled(read, request.offset, length) if read is not None else None
                    if data is not None:
                        export.reads += 1
                        export.bytes_read += length
                        self._reply_read(request, data)
                        continue
                    tried = tried or read is not None
                    if self._begin_read(request, export):
                        tried = False
                        continue
                elif length and request.command == CMD_WRITE and write is not None:
                    if write(request.offset, request.data):
                        self._written(request, export)
                        continue
                    tried = True
            except Exception as error:  # noqa: BLE001 - whatever it is, the client is answered
                self._fail(request, error)
                tried = False
                continue
            if request.command == CMD_FLUSH:
                self._flushes.append(request)
                continue
            self._start(request, tried=tried)
            tried, is_found = False, False
        self._start_flushes()

    def _start_flushes(self) -> None:
        """Starts the flushes that came along, after all that was written then: one sync is enough for them."""
        flushes, self._flushes = self._flushes, []
        for request in flushes:
            self._start(request)
        if flushes and self._waiting and not self._holds_enough():
            self._await_turn()  # what they held up: those that have ended already tell nobody

    def _written(self, request: Request, export: Export) -> None:
        """Takes note of a write that was done at once, and answers it, or has it flushed first."""
        export.writes += 1
        export.bytes_written += request.length
        if request.length >= spares.LENGTH_MIN:
            spares.give(request.data)
        if request.flags & CMD_FLAG_FUA:  # from here on it is no more than a flush
            self._flushes.append(Request(CMD_FLUSH, 0, request.cookie, 0, 0))
        else:
            self._codec.reply_done(request)

    def _begin_read(self, request: Request, export: Export) -> bool:
        """Begins a read that could not be done at once, where that needs no coroutine."""
        if not export.edge.begin_pread(request.offset, request.length, functools.partial(self._read_ended, request)):
            return False
        export.reads += 1
        export.bytes_read += request.length
        self._in_flight += 1
        self._in_flight_bytes += request.length
        return True

    def _read_ended(self, request: Request, data: Buffer, error: Exception | None) -> None:
        self._in_flight -= 1
        self._in_flight_bytes -= request.length
        try:
            if error is not None:
                raise error
            self._reply_read(request, data)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the client is answered
            self._fail(request, failure)
        self._send_soon()

    def _begin_flush(self, request: Request) -> bool:
        """As `_begin_read`, for a flush that has to wait for a file to be synced and for nothing else."""
        if request.error or self._refusing:
            return False
        export = self.export
        assert export is not None, "requests come only after an export was entered"
        self._in_flight += 1
        begun = export.edge.begin_flush(functools.partial(self._flush_ended, request))
        self._in_flight -= not begun
        return begun

    def _flush_ended(self, request: Request, error: Exception | None) -> None:
        self._in_flight -= 1
        if error is None:
            self._codec.reply_done(request)
        else:
            self._fail(request, error)
        self._send_soon()

    def _run_parts(self, request: Request, export: Export) -> None:
        """Runs a long read in parts. Those for which there is no room now are left for later."""
        parts = self._codec.split(request, PART_BYTES)
        export.reads -= len(parts) - 1  # as each will count itself
        self._run(parts)

    def _leave(self, requests: list[Request]) -> None:
        """Leaves these for later, and takes no more until then."""
        self._waiting.extend(requests)
        self.stream.pause()

    def _await_turn(self) -> None:
        """Has what was left go on when it is our turn."""
        if not self._awaits_turn:
            self._awaits_turn = True
            self._server.await_turn(self)

    def have_turn(self) -> None:
        """It is our turn."""
        self._awaits_turn = False
        requests = list(self._waiting)
        self._waiting.clear()
        if requests:
            self._run(requests)
            self._send()
        if not self._waiting:
            self._go_on()

    def _start(self, request: Request, *, tried: bool = False) -> None:
        try:
            if request.command == CMD_FLUSH and self._begin_flush(request):
                return
            task = eager.start(self._answer(request, tried))
        except Exception as error:  # noqa: BLE001 - only a bug comes this far, and the other requests go on
            self._report(error)
            return
        if task is not None:
            held_bytes = len(request.data)
            if request.command == CMD_READ:
                held_bytes = request.length
            elif request.command == CMD_BLOCK_STATUS:
                held_bytes = _STATUS_BYTES * len(self._codec.contexts)
            self._in_flight += 1
            self._in_flight_bytes += held_bytes
            task.add_done_callback(lambda ended: self._ended_late(request, held_bytes, ended))

    def _ended_late(self, request: Request, held_bytes: int, task: asyncio.Task[None]) -> None:
        self._in_flight -= 1
        self._in_flight_bytes -= held_bytes
        if task.cancelled():
            self._refuse(request, errno.EIO, "the request was given up")
        elif (error := task.exception()) is not None:
            self._report(error)
        self._send_soon()

    def _send_soon(self) -> None:
        """All that end in this turn of the loop leave in one send."""
        if not self._send_due:
            self._send_due = True
            asyncio.get_running_loop().call_soon(self._send_and_go_on)

    def _send_and_go_on(self) -> None:
        self._send_due = False
        self._send()
        self._go_on()

    def _go_on(self) -> None:
        """Something has ended that may have held us up."""
        if self._waiting:
            self._await_turn()
        elif not self._finishing:
            self.stream.resume()
        self._settle()

    def _settle(self) -> None:
        """Once nothing is left to do: tells who waits for it, and closes if it is time."""
        if self._in_flight:
            return
        if self._idle is not None:
            self._idle.wake()
        if self._waiting:
            return
        if self._gone:
            self._end()
        elif self._finishing and not self._closing:
            self._closing = True
            self._send()
            self.stream.close()
            self._give_time_to_read()

    def _give_time_to_read(self) -> None:
        """Ends the connection in a while: if all is answered by then, else if its client has read nothing since."""
        if self._last_replies is not None:
            self._last_replies.cancel()
        taken = self.stream.taken_bytes
        self._last_replies = asyncio.get_running_loop().call_later(STOP_GRACE_S, self._end_time_to_read, taken)

    def _end_time_to_read(self, taken: int) -> None:
        is_moving = self._in_flight or self._send_due or self.stream.taken_bytes != taken
        if not self._closing and is_moving:
            self._give_time_to_read()
        else:
            self.stream.abort()

    async def _answer(self, request: Request, tried: bool) -> None:
        codec = self._codec
        try:
            if request.error or self._refusing:
                code, text = (request.error, request.message) if request.error else (errno.ESHUTDOWN, "shutting down")
                codec.reply_error(request, code, text)
                return
            export = self.export
            assert export is not None, "requests come only after an export was entered"
            if request.command == CMD_READ:
                data = await export.execute(request, tried) if request.length else b""
                assert data is not None
                self._reply_read(request, data)
            elif request.command == CMD_BLOCK_STATUS:
                answers = [(context, await export.status(request, context)) for context in codec.contexts]
                codec.reply_status(request, answers)
                self._ready_bytes += sum(EXTENT.size * len(extents) for _, extents in answers)
            else:
                await export.execute(request)
                spares.give(request.data)
                codec.reply_done(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is answered
            self._failed(request, error)

    def _reply_read(self, request: Request, data: Buffer) -> None:
        codec = self._codec
        self._ready_bytes += request.length
        if codec.structured and is_zero(data) and codec.may_fragment(request) and len(data) == request.length:
            codec.reply_read_hole(request)  # zeroes cost more to send than to find out
            spares.give(data)
        else:
            codec.reply_read(request, data)
            if request.length >= spares.LENGTH_MIN:
                self._has_spares = True

    def _failed(self, request: Request, error: Exception) -> None:
        """Answers a request that failed. A bug is answered, logged, and raised where a test wants it."""
        if isinstance(error, FleecerError) and not isinstance(error, LocalProtocolError):
            self._refuse(request, error.errno, told(error))  # first: whatever a listener does, there is a reply
            if self.export is not None and self.export.on_failure is not None:
                self.export.on_failure(self.export, request.command in (CMD_READ, CMD_BLOCK_STATUS), error)
            return
        _log.error("a request failed in a way it must not", exc_info=error)
        self._refuse(request, errno.EIO, "internal error")
        if self._server.raise_internal_errors:
            raise error

    def _fail(self, request: Request, error: Exception) -> None:
        """As `_failed`, where nobody hears what is raised."""
        try:
            self._failed(request, error)
        except Exception as bug:  # noqa: BLE001 - the other requests go on
            self._report(bug)

    def _refuse(self, request: Request, code: int, text: str) -> None:
        if not request.answered:
            self._codec.reply_error(request, code, text)
            self._ready_bytes += len(text)

    def _report(self, error: BaseException) -> None:
        """Tells of a bug that a request ran into, where a test can see it."""
        context = {"message": "a request failed in a way it must not", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)

    def _send(self, *, has_more: bool = False) -> None:
        """Sends what is ready: what is long aside, where there is more to be done meanwhile."""
        outgoing = self._codec.outgoing
        if outgoing:
            self._ready_bytes = 0
            aside = False
            if self._has_spares:
                self._note_spares(outgoing)
                aside = (has_more or self.stream.sends_aside) and self._server.may_send_aside
            self.stream.send(outgoing, aside=aside)
            outgoing.clear()
            if self._sending:
                self._spare()

    def _note_spares(self, outgoing: list[Buffer]) -> None:
        self._has_spares = False
        end = self.stream.sent_bytes
        for piece in outgoing:
            end += len(piece)
            if spares.is_spare(piece):
                self._sending.append((end, piece))

    def _spare(self) -> None:
        """Gives the buffers back that the kernel has taken."""
        sending, taken = self._sending, self.stream.taken_bytes
        while sending and sending[0][0] <= taken:
            spares.give(sending.popleft()[1])

    # The end.

    def _finish(self) -> None:
        """The client said goodbye or broke a rule: answer all that it asked before, then close."""
        if self._codec.failure is not None and not self._finishing:
            self._server.note_drop(self.stream.peer, told(self._codec.failure))
        self._finishing = True
        self.stream.pause()
        self._settle()
        if not self._closing and not self._gone:
            self._give_time_to_read()

    async def stop(self) -> None:
        """Refuses new requests, ends those in flight, answers them, and closes. Returns when that is done."""
        self._refusing = self._codec.refuse_options = True
        self._refuse_waiting()
        self._send_and_go_on()
        if self._in_flight:
            self._idle = self._idle or Waiters()
            await self._idle.wait()
        self._refuse_waiting()
        self._finish()
        await asyncio.shield(self.ended)

    def _refuse_waiting(self) -> None:
        waiting, self._waiting = self._waiting, collections.deque()
        for request in waiting:
            self._start(request)

    def drop(self) -> None:
        """Closes at once; requests in flight end unheard."""
        self._finishing = True
        self.stream.abort()

    def _end(self) -> None:
        if self._last_replies is not None:
            self._last_replies.cancel()
        if not self.ended.done():
            self.ended.set_result(None)
            self._server.forget(self)
