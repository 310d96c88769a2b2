"""The client's role: requests become bytes, and a server's answers become replies. The server is not trusted.

Invariants:
- A reply is returned once, when it is whole: every chunk lay inside the request, none overlapped another, and of a
  successful read they covered every byte; block status came once for each context. Whatever breaks that is a
  `failure`, after which nothing more is returned: the replies still missing will not come.
- An error of the server's is a reply with `error`, whatever else was sent for that request.
- Memory for an answer is taken only within what the request asked for, or a fixed limit.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Sequence

from fleecer.errors import FleecerError, LocalProtocolError, RemoteProtocolError
from fleecer.ranges import Buffer
from fleecer.wire.nbd.client_handshake import ClientHandshake, Mode
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
    ERRNO_OF_ERROR,
    ERROR_BODY,
    EXTENT,
    EXTENTS_TAKEN_MAX,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    HOLE_BODY,
    OFFSET,
    OPTION_MAX_BYTES,
    PAYLOAD_MAX_BYTES,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR_BIT,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRING_MAX_BYTES,
    STRUCTURED_REPLY_MAGIC,
    U32,
)
from fleecer.wire.nbd.messages import Reply

_PIECES_MAX = 16 * 1024
"""Separate runs that a read may consist of at any moment. Runs that touch are joined."""

_LENGTH_MAX = 0xFFFFFFFF


class ClientCodec(ClientHandshake):
    """One connection as the client sees it.

    Once `ready`, the methods named like commands append a request to `outgoing` and return its cookie; `received`
    returns the replies, in the server's order. They raise LocalProtocolError, and send nothing, for what the protocol
    forbids: a range outside the export or beyond its block sizes, a flag or command that the server did not offer.

    `failure` says why a session ended that should not have: RemoteProtocolError, or ExportUnknown. After an ESHUTDOWN
    error the owner must `disconnect` ("Terminating the transmission phase").
    """

    __slots__ = (
        "_body",
        "_cookie",
        "_current",
        "_current_done",
        "_disconnected",
        "_flags_allowed",
        "_flying",
        "_script",
    )

    def __init__(self, export_name: str, *, contexts: Sequence[str] = ("base:allocation",), mode: Mode = "go") -> None:
        super().__init__(export_name, contexts, mode)
        self._script: Script[None] | None = self._handshake()
        self._flying: dict[int, Reply] = {}
        self._cookie = 0
        self._disconnected = False
        self._flags_allowed: dict[int, int] = {}
        # What is being received in place: for whom, whether it ends the reply, and the body if it is not read data.
        self._current: Reply | None = None
        self._current_done = False
        self._body: bytearray | None = None

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet replied to."""
        return len(self._flying)

    # Requests.

    def read(self, offset: int, length: int, flags: int = 0) -> int:
        """Asks for `length` bytes. Flags: DF."""
        return self._request(CMD_READ, flags, offset, length)

    def write(self, offset: int, data: Buffer, flags: int = 0) -> int:
        """Sends `data`, which must not change until it is sent. Flags: FUA."""
        cookie = self._request(CMD_WRITE, flags, offset, len(data))
        self.outgoing.append(data)
        return cookie

    def flush(self) -> int:
        """Asks that every write replied to be made durable."""
        return self._request(CMD_FLUSH, 0, 0, 0)

    def trim(self, offset: int, length: int, flags: int = 0) -> int:
        """Tells that the range's content is not needed. Flags: FUA."""
        return self._request(CMD_TRIM, flags, offset, length)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> int:
        """Makes the range read as zeroes. Flags: FUA, NO_HOLE, FAST_ZERO."""
        return self._request(CMD_WRITE_ZEROES, flags, offset, length)

    def cache(self, offset: int, length: int) -> int:
        """Tells that the range will be read soon."""
        return self._request(CMD_CACHE, 0, offset, length)

    def block_status(self, offset: int, length: int, flags: int = 0) -> int:
        """Asks what the range holds, in every negotiated context. Flags: REQ_ONE."""
        return self._request(CMD_BLOCK_STATUS, flags, offset, length)

    def disconnect(self) -> None:
        """Ends the session softly: nothing may be sent after it. Replies in flight still come; a server answers them.

        During the handshake nothing can be said, because an option may be in flight; the owner just closes.
        """
        if self.ready and not self.finished and not self._disconnected:
            self.outgoing.append(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        self._disconnected = True

    def eof(self) -> None:
        """The server closed the connection: a `failure`, unless we said goodbye and have every reply."""
        if self.finished:
            return
        if not self.ready:
            self._fail(self._closed_early())
        elif self._flying or not self._disconnected:
            self._fail(
                RemoteProtocolError(f"the server closed the connection with {self.in_flight} requests in flight")
            )
        self.finished = True

    def _request(self, command: int, flags: int, offset: int, length: int) -> int:
        problem = self._problem(command, flags, offset, length)
        if problem:
            raise LocalProtocolError(f"{COMMAND_NAMES[command]} of {length} bytes at {offset}: {problem}")
        self._cookie = cookie = self._cookie + 1
        self._flying[cookie] = Reply(command, flags, cookie, offset, length)
        self.outgoing.append(REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length))
        return cookie

    def _problem(self, command: int, flags: int, offset: int, length: int) -> str:
        info = self.info
        if info is None or not self.ready or self.finished or self._disconnected:
            return "the connection is not in transmission"
        allowed = self._flags_allowed.get(command)
        if allowed is None:
            return "the server does not offer this command for the export"
        if flags & ~allowed:
            return f"flags 0x{flags & ~allowed:x} are not for this command, or the server does not offer them"
        if command == CMD_FLUSH:
            return ""
        if offset < 0 or not 0 < length <= _LENGTH_MAX or offset + length > info.size:
            return f"the export has {info.size} bytes, and a request at most {_LENGTH_MAX}"
        if (offset | length) & (info.block_size_min - 1):
            return f"not in multiples of the minimum block size, {info.block_size_min}"
        if command in (CMD_READ, CMD_WRITE) and length > min(info.block_size_max, PAYLOAD_MAX_BYTES):
            return f"the longest payload is {min(info.block_size_max, PAYLOAD_MAX_BYTES)}"
        return ""

    def _begin_transmission(self) -> None:
        self._enlarge(TRANSMISSION_BUFFER_BYTES)
        offered = self.flags
        fua = CMD_FLAG_FUA if offered & FLAG_SEND_FUA else 0
        allowed = {CMD_READ: CMD_FLAG_DF if self.structured and offered & FLAG_SEND_DF else 0}
        if offered & FLAG_SEND_FLUSH:
            allowed[CMD_FLUSH] = 0
        if offered & FLAG_SEND_CACHE:
            allowed[CMD_CACHE] = 0
        if self.contexts:
            allowed[CMD_BLOCK_STATUS] = CMD_FLAG_REQ_ONE
        if not offered & FLAG_READ_ONLY:
            allowed[CMD_WRITE] = fua
            if offered & FLAG_SEND_TRIM:
                allowed[CMD_TRIM] = fua
            if offered & FLAG_SEND_WRITE_ZEROES:
                fast = CMD_FLAG_FAST_ZERO if offered & FLAG_SEND_FAST_ZERO else 0
                allowed[CMD_WRITE_ZEROES] = fua | CMD_FLAG_NO_HOLE | fast
        self._flags_allowed = allowed
        self.ready = True

    # Replies.

    def received(self, count: int) -> list[Reply]:
        """Parses all that is complete, now that `count` more bytes are in the `receive_buffer`.

        Returns the replies now complete; none during the handshake. Nothing is raised for what the server does: what
        was valid before a violation is returned, and `failure` tells the rest.
        """
        replies: list[Reply] = []
        if self.finished:
            return replies
        try:
            if self._rest is not None:
                if self._fill_rest(count):
                    self._end_of_body(replies)
                return replies
            self._end += count
            assert self._end <= len(self._buffer), "more bytes than there was room for"
            self._narrow = False
            if self._script is not None:
                self._negotiate(self._script)
            if self._script is None and not self.finished:
                while self._parse_one(replies):
                    pass
        except FleecerError as error:
            self._fail(error)
        self._compact()
        return replies

    def _negotiate(self, script: Script[None]) -> None:
        try:
            next(script)
        except StopIteration:
            self._script = None
            if not self.finished:
                self._begin_transmission()

    def _parse_one(self, replies: list[Reply]) -> bool:
        """Takes one message from the buffer; False if it is not all there, or is received in place from here on."""
        available = self._end - self._start
        if available < SIMPLE_REPLY.size:
            return False
        magic, error, cookie = SIMPLE_REPLY.unpack_from(self._buffer, self._start)
        if magic == SIMPLE_REPLY_MAGIC:
            return self._simple(self._reply_of(cookie), error, replies)
        if magic != STRUCTURED_REPLY_MAGIC:
            raise RemoteProtocolError(f"reply magic 0x{magic:x} is unknown")
        if not self.structured:
            raise RemoteProtocolError("a structured reply came, but was not negotiated")
        if available < CHUNK.size:
            return False
        _, flags, kind, cookie, length = CHUNK.unpack_from(self._buffer, self._start)
        reply = self._reply_of(cookie)
        done = bool(flags & REPLY_FLAG_DONE)
        if kind == REPLY_TYPE_OFFSET_DATA:
            return self._data_chunk(reply, done, length, replies)
        self._check_chunk(reply, done, kind, length)
        return self._other_chunk(reply, done, length, replies)

    def _reply_of(self, cookie: int) -> Reply:
        reply = self._flying.get(cookie)
        if reply is None:
            raise RemoteProtocolError(f"a reply came for cookie {cookie}, of which no request is in flight")
        return reply

    def _simple(self, reply: Reply, error: int, replies: list[Reply]) -> bool:
        if self.structured and (reply.command == CMD_READ or reply.chunks or reply.error):
            raise _violation(reply, "a simple reply, where a structured one is due")
        if reply.command == CMD_BLOCK_STATUS and not error:
            raise _violation(reply, "success without any status")
        data_start = self._start + SIMPLE_REPLY.size
        if error:
            _set_error(reply, error, "")
        elif reply.command == CMD_READ:
            return self._read_data(reply, True, data_start, reply.offset, reply.length, replies)
        self._start = data_start
        del self._flying[reply.cookie]
        replies.append(reply)
        return True

    def _data_chunk(self, reply: Reply, done: bool, length: int, replies: list[Reply]) -> bool:
        size = length - OFFSET.size
        if reply.command != CMD_READ or not 0 < size <= reply.length:
            raise _violation(reply, f"a data chunk of {length} bytes")
        if self._end - self._start < CHUNK.size + OFFSET.size:
            return False
        (offset,) = OFFSET.unpack_from(self._buffer, self._start + CHUNK.size)
        return self._read_data(reply, done, self._start + CHUNK.size + OFFSET.size, offset, size, replies)

    def _read_data(
        self, reply: Reply, done: bool, data_start: int, offset: int, size: int, replies: list[Reply]
    ) -> bool:
        """Takes `size` bytes of read data for `offset`, from `data_start` in the buffer or in place."""
        after = data_start + size
        if after > self._end and size <= WAITING_MAX_BYTES:
            return False
        _cover(reply, offset, size)
        if after <= self._end:
            if size == reply.length:
                reply.data = bytearray(self._view[data_start:after])
            else:
                _room(reply)[offset - reply.offset : offset - reply.offset + size] = self._view[data_start:after]
            self._start = after
            if done:
                self._finish(reply, replies)
            return True
        self._current, self._current_done = reply, done
        self._receive_in_place(memoryview(_room(reply))[offset - reply.offset :][:size], data_start)
        return False

    def _check_chunk(self, reply: Reply, done: bool, kind: int, length: int) -> None:
        """Refuses a chunk without read data by its header, before memory is taken, if type or length are wrong."""
        if kind & REPLY_TYPE_ERROR_BIT:
            fits = ERROR_BODY.size <= length <= OPTION_MAX_BYTES
        elif kind == REPLY_TYPE_NONE:
            fits = done and not length
        elif kind == REPLY_TYPE_OFFSET_HOLE:
            fits = reply.command == CMD_READ and length == HOLE_BODY.size
        elif kind == REPLY_TYPE_BLOCK_STATUS:
            count, odd = divmod(length - U32.size, EXTENT.size)
            fits = reply.command == CMD_BLOCK_STATUS and not odd and 0 < count <= EXTENTS_TAKEN_MAX
        else:
            fits = False
        if not fits:
            raise _violation(reply, f"a chunk of type {kind} with {length} bytes and{'' if done else ' not'} done")

    def _other_chunk(self, reply: Reply, done: bool, length: int, replies: list[Reply]) -> bool:
        header_start, body_start = self._start, self._start + CHUNK.size
        after = body_start + length
        if after > self._end:
            if length > WAITING_MAX_BYTES:
                self._body = body = bytearray(CHUNK.size + length)
                self._current, self._current_done = reply, done
                self._receive_in_place(memoryview(body), header_start)
            return False
        self._start = after
        self._take_chunk(reply, self._view[header_start:after])
        if done:
            self._finish(reply, replies)
        return True

    def _end_of_body(self, replies: list[Reply]) -> None:
        """What was received in place is complete."""
        reply, body = self._current, self._body
        assert reply is not None
        self._current = self._body = None
        if body is not None:
            self._take_chunk(reply, memoryview(body))
        if self._current_done:
            self._finish(reply, replies)

    def _take_chunk(self, reply: Reply, chunk: memoryview) -> None:
        """Works in a whole chunk that is not read data; `_check_chunk` has passed it."""
        kind = CHUNK.unpack_from(chunk)[2]
        body = chunk[CHUNK.size :]
        if kind & REPLY_TYPE_ERROR_BIT:
            self._error_chunk(reply, kind, body)
        elif kind == REPLY_TYPE_OFFSET_HOLE:
            offset, size = HOLE_BODY.unpack(body)
            _cover(reply, offset, size)
            _room(reply)
        elif kind == REPLY_TYPE_BLOCK_STATUS:
            self._status_chunk(reply, body)

    def _error_chunk(self, reply: Reply, kind: int, body: memoryview) -> None:
        error, length = ERROR_BODY.unpack_from(body)
        rest = body[ERROR_BODY.size :]
        if not error or length > len(rest):
            raise _violation(reply, f"an error chunk with error {error} and a message of {length} in {len(rest)} bytes")
        if kind == REPLY_TYPE_ERROR_OFFSET:
            if len(rest) != length + OFFSET.size:
                raise _violation(reply, f"an error chunk with {len(rest) - length} bytes for its offset")
            (offset,) = OFFSET.unpack_from(rest, length)
            if not reply.offset <= offset < reply.offset + reply.length:
                raise _violation(reply, f"an error at {offset}")
        if not reply.error:
            _set_error(reply, error, rest[: min(length, STRING_MAX_BYTES)].tobytes().decode(errors="replace"))

    def _status_chunk(self, reply: Reply, body: memoryview) -> None:
        context_id = U32.unpack_from(body)[0]
        context = self._context_names.get(context_id)
        if context is None or context in reply.extents:
            raise _violation(reply, f"status for metadata context ID {context_id}, unknown or for the second time")
        extents: list[tuple[int, int]] = []
        left = reply.length
        one = reply.flags & CMD_FLAG_REQ_ONE
        for length, flags in EXTENT.iter_unpack(body[U32.size :]):
            if not length or not left or (one and (extents or length > left)):
                raise _violation(reply, f"an extent of {length} bytes where {left} are left to describe")
            taken = min(length, left)
            extents.append((taken, flags))
            left -= taken
        reply.extents[context] = extents
        reply.chunks += 1

    def _finish(self, reply: Reply, replies: list[Reply]) -> None:
        if reply.error:
            reply.data = bytearray()
            reply.extents = {}
        elif reply.command == CMD_READ:
            if reply.pieces != [(reply.offset, reply.offset + reply.length)]:
                raise _violation(reply, "success without all of its bytes")
        elif reply.command == CMD_BLOCK_STATUS and len(reply.extents) != len(self._context_names):
            raise _violation(reply, f"success with status for {sorted(reply.extents)}, not {sorted(self.contexts)}")
        del self._flying[reply.cookie]
        replies.append(reply)


