"""QMP on the wire: a stream of JSON documents, and the messages in it. Both roles; bytes in, values out.

Documents follow each other with or without white space between them, and may span lines: clients exist that send no
newline at all. So the stream is cut by counting brackets, not at line ends.

Limits, all checked before a document is parsed: its bytes, its depth. A stream that breaks them cannot be followed any
further and must be closed. What is not valid JSON inside balanced brackets is an error for that document alone.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from fleecer.errors import FleecerError, NotFound, RemoteProtocolError, told
from fleecer.units import MiB

DOCUMENT_BYTES_MAX = 1 * MiB
DEPTH_MAX = 64

_STRUCTURAL = re.compile(rb'["{}\[\]]')
_STRING_END = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class QmpError(FleecerError):
    """An error a QMP peer reported, or is to be told: its class name in the protocol and its text."""

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind


class Splitter:
    """Cuts a byte stream into JSON documents (objects; anything else at the top level breaks the stream)."""

    def __init__(self, *, document_bytes_max: int = DOCUMENT_BYTES_MAX, depth_max: int = DEPTH_MAX) -> None:
        self._document_bytes_max = document_bytes_max
        self._depth_max = depth_max
        self._pending = bytearray()
        self._scanned = 0
        self._depth = 0

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """The documents completed by `data`. Raises RemoteProtocolError where the stream cannot be followed."""
        self._pending += data
        documents: list[bytes] = []
        while (end := self._scan()) is not None:
            self._check_length(end)
            documents.append(bytes(self._pending[:end]))
            del self._pending[:end]
            self._scanned = 0
        self._check_length(len(self._pending))
        return documents

    def _check_length(self, length: int) -> None:
        if length > self._document_bytes_max:
            raise RemoteProtocolError(f"QMP: a message is longer than {self._document_bytes_max} bytes")

    def _scan(self) -> int | None:
        pending = self._pending
        if not self._depth:
            del pending[: len(pending) - len(pending.lstrip(b" \t\r\n"))]
            if pending and pending[0] != ord("{"):
                raise RemoteProtocolError("QMP: a message must be a JSON object")
        while (found := _STRUCTURAL.search(pending, self._scanned)) is not None:
            at = found.start()
            character = pending[at]
            if character == ord('"'):
                end = _STRING_END.match(pending, at + 1)
                if end is None:
                    self._scanned = at  # the string has not ended yet; look at it again with more of it
                    return None
                self._scanned = end.end()
                continue
            self._scanned = at + 1
            if character in b"{[":
                self._depth += 1
                if self._depth > self._depth_max:
                    raise RemoteProtocolError(f"QMP: JSON deeper than {self._depth_max} levels")
            else:
                self._depth -= 1
                if not self._depth:
                    return self._scanned
        self._scanned = len(pending)
        return None


class Command(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends."""

    execute: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    id: object = msgspec.UNSET


_command_decoder = msgspec.json.Decoder(Command)
_encoder = msgspec.json.Encoder()


def decode_command(document: bytes) -> Command:
    """The command in a document. Raises QmpError (GenericError) with what is wrong in it."""
    try:
        return _command_decoder.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise QmpError("GenericError", f"QMP: {error}") from None


def identifier(document: bytes) -> object:
    """The `id` of a document that is no valid command, as far as it can be read; UNSET otherwise."""
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


def decode_reply(document: bytes) -> Return | Event | dict[str, Any]:
    """A server's message: a Return, an Event, or the greeting as it is. Raises RemoteProtocolError."""
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
