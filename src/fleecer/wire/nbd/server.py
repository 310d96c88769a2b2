"""The server's role: bytes from a client become requests, and answers become bytes.

Invariants:
- Every request is done at once (`AtOnce`), or returned once after its payload is complete, both in the order sent. One
  that must be refused has its `error` set; the owner answers it by `reply_error(request, request.error,
  request.message)`.
- A request gets exactly one final reply; a second raises LocalProtocolError and sends nothing. Replies may be given in
  any order, also after DISC. Each part of a read that was split counts as a request here.
- With structured replies a read is never answered by a simple reply, and the flag DONE stands on the last chunk only:
  of a read that was split, on the reply to whichever part is answered last.
- A payload's length is checked before memory is taken for it.
- What is done at once (`AtOnce`) is done in the order sent, and only as long as nothing before it is left to be done.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from fleecer import spares
from fleecer.errors import LocalProtocolError, RemoteProtocolError, quoted
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce, align_down, is_zero
from fleecer.units import KiB
from fleecer.wire.nbd.codec import TRANSMISSION_BUFFER_BYTES, WAITING_MAX_BYTES, Script
from fleecer.wire.nbd.constants import (
    CHUNK,
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    DATA_CHUNK,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    ERROR_BODY,
    EXTENTS_SENT_MAX,
    HOLE_CHUNK,
    JOINED_MAX_BYTES,
    OFFSET,
    OPTION_MAX_BYTES,
    OPTIONS_MAX,
    OPTIONS_TOTAL_MAX_BYTES,
    PAYLOAD_MAX_BYTES,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    U32,
)
from fleecer.wire.nbd.messages import Catalogue, ExportInfo, Parts, Request, encode_text, error_value
from fleecer.wire.nbd.server_handshake import ServerHandshake

_REQUEST_BYTES = REQUEST.size
_unpack_request = REQUEST.unpack_from
_pack_simple = SIMPLE_REPLY.pack
_pack_chunk = CHUNK.pack
_pack_data = DATA_CHUNK.pack
_put_simple = SIMPLE_REPLY.pack_into
_put_data = DATA_CHUNK.pack_into
_put_hole = HOLE_CHUNK.pack_into

_CHANGES = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))
_GROWS = frozenset((CMD_WRITE, CMD_WRITE_ZEROES))


class AtOnce:
    """Requests that are done in the pass that parses them, with their replies laid out one behind the other in memory.

    Most requests are short reads and writes that take no wait. For those a value for each request, and memory for each
    reply, would be half of the work.

    read, write  what does them; None: such requests are left
    left_bytes   nothing more is done once this is used up; a request takes `REQUEST_BYTES` of it, and a read its length
    replies      there after a pass, its first `filled` bytes to be sent: the owner takes it, and sets None
    is_full      there may be more to do once the replies are sent: call `ServerCodec.received` again, with 0
    failed       what failed in the pass, and how, for the owner to answer
    tried        the first request that is left would have had to wait
    reads, bytes_read, writes, bytes_written  what was done in the pass
    """

    REPLIES_BYTES = 64 * KiB
    READ_MAX_BYTES = 32 * KiB
    """Longer ones do well with memory of their own."""
    REQUEST_BYTES = 4 * KiB

    __slots__ = (
        "bytes_read",
        "bytes_written",
        "failed",
        "filled",
        "is_full",
        "left_bytes",
        "read",
        "reads",
        "replies",
        "tried",
        "write",
        "writes",
    )

    def __init__(self) -> None:
        self.read: ReadAtOnce | None = None
        self.write: WriteAtOnce | None = None
        self.left_bytes = 0
        self.replies: bytearray | memoryview | None = None
        self.filled = 0
        self.is_full = False
        self.tried = False
        self.failed: tuple[Request, Exception] | None = None
        self.reads = self.bytes_read = self.writes = self.bytes_written = 0


class ServerCodec(ServerHandshake):
    """One connection as the server sees it.

    `outgoing` holds the greeting at once. `export` is set, and requests come, once a client has entered transmission;
    `structured` and `contexts` tell what it negotiated.

    `finished` is set by DISC, by ABORT, by an EXPORT_NAME that cannot be granted, and by `failure`. The owner then
    answers the requests it still holds and closes; after a failure it may close at once. Nothing here raises for what
    the peer does: what was valid before the violation is returned first, and `failure` is a RemoteProtocolError.

    Requests of length 0 are legal and ask for nothing: `reply_read` with no data or `reply_done` answers them. Block
    status of nothing is refused, because an answer must describe at least one byte.
    """

    __slots__ = ("_flags_allowed", "_incomplete", "_script", "_size", "_unaligned", "_writable_size")

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        payload_max: int = PAYLOAD_MAX_BYTES,
        option_max: int = OPTION_MAX_BYTES,
        options_max: int = OPTIONS_MAX,
        options_total_max: int = OPTIONS_TOTAL_MAX_BYTES,
    ) -> None:
        super().__init__(
            catalogue,
            payload_max=payload_max,
            option_max=option_max,
            options_max=options_max,
            options_total_max=options_total_max,
        )
        self._script: Script[None] | None = self._handshake()
        self._incomplete: Request | None = None  # the write whose payload is being received in place
        self._size = 0
        self._writable_size = -1  # -1 where nothing may be written
        self._unaligned = 0  # bits that an aligned offset or length has clear
        self._flags_allowed: dict[int, int] = {}

    def received(self, count: int, at_once: AtOnce | None = None) -> list[Request]:
        """Parses all that is complete, now that `count` more bytes are in the `receive_buffer`.

        Returns the requests now complete, in order; none during the handshake. Those that `at_once` can do, up to the
        first that it cannot, are done and answered instead; where it `is_full`, the rest is not parsed yet.
        """
        requests: list[Request] = []
        if self.finished:
            return requests
        if self._rest is not None:
            if self._fill_rest(count) and self._incomplete is not None:
                requests.append(self._incomplete)
                self._incomplete = None
            return requests
        self._end += count
        assert self._end <= len(self._buffer), "more bytes than there was room for"
        self._narrow = False
        try:
            if self._script is not None:
                self._negotiate(self._script)
            if self._script is None:
                if at_once is not None and self._end - self._start >= _REQUEST_BYTES:
                    self._do_at_once(at_once)
                    if at_once.is_full:
                        return requests
                self._parse(requests)
        except RemoteProtocolError as error:
            self._fail(error)
        self._compact()
        return requests

    def _negotiate(self, script: Script[None]) -> None:
        try:
            next(script)
        except StopIteration:
            if self.export is not None:
                self._script = None
                self._begin_transmission(self.export)

    def _begin_transmission(self, export: ExportInfo) -> None:
        self._enlarge(TRANSMISSION_BUFFER_BYTES)
        self._size = export.size
        self._writable_size = -1 if export.read_only else export.size
        self._unaligned = export.block_size_min - 1 if self._block_sizes_known else 0
        self._flags_allowed = {
            CMD_READ: CMD_FLAG_FUA | (CMD_FLAG_DF if self.structured else 0),
            CMD_WRITE: CMD_FLAG_FUA,
            CMD_FLUSH: CMD_FLAG_FUA,
            CMD_TRIM: CMD_FLAG_FUA,
            CMD_CACHE: CMD_FLAG_FUA,
            CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | (CMD_FLAG_FAST_ZERO if export.can_fast_zero else 0),
            CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
        }

    # From bytes to requests.

    def _do_at_once(self, at_once: AtOnce) -> None:
        """Does requests in the order sent, as many as come before the first that is not for this."""
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        size, writable_size, unaligned, structured = self._size, self._writable_size, self._unaligned, self.structured
        read, write, left, longest = at_once.read, at_once.write, at_once.left_bytes, at_once.READ_MAX_BYTES
        replies = at_once.replies = spares.take(at_once.REPLIES_BYTES)
        room, filled, room_end = memoryview(replies), 0, len(replies)
        head_bytes = DATA_CHUNK.size if structured else SIMPLE_REPLY.size
        reads = bytes_read = writes = bytes_written = 0
        at_once.is_full, at_once.failed, at_once.tried = False, None, False
        while left > 0 and end - start >= _REQUEST_BYTES:
            magic, flags, command, cookie, offset, length = _unpack_request(buffer, start)
            data_start = start + _REQUEST_BYTES
            if flags or magic != REQUEST_MAGIC or not length or (offset | length) & unaligned:
                break
            try:
                if command == CMD_READ:
                    data_at = filled + head_bytes
                    data_end = data_at + length
                    if read is None or length > longest or offset + length > size:
                        break
                    if data_end > room_end:
                        at_once.is_full = True
                        break
                    data = room[data_at:data_end]
                    if not read(offset, data):
                        at_once.tried = True
                        break
                    if not structured:
                        _put_simple(room, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                    elif data[0] or not is_zero(data):
                        chunk = (STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, cookie, length + 8)
                        _put_data(room, filled, *chunk, offset)
                    else:  # zeroes cost more to send than to find out
                        chunk = (STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_HOLE, cookie, 12)
                        _put_hole(room, filled, *chunk, offset, length)
                        data_end = filled + HOLE_CHUNK.size
                    start, filled = data_start, data_end
                    reads += 1
                    bytes_read += length
                    left -= length
                elif command == CMD_WRITE:
                    data_end = data_start + length
                    if write is None or data_end > end or offset + length > writable_size:
                        break
                    if filled + SIMPLE_REPLY.size > room_end:
                        at_once.is_full = True
                        break
                    if not write(offset, view[data_start:data_end]):
                        at_once.tried = True
                        break
                    _put_simple(room, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                    start, filled = data_end, filled + SIMPLE_REPLY.size
                    writes += 1
                    bytes_written += length
                else:
                    break
            except Exception as error:  # noqa: BLE001 - whatever it is, the owner answers it
                at_once.failed = Request(command, flags, cookie, offset, length), error
                at_once.is_full = True
                start = data_start if command == CMD_READ else data_start + length
                break
            left -= at_once.REQUEST_BYTES
        self._start = start
        at_once.left_bytes, at_once.filled = left, filled
        at_once.reads, at_once.bytes_read, at_once.writes, at_once.bytes_written = (
            reads,
            bytes_read,
            writes,
            bytes_written,
        )

    def _parse(self, requests: list[Request]) -> None:
        buffer, start, end = self._buffer, self._start, self._end
        size, writable_size, unaligned, longest = self._size, self._writable_size, self._unaligned, self._payload_max
        read_flags_bad, write_flags_bad = ~self._flags_allowed[CMD_READ], ~self._flags_allowed[CMD_WRITE]
        while end - start >= _REQUEST_BYTES:
            magic, flags, command, cookie, offset, length = _unpack_request(buffer, start)
            if magic != REQUEST_MAGIC:
                raise RemoteProtocolError(f"request magic 0x{magic:x} is not 0x{REQUEST_MAGIC:x}")
            data_start = start + _REQUEST_BYTES
            if command == CMD_READ:
                request = Request(command, flags, cookie, offset, length)
                start = data_start
                if not (
                    offset + length > size
                    or length > longest
                    or flags & read_flags_bad
                    or (offset | length) & unaligned
                ):
                    requests.append(request)
                    continue
            elif command == CMD_WRITE:
                if length > longest:
                    raise RemoteProtocolError(f"write of {length} bytes at {offset}: the limit is {longest}")
                if data_start + length > end:
                    if length > WAITING_MAX_BYTES:
                        self._await_payload(Request(command, flags, cookie, offset, length), data_start)
                        return
                    break
                start = data_start + length
                request = Request(command, flags, cookie, offset, length, buffer[data_start:start])
                if not (offset + length > writable_size or flags & write_flags_bad or (offset | length) & unaligned):
                    requests.append(request)
                    continue
            elif command == CMD_DISC:
                self.finished = True
                return
            else:
                request = Request(command, flags, cookie, offset, length)
                start = data_start
            self._judge(request)
            requests.append(request)
        self._start = start

    def _await_payload(self, request: Request, data_start: int) -> None:
        """Lets a large payload, of which a part is here, be received in place."""
        data = spares.take(request.length)
        request.data = data
        self._judge(request)
        self._incomplete = request
        self._receive_in_place(memoryview(data), data_start)

    def _judge(self, request: Request) -> None:
        """Sets `error` where a rule is broken for which the request, not the connection, must fail."""
        error, problem = self._problem(request)
        if error:
            request.error = error
            request.message = problem
            request.data = b""

    def _problem(self, request: Request) -> tuple[int, str]:
        command, flags, offset, length = request.command, request.flags, request.offset, request.length
        assert self.export is not None
        name = quoted(self.export.name)
        allowed = self._flags_allowed.get(command)
        if allowed is None:
            return EINVAL, f"command {command} is unknown"
        what = f"{COMMAND_NAMES[command]} of {length} bytes at {offset} on export {name}"
        if command in _CHANGES and self.export.read_only:
            return EPERM, f"{what}: the export is read-only"
        if flags & ~allowed:
            return EINVAL, f"{what}: flags 0x{flags & ~allowed:x} are not for this command or not negotiated"
        if command == CMD_FLUSH:
            return (EINVAL, f"{what}: a flush has no range") if offset or length else (0, "")
        if offset + length > self._size:
            return ENOSPC if command in _GROWS else EINVAL, f"{what}: the export ends at {self._size}"
        if (offset | length) & self._unaligned:
            return EINVAL, f"{what}: not in multiples of the minimum block size, {self._unaligned + 1}"
        if command == CMD_READ and length > self._payload_max:
            return EOVERFLOW if flags & CMD_FLAG_DF else EINVAL, f"{what}: the longest read is {self._payload_max}"
        if command == CMD_TRIM and not self.export.can_trim:
            return EINVAL, f"{what}: the export does not offer it"
        if command == CMD_BLOCK_STATUS and not (length and self.contexts):
            missing = "a range to describe" if self.contexts else "a metadata context negotiated for this export"
            return EINVAL, f"{what}: it needs {missing}"
        return 0, ""

    # From answers to bytes.

    def reply_read(self, request: Request, data: Buffer) -> None:
        """Answers a read with its bytes, exactly as many as were asked for. `data` must not change until it is sent."""
        length = request.length
        if request.answered or request.command != CMD_READ or len(data) != length:
            raise _misuse(request, f"a read of {len(data)} bytes")
        if not length:
            self.reply_done(request)
            return
        request.answered = True
        if self.structured:
            header = _pack_data(
                STRUCTURED_REPLY_MAGIC,
                REPLY_FLAG_DONE if request.parts is None else _done_flag(request.parts),
                REPLY_TYPE_OFFSET_DATA,
                request.cookie,
                length + 8,
                request.offset,
            )
        else:
            header = _pack_simple(SIMPLE_REPLY_MAGIC, 0, request.cookie)
        if length > JOINED_MAX_BYTES:
            self.outgoing.append(header)
            self.outgoing.append(data)
        else:
            self.outgoing.append(header + data)

    def may_fragment(self, request: Request) -> bool:
        """Whether this is a read that several chunks may answer, of data and of holes: see `split`, `reply_read_hole`.

        Otherwise all is sent at once as data, zeroes too.
        """
        return (
            self.structured and request.command == CMD_READ and not request.flags & CMD_FLAG_DF and request.length > 0
        )

    def split(self, request: Request, part_bytes: int) -> list[Request]:
        """Parts of a read for which `may_fragment` holds, in order; each is answered as if it were a request.

        They end at multiples of `part_bytes`. The read fails if one does; the others are answered all the same, because
        an error in a part tells the client where it is (NBD_REPLY_TYPE_ERROR_OFFSET).
        """
        if request.answered or request.error or request.parts is not None or not self.may_fragment(request):
            raise _misuse(request, "parts")
        request.answered = True
        parts = Parts(0)
        found: list[Request] = []
        start, end = request.offset, request.offset + request.length
        while start < end:
            stop = min(end, align_down(start, part_bytes) + part_bytes)
            found.append(Request(CMD_READ, request.flags, request.cookie, start, stop - start, parts=parts))
            start = stop
        parts.left = len(found)
        return found

    def reply_read_hole(self, request: Request) -> None:
        """Answers a read whose bytes are all zero without sending them. See `may_fragment`."""
        if request.answered or not self.may_fragment(request):
            raise _misuse(request, "a hole")
        request.answered = True
        done = REPLY_FLAG_DONE if request.parts is None else _done_flag(request.parts)
        chunk = (STRUCTURED_REPLY_MAGIC, done, REPLY_TYPE_OFFSET_HOLE, request.cookie, 12)
        self.outgoing.append(HOLE_CHUNK.pack(*chunk, request.offset, request.length))

    def reply_done(self, request: Request) -> None:
        """Answers a request that returns nothing and has succeeded; with FUA, once its effect is durable."""
        command = request.command
        if request.answered or command == CMD_BLOCK_STATUS or (command == CMD_READ and request.length):
            raise _misuse(request, "success without data")
        request.answered = True
        if self.structured and command == CMD_READ:
            chunk = (STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, request.cookie, 0)
            self.outgoing.append(_pack_chunk(*chunk))
        else:
            self.outgoing.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, request.cookie))

    def reply_error(self, request: Request, errno_code: int, message: str = "") -> None:
        """Answers a request that failed: with the value nearest to `errno_code` and, if structured, the message."""
        if request.answered:
            raise _misuse(request, f"error {errno_code}")
        request.answered = True
        error = error_value(errno_code, request.command, request.flags)
        if not self.structured:
            self.outgoing.append(_pack_simple(SIMPLE_REPLY_MAGIC, error, request.cookie))
            return
        text = encode_text(message)
        body = ERROR_BODY.pack(error, len(text)) + text
        kind, done = REPLY_TYPE_ERROR, REPLY_FLAG_DONE
        if request.parts is not None:
            kind, done = REPLY_TYPE_ERROR_OFFSET, _done_flag(request.parts)
            body += OFFSET.pack(request.offset)
        chunk = (STRUCTURED_REPLY_MAGIC, done, kind, request.cookie, len(body))
        self.outgoing.append(_pack_chunk(*chunk) + body)

    def reply_status(
        self, request: Request, extents_by_context: Sequence[tuple[str, Iterable[tuple[int, int]]]]
    ) -> None:
        """Answers block status with (length, flags) runs from the request's offset on, for each context of `contexts`.

        What passes the request's end is cut off; empty runs are dropped and equal neighbours joined; REQ_ONE leaves
        the first run, and no more than 128 Ki are sent, so the client asks again from there. Raises LocalProtocolError,
        and sends nothing, if a context is missing, double or unknown, or describes nothing at all.

        On an export with a minimum block size the runs must be multiples of it; that is the caller's duty.
        """
        by_context = dict(extents_by_context)
        if request.answered or request.command != CMD_BLOCK_STATUS:
            raise _misuse(request, "block status")
        if by_context.keys() != self._context_ids.keys() or len(by_context) != len(extents_by_context):
            raise _misuse(request, f"block status of {sorted(by_context)}, not of {sorted(self.contexts)}, each once")
        runs_max = 1 if request.flags & CMD_FLAG_REQ_ONE else EXTENTS_SENT_MAX
        chunks: list[bytes] = []
        for context, extents in by_context.items():
            numbers = _flat_extents(extents, request.length, runs_max)
            if not numbers:
                raise _misuse(request, f"block status without any extent in {quoted(context)}")
            body = U32.pack(self._context_ids[context]) + struct.pack(f">{len(numbers)}I", *numbers)
            done = REPLY_FLAG_DONE if len(chunks) == len(by_context) - 1 else 0
            chunk = (STRUCTURED_REPLY_MAGIC, done, REPLY_TYPE_BLOCK_STATUS, request.cookie, len(body))
            chunks.append(_pack_chunk(*chunk) + body)
        request.answered = True
        self.outgoing += chunks


def _done_flag(parts: Parts) -> int:
    """The flag DONE if no other part is left to answer. Call it once for each that is answered."""
    parts.left -= 1
    return 0 if parts.left else REPLY_FLAG_DONE


def _misuse(request: Request, answer: str) -> LocalProtocolError:
    command = COMMAND_NAMES.get(request.command, f"command {request.command}")
    state = "which was answered before" if request.answered else "which it cannot answer"
    return LocalProtocolError(
        f"reply with {answer} to {command} of {request.length} bytes at {request.offset}, {state}"
    )


def _flat_extents(extents: Iterable[tuple[int, int]], length: int, runs_max: int) -> list[int]:
    """Lengths and flags in turn: merged, none empty, together at most `length` bytes, at most `runs_max` runs."""
    numbers: list[int] = []
    last_flags = -1
    left = length
    for run_length, flags in extents:
        taken = min(run_length, left)
        if taken <= 0:
            continue
        if flags == last_flags:
            numbers[-2] += taken
        elif len(numbers) == 2 * runs_max:
            break
        else:
            numbers += (taken, flags)
            last_flags = flags
        left -= taken
    return numbers
