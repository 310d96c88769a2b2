"""The client's half of the handshake: from the greeting to transmission, to a list of exports, or to a refusal.

It asks for structured replies, then for metadata contexts, then for the export with its block sizes; and makes do with
servers that lack any of them, down to plain newstyle with EXPORT_NAME alone.

Invariants:
- One option is in flight at a time; the next is sent after the final reply ("Fixed newstyle negotiation").
- Everything from the server is checked: magic, echo of the option, lengths before memory is taken, strings, values.
- A refusal ends the session softly, with ABORT where the server knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn

from fleecer.errors import FleecerError, RemoteProtocolError, UsageError, quoted
from fleecer.units import MiB
from fleecer.wire.nbd.codec import Codec, Script
from fleecer.wire.nbd.constants import (
    EXPORT_NAME_PADDING_BYTES,
    EXPORT_NAME_REPLY,
    FLAG_CAN_MULTI_CONN,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_TRIM,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_BODY,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_BODY,
    INFO_NAME,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION,
    OPTION_MAGIC,
    OPTION_MAX_BYTES,
    OPTION_NAMES,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_MAX_BYTES,
    REP_ACK,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_ERROR_BIT,
    REP_ERROR_MEANINGS,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    STRING_MAX_BYTES,
    U16,
    U32,
)
from fleecer.wire.nbd.messages import ExportInfo, ExportUnknown, decode_string, is_string

Mode = Literal["go", "info", "list"]

_REPLIES_MAX_BYTES = 16 * MiB
_ASKED = (INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION)


class ClientHandshake(Codec):
    """Negotiates, then leaves what was agreed for the transmission phase.

    mode "go"    enter transmission for the export: `ready`
    mode "info"  learn about the export and all its metadata contexts, then leave: `info`, `finished`
    mode "list"  learn which exports there are, then leave: `listed`, `finished`

    info         what the server said of the export, with the contexts negotiated (mode "go") or offered ("info")
    flags        its transmission flags as they came
    contexts     names of the negotiated metadata contexts
    structured   whether replies are structured
    """

    __slots__ = (
        "_context_names",
        "_export_name",
        "_mode",
        "_replies_bytes",
        "_wanted",
        "contexts",
        "flags",
        "info",
        "listed",
        "ready",
        "structured",
    )

    def __init__(self, export_name: str, contexts: Sequence[str], mode: Mode) -> None:
        super().__init__()
        for text in (export_name, *contexts):
            if not is_string(text):
                raise UsageError(f"{quoted(text)} is no NBD string (UTF-8, no NUL, at most {STRING_MAX_BYTES} bytes)")
        self.info: ExportInfo | None = None
        self.listed: list[tuple[str, str]] = []
        self.contexts: tuple[str, ...] = ()
        self.flags = 0
        self.structured = False
        self.ready = False
        self._export_name = export_name
        self._wanted = tuple(dict.fromkeys(contexts))
        self._mode = mode
        self._context_names: dict[int, str] = {}
        self._replies_bytes = 0

    def _handshake(self) -> Script[None]:
        """Runs until transmission is entered or the session is `finished`. Raises what becomes `failure`."""
        initial, style, flags = GREETING.unpack((yield from self._take(GREETING.size)))
        if initial != INIT_MAGIC:
            raise RemoteProtocolError(f"the peer is no NBD server: its greeting begins with 0x{initial:016x}")
        if style == OLDSTYLE_MAGIC:
            raise RemoteProtocolError("the server speaks the old style of negotiation only, which is not supported")
        if style != OPTION_MAGIC:
            raise RemoteProtocolError(f"the server's style of negotiation, 0x{style:016x}, is unknown")
        padded = not flags & FLAG_NO_ZEROES
        self.outgoing.append(U32.pack(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)))
        if not flags & FLAG_FIXED_NEWSTYLE:
            if self._mode != "go":
                raise RemoteProtocolError(f"the server knows no options, so there is no way to ask it for {self._mode}")
            yield from self._enter_by_name(padded)
        elif self._mode == "list":
            yield from self._list()
            self._leave()
        else:
            kind, _, _ = yield from self._ask(OPT_STRUCTURED_REPLY, b"", None)
            self.structured = kind == REP_ACK
            yield from self._choose_contexts()
            if not (yield from self._describe()):
                yield from self._enter_by_name(padded)
            if self._mode == "info":
                self._leave()

    # Options and their replies.

    def _send(self, option: int, data: bytes = b"") -> None:
        self.outgoing.append(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)

    def _leave(self) -> None:
        """Ends the session softly ("Termination of the session during option haggling")."""
        self._send(OPT_ABORT)
        self.finished = True

    def _ask(self, option: int, data: bytes, expected: int | None) -> Script[tuple[int, list[bytes], bytes]]:
        """Sends an option; returns the final reply's type, the payloads of those before it, and the final payload.

        `expected` is the type of the replies that may come before the final one.
        """
        self._send(option, data)
        payloads: list[bytes] = []
        while True:
            magic, echo, kind, length = OPTION_REPLY.unpack((yield from self._take(OPTION_REPLY.size)))
            name = OPTION_NAMES[option]
            if magic != OPTION_REPLY_MAGIC:
                raise RemoteProtocolError(f"reply to option {name}: magic 0x{magic:x} is wrong")
            if echo != option:
                raise RemoteProtocolError(f"reply to option {name}: it is for option {echo}")
            if length > OPTION_MAX_BYTES:
                raise RemoteProtocolError(f"reply to option {name}: {length} bytes, the limit is {OPTION_MAX_BYTES}")
            self._replies_bytes += length + OPTION_REPLY.size
            if self._replies_bytes > _REPLIES_MAX_BYTES:
                raise RemoteProtocolError(f"replies to options have more than {_REPLIES_MAX_BYTES} bytes together")
            payload = yield from self._take(length)
            if kind & REP_ERROR_BIT or (kind == REP_ACK and not payload):
                if kind in (REP_ERR_SHUTDOWN, REP_ERR_TLS_REQD):
                    self._refused(option, kind, payload)
                return kind, payloads, payload
            if kind != expected:
                raise RemoteProtocolError(f"reply to option {name}: type {kind} with {length} bytes is out of place")
            payloads.append(payload)

    def _refused(self, option: int, kind: int, payload: bytes) -> NoReturn:
        words = payload[:STRING_MAX_BYTES].decode(errors="replace")
        self._send(OPT_ABORT)
        if kind == REP_ERR_UNKNOWN:
            raise ExportUnknown(self._export_name, words)
        meaning = REP_ERROR_MEANINGS.get(kind, f"error {kind & ~REP_ERROR_BIT}")
        said = f": {quoted(words)}" if words else ""
        about = "" if option == OPT_LIST else f" for export {quoted(self._export_name)}"
        raise RemoteProtocolError(f"the server refused option {OPTION_NAMES[option]}{about}, {meaning}{said}")

    def _list(self) -> Script[None]:
        kind, payloads, words = yield from self._ask(OPT_LIST, b"", REP_SERVER)
        if kind != REP_ACK:
            self._refused(OPT_LIST, kind, words)
        for payload in payloads:
            length = int.from_bytes(payload[:4], "big")
            if length > len(payload) - 4:
                raise RemoteProtocolError(f"reply to option LIST: a name of {length} bytes in {len(payload)}")
            description = payload[4 + length :].decode(errors="replace")
            self.listed.append((_string(payload[4 : 4 + length], "export name"), description))

    def _choose_contexts(self) -> Script[None]:
        """Selects the wanted metadata contexts, or lists all in mode "info". A server without them is no error."""
        name = self._export_name.encode()
        queries = self._wanted if self._mode == "go" else ()
        if not self.structured or (self._mode == "go" and not queries):
            return
        option = OPT_SET_META_CONTEXT if self._mode == "go" else OPT_LIST_META_CONTEXT
        data = b"".join(U32.pack(len(query.encode())) + query.encode() for query in queries)
        data = U32.pack(len(name)) + name + U32.pack(len(queries)) + data
        kind, payloads, _ = yield from self._ask(option, data, REP_META_CONTEXT)
        if kind != REP_ACK:
            return
        names: dict[str, int] = {}
        for payload in payloads:
            context = _string(payload[4:], "metadata context")
            if len(payload) <= 4 or context in names or (queries and context not in queries):
                raise RemoteProtocolError(f"metadata context {quoted(context)} was not asked for, or comes twice")
            names[context] = int.from_bytes(payload[:4], "big")
        self.contexts = tuple(names)
        if queries:
            self._context_names = {context_id: context for context, context_id in names.items()}
            if len(self._context_names) != len(names):
                raise RemoteProtocolError(f"metadata contexts {sorted(names)} do not have different IDs")

    # The choice of the export.

    def _describe(self) -> Script[bool]:
        """INFO or GO. False if the server knows neither, and EXPORT_NAME may do."""
        option = OPT_GO if self._mode == "go" else OPT_INFO
        name = self._export_name.encode()
        data = U32.pack(len(name)) + name + U16.pack(len(_ASKED)) + b"".join(map(U16.pack, _ASKED))
        kind, payloads, words = yield from self._ask(option, data, REP_INFO)
        if kind == REP_ERR_UNSUP and option == OPT_GO:
            return False
        if kind != REP_ACK:
            self._refused(option, kind, words)
        items: dict[int, bytes] = {}
        for payload in payloads:
            if len(payload) < 2:
                raise RemoteProtocolError(f"information about the export has {len(payload)} bytes, it needs 2 at least")
            items[int.from_bytes(payload[:2], "big")] = payload
        self._set_info(items)
        return True

    def _enter_by_name(self, padded: bool) -> Script[None]:
        self._send(OPT_EXPORT_NAME, self._export_name.encode())
        size, flags = EXPORT_NAME_REPLY.unpack((yield from self._take(EXPORT_NAME_REPLY.size)))
        if padded:
            yield from self._take(EXPORT_NAME_PADDING_BYTES)
        self._set_info({INFO_EXPORT: INFO_EXPORT_BODY.pack(INFO_EXPORT, size, flags)})

    def _set_info(self, items: dict[int, bytes]) -> None:
        export = items.get(INFO_EXPORT, b"")
        if len(export) != INFO_EXPORT_BODY.size:
            raise RemoteProtocolError("the server accepted the export without telling its size and flags")
        _, size, flags = INFO_EXPORT_BODY.unpack(export)
        if not flags & FLAG_HAS_FLAGS:
            raise RemoteProtocolError(f"transmission flags 0x{flags:x} lack HAS_FLAGS")
        smallest, preferred, largest = 1, 4096, PAYLOAD_MAX_BYTES
        block_size = items.get(INFO_BLOCK_SIZE)
        if block_size is not None:
            if len(block_size) != INFO_BLOCK_SIZE_BODY.size:
                raise RemoteProtocolError(f"block size information has {len(block_size)} bytes, not 14")
            _, smallest, preferred, largest = INFO_BLOCK_SIZE_BODY.unpack(block_size)
        writable = not flags & FLAG_READ_ONLY
        try:
            self.info = ExportInfo(
                name=_string(items[INFO_NAME][2:], "export name") if INFO_NAME in items else self._export_name,
                description=_string(items.get(INFO_DESCRIPTION, b"")[2:], "description"),
                size=size,
                read_only=not writable,
                can_multi_conn=bool(flags & FLAG_CAN_MULTI_CONN),
                can_trim=writable and bool(flags & FLAG_SEND_TRIM),
                can_fast_zero=writable and bool(flags & FLAG_SEND_FAST_ZERO),
                rotational=bool(flags & FLAG_ROTATIONAL),
                block_size_min=smallest,
                block_size_preferred=preferred,
                block_size_max=largest,
                contexts=self.contexts,
            )
        except UsageError as error:
            raise RemoteProtocolError(f"the server describes the export wrongly: {error}") from error
        self.flags = flags

    def _closed_early(self) -> FleecerError:
        """Why the handshake failed when the server closed the connection in its midst."""
        return RemoteProtocolError(
            f"the server closed the connection during the handshake for export {quoted(self._export_name)}"
            " (an old server does so when it has no such export)"
        )


def _string(data: bytes, what: str) -> str:
    text = decode_string(data)
    if text is None:
        raise RemoteProtocolError(f"the server sent a {what} that is no NBD string: {quoted(repr(data[:64]))}")
    return text