def _violation(reply: Reply, what: str) -> RemoteProtocolError:
    command = COMMAND_NAMES[reply.command]
    return RemoteProtocolError(f"the server answers {command} of {reply.length} bytes at {reply.offset} with {what}")


def _set_error(reply: Reply, error: int, message: str) -> None:
    reply.error = ERRNO_OF_ERROR.get(error, errno.EINVAL)
    reply.message = message


def _room(reply: Reply) -> bytearray:
    """The read's buffer, which starts as zeroes."""
    if not reply.data:
        reply.data = bytearray(reply.length)
    return reply.data


def _cover(reply: Reply, start: int, size: int) -> None:
    """Notes that a content chunk has come for a run of a read. Raises RemoteProtocolError if it must not have."""
    end = start + size
    if not size or start < reply.offset or end > reply.offset + reply.length:
        raise _violation(reply, f"{size} bytes at {start}")
    reply.chunks += 1
    pieces = reply.pieces
    if not pieces:
        pieces.append((start, end))
        return
    if reply.flags & CMD_FLAG_DF:
        raise _violation(reply, "a second content chunk, though it must not be fragmented")
    index = bisect_left(pieces, (start, end))
    before = pieces[index - 1] if index else (-1, -1)
    behind = pieces[index] if index < len(pieces) else (end + 1, end + 1)
    if before[1] > start or behind[0] < end:
        raise _violation(reply, f"{size} bytes at {start}, which overlap others")
    first, last = index, index
    if before[1] == start:
        first, start = index - 1, before[0]
    if behind[0] == end:
        last, end = index + 1, behind[1]
    pieces[first:last] = [(start, end)]
    if len(pieces) > _PIECES_MAX:
        raise _violation(reply, f"more than {_PIECES_MAX} separate pieces")
