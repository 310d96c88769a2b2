"""The server's half of the handshake: greeting and options, up to the choice of an export.

The protocol's section is "Fixed newstyle negotiation"; the options stand under "Option types".

Invariants:
- An option that is unknown, wrong or refused gets an error reply and the session goes on; only what the protocol
  says to drop, or what exceeds a limit, ends it.
- `Catalogue.enter` is called only when every other check has passed, and the acceptance follows at once.
- Selected metadata contexts belong to the export name they were selected for; each SET_META_CONTEXT forgets the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from fleecer.errors import RemoteProtocolError, quoted
from fleecer.wire.nbd.codec import Codec, Script
from fleecer.wire.nbd.constants import (
    EXPORT_NAME_PADDING_BYTES,
    EXPORT_NAME_REPLY,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_BODY,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_BODY,
    INFO_NAME,
    INIT_MAGIC,
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
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    OPTIONS_MAX,
    OPTIONS_TOTAL_MAX_BYTES,
    PAYLOAD_MAX_BYTES,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_SHUTDOWN,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    STRING_MAX_BYTES,
    U16,
    U32,
)
from fleecer.wire.nbd.messages import Catalogue, ExportInfo, decode_string, encode_text


class _InvalidOptionError(Exception):
    """The option's data is malformed; the client is told so and may try again."""


