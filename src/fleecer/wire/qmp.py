"""QMP on the wire: a stream of JSON documents, and the messages in it. Both roles; bytes in, values out.

Documents follow each other with or without white space between them, and may span lines: clients exist that send no
newline at all. So the stream is cut by counting brackets, not at line ends.

What cannot be a document is told as an error in its place, as QEMU does, and the stream goes on: behind the end of the
line, or behind the bracket that closes what was open, whichever comes first. Byte 0xff begins anew from any state, as
in QEMU; JSON has no such byte.

Limits: a document's bytes, and its depth. What exceeds them is such an error too, told as soon as it is seen, and
takes no memory.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from fleecer.errors import FleecerError, NotFound, RemoteProtocolError, quoted, told
from fleecer.units import MiB

DOCUMENT_BYTES_MAX = 1 * MiB
DEPTH_MAX = 64

WORD_BYTES_MAX = 64

_NOT_WHITE = re.compile(rb"[^ \t\r\n]")
_WORD = re.compile(rb"[0-9A-Za-z+.-]{1,%d}" % (WORD_BYTES_MAX + 1))
# What to look for next, outside and inside of strings, and in what is being skipped.
_OUTSIDE = re.compile(rb"[\"{}\[\]]|[^ \t\r\n:,0-9A-Za-z+.-]")
_STRING = re.compile(rb"[\"\r\n\xff]|\\[\"\\]")
_SKIPPED = re.compile(rb"[\"{}\[\]\r\n\xff]")


class QmpError(FleecerError):
    """An error a QMP peer reported, or is to be told: its class name in the protocol and its text."""

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind


Document = bytes | QmpError
"""One piece of a stream: what may be JSON, or what is wrong with something that cannot be."""


class Splitter:
    """Cuts a byte stream into documents: brackets that balance, or else a string or a word, which no message is."""

    def __init__(self, *, document_bytes_max: int = DOCUMENT_BYTES_MAX, depth_max: int = DEPTH_MAX) -> None:
        self._document_bytes_max = document_bytes_max
        self._depth_max = depth_max
        self._pending = bytearray()  # begins where a document does, once its white space is gone
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._skipping = False

    def feed(self, data: bytes | bytearray | memoryview) -> list[Document]:
        """What is completed by `data`, in order. Never fails, and keeps no more than a document may be long."""
        self._pending += data
        documents: list[Document] = []
        while self._step(documents):
            pass
        if len(self._pending) > self._document_bytes_max and not self._skipping:
            self._skip(documents, f"a message is longer than {self._document_bytes_max} bytes")
        if self._skipping:
            del self._pending[: self._scanned]
            self._scanned = 0
        return documents

    def _step(self, documents: list[Document]) -> bool:
        """Goes on to the next byte that matters. Returns False where that has not come yet."""
        pending = self._pending
        if not self._scanned and not self._skipping:
            first = _NOT_WHITE.search(pending)
            del pending[: first.start() if first is not None else len(pending)]
            if not pending:
                return False
            if pending[0] not in b'{["':
                return self._met_no_document(documents)
        look_for = _STRING if self._in_string else _SKIPPED if self._skipping else _OUTSIDE
        found = look_for.search(pending, self._scanned)
        if found is None:
            # A backslash at the end belongs to what comes next.
            half = self._in_string and pending.endswith(b"\\") and self._scanned < len(pending)
            self._scanned = len(pending) - half
            return False
        self._scanned = found.end()
        if self._in_string:
            self._met_in_string(documents, found[0])
        else:
            self._met(documents, found[0])
        return True

    def _met_no_document(self, documents: list[Document]) -> bool:
        """At the top level, a word goes on until something follows it; anything else is stray."""
        word = _WORD.match(self._pending)
        if word is None:
            self._skip(documents, f"JSON parse error, stray byte 0x{self._pending[0]:02x}")
        elif word.end() > WORD_BYTES_MAX:
            self._skip(documents, f"JSON parse error, a word of more than {WORD_BYTES_MAX} letters")
        elif word.end() == len(self._pending):
            return False
        else:
            self._scanned = word.end()
            self._complete(documents)
        return True

    def _met_in_string(self, documents: list[Document], what: bytes) -> None:
        if what == b'"':
            self._in_string = False
            if not self._depth and not self._skipping:
                self._complete(documents)
        elif len(what) == 1:  # the end of a line, or 0xff: no string has such
            if not self._skipping:
                documents.append(_not_json("a string is not closed where its line ends"))
            self._begin_anew()

    def _met(self, documents: list[Document], what: bytes) -> None:
        if what == b'"':
            self._in_string = True
        elif what in b"{[":
            self._depth += 1
            if self._depth > self._depth_max and not self._skipping:
                self._skip(documents, f"JSON deeper than {self._depth_max} levels")
        elif what in b"}]":
            self._met_closing(documents)
        elif not self._skipping:
            self._scanned -= 1  # to be looked at again: it may be 0xff
            self._skip(documents, f"JSON parse error, stray byte 0x{what[0]:02x}")
        elif what in b"\r\n\xff":
            self._begin_anew()

    def _met_closing(self, documents: list[Document]) -> None:
        if not self._depth:
            return  # stray, in what is being skipped
        self._depth -= 1
        if self._depth:
            return
        if self._skipping:
            self._begin_anew()
        else:
            self._complete(documents)

    def _complete(self, documents: list[Document]) -> None:
        if self._scanned > self._document_bytes_max:
            documents.append(_not_json(f"a message is longer than {self._document_bytes_max} bytes"))
        else:
            documents.append(bytes(self._pending[: self._scanned]))
        self._begin_anew()

    def _skip(self, documents: list[Document], why: str) -> None:
        documents.append(_not_json(why))
        self._skipping = True

    def _begin_anew(self) -> None:
        """A document, or what was skipped, ends at `_scanned`."""
        del self._pending[: self._scanned]
        self._scanned = self._depth = 0
        self._in_string = self._skipping = False


def _not_json(why: str) -> QmpError:
    return QmpError("GenericError", f"QMP: {why}")


class Command(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends."""

    execute: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    id: object = msgspec.UNSET


