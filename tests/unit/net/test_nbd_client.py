"""The NBD client: every request ends with the server's answer or with an error that says why there is none."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable

import pytest
from tests.serving_world import SIZE, ScriptedServer, Serving, scripted, turns

from fleecer.errors import IoError, RemoteProtocolError
from fleecer.net.nbd_client import NbdClient
from fleecer.testing.streams import memory_streams
from fleecer.units import KiB
from fleecer.wire.nbd import ExportInfo, Request
from fleecer.wire.nbd import constants as nbd


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    world = Serving()
    yield world
    world.fault.clear()
    await world.close()


async def error_of(request: Awaitable[object]) -> IoError:
    with pytest.raises(IoError) as caught:
        await request
    return caught.value


async def test_requests_do_what_they_are_named_for(serving: Serving) -> None:
    client = await serving.connect()
    await client.pwrite(1000, b"abc")
    assert await client.pread(999, 5) == serving.data[999:1004]
    await client.zero(4096, 8192, unmap=True)
    assert not any(serving.data[4096:12288])
    await client.zero(16384, 512, unmap=False)
    await client.trim(65536, 4096)
    await client.flush()
    status = await client.block_status(0, 16384)
    assert status == {"base:allocation": [(4096, 0), (8192, 3), (4096, 0)]}
    await client.close()
    await client.close()
    with pytest.raises(IoError):
        await client.pread(0, 1)


async def test_what_a_read_returns_is_private(serving: Serving) -> None:
    client = await serving.connect()
    first = await client.pread(0, 4096)
    kept = bytes(first)
    await client.pwrite(0, bytes(4096))
    assert not any(await client.pread(0, 4096))
    assert first == kept
    await client.close()


async def test_requests_made_in_one_turn_leave_in_one_send() -> None:
    client, server = await scripted()
    server.on_request = lambda request: server.codec.reply_read(request, bytes(request.length))
    before = server.receives
    await asyncio.gather(*(client.pread(at * 512, 512) for at in range(30)))
    assert server.receives == before + 1
    await client.close()


async def test_answers_reach_who_asked_in_whatever_order_they_come() -> None:
    client, server = await scripted()

    def answer_in_reverse(_: Request) -> None:
        if len(server.requests) == 10:
            for request in reversed(server.requests):
                server.codec.reply_read(request, bytes([request.offset // 512]) * request.length)

    server.on_request = answer_in_reverse
    found = await asyncio.gather(*(client.pread(at * 512, 512) for at in range(10)))
    assert found == [bytes([at]) * 512 for at in range(10)]
    await client.close()


async def test_an_error_carries_the_servers_number_and_words(serving: Serving) -> None:
    serving.fault.fail("write", errno=errno.ENOSPC)
    client = await serving.connect()
    with pytest.raises(IoError) as caught:
        await client.pwrite(512, b"x")
    assert caught.value.errno == errno.ENOSPC
    text = r"write of 1 bytes at 512 on 'disk': the server says '"
    assert str(caught.value).startswith(text)
    assert "No space left on device" in str(caught.value)
    await client.pwrite(512, b"y")  # the connection is fine
    await client.close()


async def test_a_server_that_goes_ends_every_request_with_an_error() -> None:
    client, server = await scripted()
    requests = [asyncio.ensure_future(client.pread(at * 512, 512)) for at in range(5)]
    await turns()
    server.stream.abort()
    for request in requests:
        error = await error_of(request)
        assert "5 requests in flight" in str(error) or "reset" in str(error).lower()
    with pytest.raises(IoError, match="NBD request"):
        await client.flush()
    await client.close()


async def test_a_server_that_breaks_the_protocol_ends_every_request_with_the_reason() -> None:
    client, server = await scripted()
    requests = [asyncio.ensure_future(client.pread(at * 512, 512)) for at in range(2)]
    await turns()
    server.stream.send([nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 999)])
    for request in requests:
        assert "cookie 999" in str(await error_of(request))
    await client.close()
    await turns()
    assert server.ended


async def test_a_server_that_answers_a_write_before_it_has_it_all_is_left() -> None:
    client, server = await scripted()
    server.stream.pause()
    writing = asyncio.ensure_future(client.pwrite(0, bytes(SIZE)))
    await turns()
    (cookie,) = client._replies
    server.stream.send([nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)])
    assert "a write was answered before all of it was sent" in str(await error_of(writing))
    with pytest.raises(IoError, match="before all of it was sent"):
        await client.flush()
    await client.close()


async def test_a_server_that_is_shutting_down_is_asked_nothing_more() -> None:
    client, server = await scripted()
    slow = asyncio.ensure_future(client.pread(0, 512))
    await turns()
    server.on_request = lambda request: server.codec.reply_error(request, errno.ESHUTDOWN, "going")
    with pytest.raises(IoError) as caught:
        await client.pread(512, 512)
    assert caught.value.errno == errno.ESHUTDOWN
    await turns()
    assert server.codec.finished, "the client must disconnect"
    asked = len(server.requests)
    with pytest.raises(IoError, match="shutting down"):
        await client.flush()
    assert len(server.requests) == asked
    server.codec.reply_read(server.requests[0], b"r" * 512)
    server.send()
    assert await slow == b"r" * 512  # what was in flight is still answered
    server.stream.close()
    await client.close()


async def test_a_refused_name_is_told_and_the_connection_given_up() -> None:
    ours, theirs = memory_streams()
    server = ScriptedServer(theirs, ExportInfo(name="other", size=SIZE))
    with pytest.raises(Exception, match=r"^export 'disk' does not exist"):
        await NbdClient.connect(ours, "disk")
    await turns()
    assert server.ended


async def test_a_server_that_does_not_answer_is_given_up_in_time() -> None:
    ours, _ = memory_streams()
    with pytest.raises(
        IoError, match=r"^NBD handshake on 'right end': the server did not answer in 0\.01 s$"
    ) as caught:
        await NbdClient.connect(ours, "disk", timeout_s=0.01)
    assert caught.value.errno == errno.ETIMEDOUT


async def test_a_cancelled_connect_leaves_nothing() -> None:
    ours, theirs = memory_streams()
    server = ScriptedServer(theirs, ExportInfo(name="disk", size=SIZE))
    server.stream.pause()
    connecting = asyncio.ensure_future(NbdClient.connect(ours, "disk"))
    await turns()
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    server.stream.resume()
    await turns()
    assert server.ended


async def test_what_is_no_nbd_server_is_told_apart() -> None:
    ours, theirs = memory_streams()
    theirs.send([b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    with pytest.raises(RemoteProtocolError):
        await NbdClient.connect(ours, "disk")


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 30])
async def test_any_division_of_the_bytes_gives_the_same(serving: Serving, piece_bytes: int) -> None:
    client = await NbdClient.connect(serving.stream(piece_bytes=piece_bytes), "disk")
    data = bytes(range(256)) * 8
    await client.pwrite(3, data)
    assert await client.pread(3, len(data)) == data
    assert (await client.block_status(0, 4 * KiB))["base:allocation"] == [(4 * KiB, 0)]
    await client.close()
