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


def split(pieces: list[bytes], **limits: int) -> list[bytes]:
    splitter = qmp.Splitter(**limits)
    return [document for piece in pieces for document in splitter.feed(piece)]


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
        assert [json.loads(document.decode(errors="surrogatepass")) for document in found] == objects


@pytest.mark.parametrize("start", [b"[]", b"null", b'"x"', b"}", b"x{}", b"\x00{}", b"GET / HTTP/1.1\r\n"])
def test_what_is_no_object_breaks_the_stream(start: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="must be a JSON object"):
        split([b"{} \n", start])


def test_what_is_balanced_but_no_json_is_one_document() -> None:
    assert split([b'{"a": ]{}']) == [b'{"a": ]', b"{}"]


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_documents_are_limited_in_bytes(piece: int) -> None:
    document = b'{"a": "0123456789"}'

    def pieces(data: bytes) -> list[bytes]:
        return [data[at : at + piece] for at in range(0, len(data), piece)]

    assert split(pieces(document * 3), document_bytes_max=len(document)) == [document] * 3
    with pytest.raises(RemoteProtocolError, match="a message is longer than 18 bytes"):
        split(pieces(document), document_bytes_max=len(document) - 1)
    with pytest.raises(RemoteProtocolError, match="a message is longer than 50 bytes"):
        split(pieces(b'{"a": "' + b"x" * 1000), document_bytes_max=50)


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_documents_are_limited_in_depth(piece: int) -> None:
    def pieces(data: bytes) -> list[bytes]:
        return [data[at : at + piece] for at in range(0, len(data), piece)]

    deep = b'{"a":' + b"[" * 3 + b"]" * 3 + b"}"
    assert split(pieces(deep), depth_max=4) == [deep]
    with pytest.raises(RemoteProtocolError, match="JSON deeper than 3 levels"):
        split(pieces(deep), depth_max=3)


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
        (b"{]", "JSON is malformed"),
        (b'{"execute": 7}', "Expected `str`, got `int` - at `$.execute`"),
        (b'{"arguments": {}}', "missing required field `execute`"),
        (b'{"execute": "x", "exec-oob": "y"}', "unknown field `exec-oob`"),
        (b'{"execute": "\xff"}', "utf-8"),
    ],
)
def test_what_is_no_command_is_told_with_the_member_at_fault(document: bytes, told: str) -> None:
    with pytest.raises(qmp.QmpError) as caught:
        qmp.decode_command(document)
    assert caught.value.kind == "GenericError"
    assert told.lower() in str(caught.value).lower()


def test_the_id_of_what_is_no_command_is_told_where_there_is_one() -> None:
    error = qmp.QmpError("GenericError", "no")
    assert "id" not in qmp.failure(error, qmp.identifier(b"{]"))
    assert "id" not in qmp.failure(error, qmp.identifier(b'{"x": 1}'))
    assert qmp.failure(error, qmp.identifier(b'{"x": 1, "id": 5}'))["id"] == 5


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