_command_decoder = msgspec.json.Decoder(Command)
_encoder = msgspec.json.Encoder()


_ENVELOPE = ("execute", "arguments", "id")


def decode_command(document: Document) -> Command:
    """The command in a document. Raises QmpError (GenericError) with what is wrong in it."""
    if isinstance(document, QmpError):
        raise document
    try:
        command = _command_decoder.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise QmpError("GenericError", _what_is_wrong(document, error)) from None
    if not bytes(command.arguments).startswith(b"{"):
        raise QmpError("GenericError", "QMP input member 'arguments' must be an object")
    return command


def _what_is_wrong(document: bytes, error: Exception) -> str:
    """Why a document is no command, in QEMU's words where it has any."""
    try:
        found = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as unreadable:
        return f"JSON parse error, {unreadable}"
    if not isinstance(found, dict):
        return "QMP input must be a JSON object"
    if unknown := next((name for name in found if name not in _ENVELOPE), None):
        return f"QMP input member {quoted(unknown)} is unexpected"
    if "execute" not in found:
        return "QMP input lacks member 'execute'"
    if not isinstance(found["execute"], str):
        return "QMP input member 'execute' must be a string"
    return f"QMP: {error}"


def identifier(document: Document) -> object:
    """The `id` of a document that is no valid command, as far as it can be read; UNSET otherwise."""
    if isinstance(document, QmpError):
        return msgspec.UNSET
    try:
        found = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return msgspec.UNSET
    return found.get("id", msgspec.UNSET) if isinstance(found, dict) else msgspec.UNSET


def encode(message: object) -> bytes:
    """One document and a line end."""
    return _encoder.encode(message) + b"\r\n"


def greeting(version: dict[str, Any]) -> dict[str, Any]:
    """What a server says first."""
    return {"QMP": {"version": version, "capabilities": []}}


def success(value: object, command_id: object = msgspec.UNSET) -> dict[str, Any]:
    """A command's return."""
    return _with_id({"return": value}, command_id)


def failure(error: BaseException, command_id: object = msgspec.UNSET) -> dict[str, Any]:
    """A command's error. What is not there is DeviceNotFound, as in QEMU; a QmpError keeps its class."""
    if isinstance(error, QmpError):
        kind = error.kind
    else:
        kind = "DeviceNotFound" if isinstance(error, NotFound) else "GenericError"
    return _with_id({"error": {"class": kind, "desc": told(error)}}, command_id)


def event(name: str, data: dict[str, Any], at_s: float) -> dict[str, Any]:
    """An event of the moment `at_s`, in seconds since 1970."""
    seconds, rest = divmod(at_s, 1)
    stamp = {"seconds": int(seconds), "microseconds": int(rest * 1_000_000)}
    return {"event": name, "data": data, "timestamp": stamp}


def _with_id(message: dict[str, Any], command_id: object) -> dict[str, Any]:
    if command_id is not msgspec.UNSET:
        message["id"] = command_id
    return message


class Return(msgspec.Struct):
    """What a server answered: a value, or an error."""

    value: Any = None
    error: QmpError | None = None
    id: object = msgspec.UNSET


class Event(msgspec.Struct):
    """What a server announced."""

    event: str
    data: dict[str, Any]
    timestamp: dict[str, int]


def decode_reply(document: Document) -> Return | Event | dict[str, Any]:
    """A server's message: a Return, an Event, or the greeting as it is. Raises RemoteProtocolError."""
    if isinstance(document, QmpError):
        raise RemoteProtocolError(f"the server sent what is no message: {document}")
    try:
        message = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RemoteProtocolError(f"QMP: the server sent what is no JSON: {error}") from None
    match message:
        case {"return": value}:
            return Return(value=value, id=message.get("id", msgspec.UNSET))
        case {"error": {"class": str(kind), "desc": str(description)}}:
            return Return(error=QmpError(kind, description), id=message.get("id", msgspec.UNSET))
        case {"event": str(name)}:
            return Event(name, message.get("data") or {}, message.get("timestamp") or {})
        case {"QMP": dict()}:
            return message  # type: ignore[no-any-return]
    raise RemoteProtocolError("QMP: the server sent a message that is no return, error, event or greeting")