class ServerHandshake(Codec):
    """Negotiates, then leaves `export`, `structured` and `contexts` for the transmission phase.

    `refuse_options`: set it when the server shuts down; every option but ABORT is then refused for that reason.
    """

    __slots__ = (
        "_block_sizes_known",
        "_catalogue",
        "_context_ids",
        "_no_zeroes",
        "_option_max",
        "_options_max",
        "_options_total_max",
        "_payload_max",
        "_selected",
        "_selected_for",
        "contexts",
        "export",
        "refuse_options",
        "structured",
    )

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        payload_max: int = PAYLOAD_MAX_BYTES,
        option_max: int = OPTION_MAX_BYTES,
        options_max: int = OPTIONS_MAX,
        options_total_max: int = OPTIONS_TOTAL_MAX_BYTES,
    ) -> None:
        super().__init__()
        self.export: ExportInfo | None = None
        self.structured = False
        self.contexts: tuple[str, ...] = ()
        self.refuse_options = False
        self._catalogue = catalogue
        self._payload_max = payload_max
        self._option_max = option_max
        self._options_max = options_max
        self._options_total_max = options_total_max
        self._no_zeroes = False
        self._block_sizes_known = False  # whether the client asked for them, and so must keep to them
        self._selected: dict[str, int] = {}  # metadata contexts and their IDs, for the export named next
        self._selected_for: str | None = None
        self._context_ids: dict[str, int] = {}
        self.outgoing.append(GREETING.pack(INIT_MAGIC, OPTION_MAGIC, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))

    def _handshake(self) -> Script[None]:
        """Runs until an export was entered, or the session is `finished`."""
        flags = int.from_bytes((yield from self._take(4)), "big")
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise RemoteProtocolError(f"client flags 0x{flags:x} contain unknown bits")
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        options = total = 0
        while self.export is None and not self.finished:
            magic, option, length = OPTION.unpack((yield from self._take(OPTION.size)))
            if magic != OPTION_MAGIC:
                raise RemoteProtocolError(f"option magic 0x{magic:x} is not 0x{OPTION_MAGIC:x}")
            if length > self._option_max:
                raise RemoteProtocolError(f"option {option} has {length} bytes, the limit is {self._option_max}")
            options += 1
            total += length
            if options > self._options_max:
                raise RemoteProtocolError(f"more than {self._options_max} options")
            if total > self._options_total_max:
                raise RemoteProtocolError(f"options have more than {self._options_total_max} bytes together")
            self._answer(option, (yield from self._take(length)))

    def _answer(self, option: int, data: bytes) -> None:
        if option == OPT_ABORT:
            self._reply(option, REP_ACK)
            self.finished = True
        elif option == OPT_EXPORT_NAME:
            self._export_name(data)
        elif self.refuse_options:
            self._refuse(option, REP_ERR_SHUTDOWN, "the server is shutting down")
        elif option not in self._HANDLERS:
            self._refuse(option, REP_ERR_UNSUP, f"option {option} is not supported")
        else:
            try:
                self._HANDLERS[option](self, option, data)
            except _InvalidOptionError as error:
                self._refuse(option, REP_ERR_INVALID, str(error))

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.outgoing.append(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _refuse(self, option: int, kind: int, text: str) -> None:
        self._reply(option, kind, encode_text(text))

    def _export_name(self, data: bytes) -> None:
        # This option knows no error reply: what cannot be granted ends the session.
        name = None if self.refuse_options else decode_string(data)
        export = None if name is None else self._catalogue.enter(name)
        if name is None or export is None:
            self.finished = True
            return
        padding = b"" if self._no_zeroes else bytes(EXPORT_NAME_PADDING_BYTES)
        flags = export.transmission_flags(self.structured)
        self.outgoing.append(EXPORT_NAME_REPLY.pack(export.size, flags) + padding)
        self._accept(name, export, block_sizes_known=False)

    def _list(self, option: int, data: bytes) -> None:
        if data:
            raise _InvalidOptionError(f"LIST takes no data, got {len(data)} bytes")
        for name, description in self._catalogue.names():
            encoded = name.encode()
            self._reply(option, REP_SERVER, U32.pack(len(encoded)) + encoded + encode_text(description))
        self._reply(option, REP_ACK)

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            raise _InvalidOptionError(f"STRUCTURED_REPLY takes no data, got {len(data)} bytes")
        self.structured = True
        self._reply(option, REP_ACK)

    def _info_or_go(self, option: int, data: bytes) -> None:
        parser = _Parser(data)
        name = parser.string("export name")
        asked = {parser.u16() for _ in range(parser.u16())}
        parser.end()
        export = self._catalogue.enter(name) if option == OPT_GO else self._catalogue.find(name)
        if export is None:
            self._refuse(option, REP_ERR_UNKNOWN, f"export {quoted(name)} is not available")
            return
        flags = export.transmission_flags(self.structured)
        self._reply(option, REP_INFO, INFO_EXPORT_BODY.pack(INFO_EXPORT, export.size, flags))
        if INFO_NAME in asked:
            self._reply(option, REP_INFO, U16.pack(INFO_NAME) + export.name.encode())
        if INFO_DESCRIPTION in asked and export.description:
            self._reply(option, REP_INFO, U16.pack(INFO_DESCRIPTION) + export.description.encode())
        if INFO_BLOCK_SIZE in asked:
            largest = min(export.block_size_max, self._payload_max)
            smallest, preferred = export.block_size_min, export.block_size_preferred
            self._reply(option, REP_INFO, INFO_BLOCK_SIZE_BODY.pack(INFO_BLOCK_SIZE, smallest, preferred, largest))
        self._reply(option, REP_ACK)
        if option == OPT_GO:
            self._accept(name, export, block_sizes_known=INFO_BLOCK_SIZE in asked)

    def _meta_context(self, option: int, data: bytes) -> None:
        selecting = option == OPT_SET_META_CONTEXT
        if selecting:
            self._selected, self._selected_for = {}, None
            if not self.structured:
                raise _InvalidOptionError("SET_META_CONTEXT needs STRUCTURED_REPLY first")
        parser = _Parser(data)
        name = parser.string("export name")
        queries = [parser.string("metadata query") for _ in range(parser.u32())]
        parser.end()
        export = self._catalogue.find(name)
        if export is None:
            self._refuse(option, REP_ERR_UNKNOWN, f"export {quoted(name)} is not available")
            return
        if selecting:
            found = {context: index for index, context in enumerate(export.contexts) if context in queries}
            self._selected, self._selected_for = found, name
        else:
            found = dict.fromkeys(_listed(export.contexts, queries), 0)
        for context, context_id in found.items():
            self._reply(option, REP_META_CONTEXT, U32.pack(context_id) + context.encode())
        self._reply(option, REP_ACK)

    def _accept(self, name: str, export: ExportInfo, *, block_sizes_known: bool) -> None:
        self.export = export
        self._block_sizes_known = block_sizes_known
        if self._selected_for == name:
            self._context_ids = {c: i for c, i in self._selected.items() if c in export.contexts}
            self.contexts = tuple(self._context_ids)

    _HANDLERS: ClassVar[dict[int, Callable[[ServerHandshake, int, bytes], None]]] = {
        OPT_LIST: _list,
        OPT_INFO: _info_or_go,
        OPT_GO: _info_or_go,
        OPT_STRUCTURED_REPLY: _structured_reply,
        OPT_LIST_META_CONTEXT: _meta_context,
        OPT_SET_META_CONTEXT: _meta_context,
    }


def _listed(contexts: Iterable[str], queries: list[str]) -> list[str]:
    """What LIST_META_CONTEXT shows: all without a query, else exact names and, for a query that ends in ":", a room."""
    rooms = tuple(query for query in queries if query.endswith(":"))
    return [context for context in contexts if not queries or context in queries or context.startswith(rooms)]


class _Parser:
    """Reads an option's data from its start to its end; raises `_InvalidOptionError` where it does not fit."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _bytes(self, count: int) -> bytes:
        at = self._at
        if count > len(self._data) - at:
            raise _InvalidOptionError(f"the option's data ends after {len(self._data)} bytes, in the middle of a field")
        self._at = at + count
        return self._data[at : at + count]

    def u16(self) -> int:
        return int.from_bytes(self._bytes(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self._bytes(4), "big")

    def string(self, what: str) -> str:
        text = decode_string(self._bytes(self.u32()))
        if text is None:
            raise _InvalidOptionError(f"the {what} is no NBD string (UTF-8, no NUL, at most {STRING_MAX_BYTES} bytes)")
        return text

    def end(self) -> None:
        if self._at != len(self._data):
            raise _InvalidOptionError(f"the option's data has {len(self._data) - self._at} bytes too many")
