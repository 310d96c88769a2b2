"""QMP on the wire: where a document ends, what is in it, and limits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecer.errors import IoError, NotFound, RemoteProtocolError
from fleecer.wire import qmp

DOCUMENTS = [
    b"{}",
    b'{"execute":"query-status"}',
    b'{"a": "}{][\\"}", "b": ["\\\\", {"c": "\\\\\\""}]}',
    '{"grüße": "\u2028 {"}'.encode(),
    b'{\n  "spread": [\n 1, 2\t]\r\n}',
    b'{"deep": [[[[[[{}]]]]]]}',
]


def split(pieces: list[bytes], **limits: int) -> list[bytes | str]:
    """What the pieces are cut into; an error is its text."""
    splitter = qmp.Splitter(**limits)
    found = [document for piece in pieces for document in splitter.feed(piece)]
    return [str(document) if isinstance(document, qmp.QmpError) else document for document in found]


def in_pieces(stream: bytes, piece: int) -> list[bytes]:
    return [stream[at : at + piece] for at in range(0, len(stream), piece)]


@pytest.mark.parametrize("between", [b"", b"\n", b"\r\n", b" \t \r\n\n"])
@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_documents_are_found_whatever_is_between_them_and_however_they_come(between: bytes, piece: int) -> None:
    stream = between + between.join(DOCUMENTS) + between
    pieces = [stream[at : at + piece] for at in range(0, len(stream), piece)]
    assert split(pieces) == DOCUMENTS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=4), st.integers(1, 9))
def test_any_objects_in_any_pieces_come_out_as_they_went_in(objects: list[dict[str, object]], piece: int) -> None:
    for ascii_only in (True, False):
        stream = "".join(json.dumps(value, ensure_ascii=ascii_only) for value in objects).encode(errors="surrogatepass")
        found = split([stream[at : at + piece] for at in range(0, len(stream), piece)])
        texts = [document.decode(errors="surrogatepass") for document in found if isinstance(document, bytes)]
        assert [json.loads(text) for text in texts] == objects
        assert len(texts) == len(found)


NEXT = b'{"execute":"x"}'


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("garbage", "cut"),
    [
        # Any JSON value is one document, whatever follows it; `decode_command` has words for it.
        (b"[1, [2]]", [b"[1, [2]]"]),
        (b'"a }{ \\" string"', [b'"a }{ \\" string"']),
        (b"null ", [b"null"]),
        (b"-1.5e+3 true\n", [b"-1.5e+3", b"true"]),
        (b'{"a": ]', [b'{"a": ]']),
        # What cannot be JSON is skipped up to the end of its line...
        (b"}{]\n", ["QMP: JSON parse error, stray byte 0x7d"]),
        (b": nothing\n", ["QMP: JSON parse error, stray byte 0x3a"]),
        (b"\x00\x01\x80 binary\r\n", ["QMP: JSON parse error, stray byte 0x00"]),
        (b"GET / HTTP/1.1\r\n", [b"GET", "QMP: JSON parse error, stray byte 0x2f"]),
        (b'{"execute": "half a li\n', ["QMP: a string is not closed where its line ends"]),
        (b'"half\n', ["QMP: a string is not closed where its line ends"]),
        (b"x" * 1000 + b"\n", ["QMP: JSON parse error, a word of more than 64 letters"]),
        # ... or to where its brackets close...
        (b'{"a": $, "b": {"}": ["]"]}}', ["QMP: JSON parse error, stray byte 0x24"]),
        # ... or to byte 0xff, which begins anew from wherever it is met.
        (b"\xff", ["QMP: JSON parse error, stray byte 0xff"]),
        (b'{"a": [{"execute":\xff', ["QMP: JSON parse error, stray byte 0xff"]),
        (b'{"a": "text\xff', ["QMP: a string is not closed where its line ends"]),
        (b"$ { \xff", ["QMP: JSON parse error, stray byte 0x24"]),
    ],
)
def test_what_is_no_document_is_told_once_and_the_next_is_found(
    garbage: bytes, cut: list[bytes | str], piece: int
) -> None:
    assert split(in_pieces(NEXT + garbage + NEXT, piece)) == [NEXT, *cut, NEXT]


def test_what_is_balanced_but_no_json_is_one_document() -> None:
    assert split([b'{"a": ]{}']) == [b'{"a": ]', b"{}"]


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_documents_are_limited_in_bytes(piece: int) -> None:
    document = b'{"a": "0123456789"}'
    assert split(in_pieces(document * 3, piece), document_bytes_max=len(document)) == [document] * 3
    cut = split(in_pieces(document + NEXT, piece), document_bytes_max=len(document) - 1)
    assert cut == ["QMP: a message is longer than 18 bytes", NEXT]
    for end in (b'"}', b'\\"" }'):
        cut = split(in_pieces(b'{"a": "' + b"x" * 1000 + end + NEXT, piece), document_bytes_max=50)
        assert cut == ["QMP: a message is longer than 50 bytes", NEXT]


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_documents_are_limited_in_depth(piece: int) -> None:
    deep = b'{"a":' + b"[" * 3 + b"]" * 3 + b"}"
    assert split(in_pieces(deep, piece), depth_max=4) == [deep]
    assert split(in_pieces(deep + NEXT, piece), depth_max=3) == ["QMP: JSON deeper than 3 levels", NEXT]
    assert split(in_pieces(b"[" * 1000 + b"\n" + NEXT, piece), depth_max=3) == ["QMP: JSON deeper than 3 levels", NEXT]


def test_an_error_is_told_before_what_is_skipped_has_ended() -> None:
    for beginning in (b"[" * 100_000, b'{"a": $', b"]", b'{"' + b"x" * (qmp.DOCUMENT_BYTES_MAX + 1)):
        assert len(split([beginning])) == 1


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_after_any_bytes_a_stream_can_be_begun_anew(garbage: bytes, piece: int) -> None:
    cut = split(in_pieces(garbage + b"\xff" + NEXT, piece))
    assert cut[-1] == NEXT
    assert cut == split([garbage + b"\xff" + NEXT]), "the pieces in which it comes must not matter"


def test_what_is_skipped_takes_no_memory() -> None:
    splitter = qmp.Splitter(document_bytes_max=100)
    for beginning in (b'{"a": "', b'{"a": [[', b"$"):
        errors = [error for _ in range(1000) for error in splitter.feed(beginning + b"x" * 100)]
        assert len(errors) == 1
        assert len(splitter._pending) <= 1
        splitter.feed(b"\n")


def test_white_space_without_end_takes_no_memory() -> None:
    splitter = qmp.Splitter(document_bytes_max=100)
    for _ in range(1000):
        assert splitter.feed(b" \n" * 100) == []


# Commands.


def test_a_command_is_its_name_arguments_and_id() -> None:
    command = qmp.decode_command(b'{"execute": "stop", "arguments": {"a": 1}, "id": [1, "x"]}')
    assert (command.execute, bytes(command.arguments), command.id) == ("stop", b'{"a": 1}', [1, "x"])
    command = qmp.decode_command(b'{"execute": "stop"}')
    assert bytes(command.arguments) == b"{}"
    assert qmp.success({}, command.id) == {"return": {}}
    assert qmp.success({}, qmp.decode_command(b'{"execute": "stop", "id": null}').id) == {"return": {}, "id": None}


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (b"{]", "JSON parse error, JSON is malformed"),
        (b"nope", "JSON parse error, JSON is malformed"),
        (b"{" * 50 + b"}" * 50, "JSON parse error, JSON is malformed"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "JSON parse error, maximum recursion depth exceeded"),
        (b'{"execute": "\x80"}', "JSON parse error, 'utf-8' codec"),
        (b"[1]", "QMP input must be a JSON object"),
        (b'"x"', "QMP input must be a JSON object"),
        (b"null", "QMP input must be a JSON object"),
        (b'{"execute": 7}', "QMP input member 'execute' must be a string"),
        (b'{"execute": null}', "QMP input member 'execute' must be a string"),
        (b'{"arguments": {}}', "QMP input lacks member 'execute'"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute": "x", "exec-oob": "y"}', "QMP input member 'exec-oob' is unexpected"),
        (b'{"execute": "x", "\\u0007": "y"}', "QMP input member '\\x07' is unexpected"),
        (b'{"execute": "x", "arguments": [1]}', "QMP input member 'arguments' must be an object"),
        (b'{"execute": "x", "arguments":  null }', "QMP input member 'arguments' must be an object"),
    ],
)
def test_what_is_no_command_is_told_with_the_member_at_fault(document: bytes, told: str) -> None:
    with pytest.raises(qmp.QmpError) as caught:
        qmp.decode_command(document)
    assert caught.value.kind == "GenericError"
    assert str(caught.value).startswith(told)


def test_the_id_of_what_is_no_command_is_told_where_there_is_one() -> None:
    error = qmp.QmpError("GenericError", "no")
    assert "id" not in qmp.failure(error, qmp.identifier(b"{]"))
    assert "id" not in qmp.failure(error, qmp.identifier(b'{"x": 1}'))
    assert qmp.failure(error, qmp.identifier(b'{"x": 1, "id": 5}'))["id"] == 5
    assert qmp.failure(error, qmp.identifier(b'{"execute": [], "id": null}'))["id"] is None
    (stray,) = qmp.Splitter().feed(b"\xff")
    assert "id" not in qmp.failure(error, qmp.identifier(stray))


def test_errors_have_a_class_and_one_line() -> None:
    assert qmp.failure(NotFound("node", "x")) == {
        "error": {"class": "DeviceNotFound", "desc": "node 'x' does not exist"}
    }
    assert qmp.failure(qmp.QmpError("CommandNotFound", "no"))["error"]["class"] == "CommandNotFound"
    told = qmp.failure(IoError(5, "a\nb", "read"))["error"]
    assert told == {"class": "GenericError", "desc": "read on 'a\\nb': Input/output error"}
    assert qmp.failure(ValueError("two\nlines"))["error"]["desc"] == "two lines"


def test_a_server_message_is_read_back_as_what_it_was() -> None:
    reply = qmp.decode_reply(qmp.encode(qmp.success([1, {"a": None}], "id7")))
    assert isinstance(reply, qmp.Return)
    assert (reply.value, reply.error, reply.id) == ([1, {"a": None}], None, "id7")
    reply = qmp.decode_reply(qmp.encode(qmp.failure(NotFound("node", "x"), 3)))
    assert isinstance(reply, qmp.Return)
    assert reply.error is not None
    assert (reply.error.kind, str(reply.error), reply.id) == ("DeviceNotFound", "node 'x' does not exist", 3)
    event = qmp.decode_reply(qmp.encode(qmp.event("STOP", {"why": "x"}, 12.25)))
    assert isinstance(event, qmp.Event)
    assert (event.event, event.data, event.timestamp) == ("STOP", {"why": "x"}, {"seconds": 12, "microseconds": 250000})
    greeting = qmp.greeting({"qemu": {}})
    assert qmp.decode_reply(qmp.encode(greeting)) == greeting


@pytest.mark.parametrize("document", [b"{]", b"{}", b'{"error": "text"}', b'{"event": 1}', b"[]", b'{"QMP": 1}'])
def test_what_is_no_server_message_is_an_error_of_the_server(document: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        qmp.decode_reply(document)


def test_what_a_server_sends_that_cannot_be_json_is_its_error() -> None:
    (stray,) = qmp.Splitter().feed(b"\x00")
    with pytest.raises(RemoteProtocolError, match="the server sent what is no message: QMP: JSON parse error"):
        qmp.decode_reply(stray)
