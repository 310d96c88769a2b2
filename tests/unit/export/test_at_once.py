"""Requests done at once, over real files and sockets: whose memory they use, and for whom they wait."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.serving_world import Client, turns

from fleecer import spares
from fleecer.block.edge import Edge
from fleecer.block.nodes.file import FileNode
from fleecer.errors import IoError
from fleecer.export import Export, Server
from fleecer.export.connection import QUEUED_BYTES_MAX, SKIPS_MAX, Connection
from fleecer.export.server import WAY_TURN_BYTES
from fleecer.net.stream import SocketStream
from fleecer.ranges import Buffer
from fleecer.storage.api import Ended, ReadEnded
from fleecer.storage.file import FileStorage, open_file
from fleecer.units import KiB
from fleecer.wire.nbd import AtOnce, ServerCodec
from fleecer.wire.nbd.constants import CMD_FLAG_FUA

BLOCK = 256 * KiB
BLOCKS = 48


def block(number: int) -> bytes:
    return number.to_bytes(4, "little") * (BLOCK // 4)


class World:
    """A server over a file of numbered blocks."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.server = Server()
        self.server.add(Export("disk", "disk", edge))
        self.clients: list[Client] = []

    async def client(self) -> Client:
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        self.server.serve(SocketStream(near, "client"))
        client = Client(SocketStream(far, "server"), "disk")  # type: ignore[arg-type]
        self.clients.append(client)
        await client.until(lambda: client.codec.ready)
        return client


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(block(number) for number in range(BLOCKS)))
    node = FileNode("disk", await open_file(str(path)))
    made = World(Edge(node, "export", "nbd", writable=True))
    yield made
    for client in made.clients:
        client.stream.abort()
    await made.server.stop()
    await node.close()
    spares._kept.clear()


async def test_what_a_client_has_not_read_yet_is_not_used_again(world: World) -> None:
    slow, quick = await world.client(), await world.client()
    slow.stream.pause()
    cookies = [slow.codec.read(number * BLOCK, BLOCK) for number in range(BLOCKS)]
    slow.send()
    for _ in range(4):
        for number in reversed(range(BLOCKS)):
            cookie = quick.codec.read(number * BLOCK, BLOCK)
            quick.send()
            assert (await quick.reply(cookie)).data == block(number)
    await world.edge.pwrite(0, bytes(BLOCK * BLOCKS))
    slow.stream.resume()
    for number in range(BLOCKS):
        data = (await slow.reply(cookies[number])).data
        # The first were read before the change, and wait in memory; the rest is read only when there is room again.
        assert data == block(number) or (number > 0 and data == bytes(BLOCK)), f"block {number} begins {data[:8]!r}"


async def test_the_buffers_of_replies_are_used_again(world: World) -> None:
    client = await world.client()
    for _ in range(20):
        cookie = client.codec.read(BLOCK, BLOCK)
        client.send()
        assert (await client.reply(cookie)).data == block(1)
        await turns(3)
    assert len(spares._kept[BLOCK]) <= 2


async def test_the_payload_of_a_write_under_way_is_not_used_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = world.edge.node.storage  # type: ignore[attr-defined]
    real = type(storage).try_pwrite
    late_writes = 0

    def every_other(self: object, offset: int, data: Buffer) -> bool:
        return offset // BLOCK % 2 == 0 and bool(real(self, offset, data))

    in_a_thread = type(storage)._pwrite

    def late(self: object, offset: int, data: Buffer) -> None:
        nonlocal late_writes
        late_writes += 1
        time.sleep(0.002)
        in_a_thread(self, offset, data)

    monkeypatch.setattr(type(storage), "try_pwrite", every_other)
    monkeypatch.setattr(type(storage), "_pwrite", late)
    clients = [await world.client() for _ in range(3)]
    for turn in range(1, 4):
        cookies = []
        for number in range(BLOCKS):
            client = clients[number % 3]
            cookies.append(client.codec.write(number * BLOCK, block(turn * 1000 + number)))
            client.send()
        for number in range(BLOCKS):
            assert not (await clients[number % 3].reply(cookies[number])).error
        for number in range(BLOCKS):
            assert await world.edge.pread(number * BLOCK, BLOCK) == block(turn * 1000 + number)
    assert late_writes == 3 * BLOCKS // 2


@pytest.mark.parametrize("fua", [False, True])
async def test_one_sync_is_enough_for_all_that_came_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch, *, fua: bool
) -> None:
    syncs = 0
    real = FileStorage.begin_sync

    def begin(self: FileStorage, ended: Ended) -> bool:
        nonlocal syncs
        syncs += 1
        return real(self, ended)

    monkeypatch.setattr(FileStorage, "begin_sync", begin)
    client = await world.client()
    cookies = []
    for number in range(8):
        cookies.append(client.codec.write(number * BLOCK, b"n" * 512, CMD_FLAG_FUA if fua else 0))
        if not fua:
            cookies.append(client.codec.flush())
    client.send()
    for cookie in cookies:
        assert not (await client.reply(cookie)).error
    assert syncs == 1
    assert world.server.export("disk").writes == 8
    for number in range(8):
        assert await world.edge.pread(number * BLOCK, 512) == b"n" * 512


async def test_a_write_with_fua_fails_where_what_was_written_cannot_be_made_durable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FileStorage, ended: Ended) -> bool:
        raise IoError(errno.ENOSPC, self.name, "flush")

    client = await world.client()
    plain = client.codec.write(0, b"n" * 512)
    monkeypatch.setattr(FileStorage, "begin_sync", fail)
    cookies = [client.codec.write(number * BLOCK, b"n" * 512, CMD_FLAG_FUA) for number in range(3)]
    client.send()
    assert not (await client.reply(plain)).error
    for cookie in cookies:
        reply = await client.reply(cookie)
        assert reply.error == errno.ENOSPC
        assert "flush" in reply.message


async def test_a_buffer_is_used_again_once_it_is_taken_though_others_are_still_queued(world: World) -> None:
    client = await world.client()
    (server_end,) = world.server.clients()
    client.stream.pause()
    asked = 1
    async with asyncio.timeout(30):
        for _ in range(40):
            # A little is read, and more asked for, so that the queue does not run empty.
            while server_end.stream.queued_bytes <= QUEUED_BYTES_MAX:
                client.codec.read(BLOCK * (1 + asked % 8), BLOCK)
                asked += 1
                client.send()
                await turns(5)
            client.stream.resume()
            before = client.codec.in_flight
            while client.codec.in_flight == before:
                await asyncio.sleep(0)
            client.stream.pause()
    assert asked > 20, "hardly anything was read"
    client.codec.read(BLOCK, BLOCK)
    client.send()
    await turns(5)
    assert len(server_end._sending) * BLOCK <= server_end.stream.queued_bytes + 2 * BLOCK


async def test_what_is_done_at_once_waits_for_what_was_asked_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = world.edge.node.storage  # type: ignore[attr-defined]
    in_a_thread = type(storage)._pwrite

    def late(self: object, offset: int, data: Buffer) -> None:
        time.sleep(0.01)
        in_a_thread(self, offset, data)

    monkeypatch.setattr(type(storage), "try_pwrite", lambda *_: False)
    monkeypatch.setattr(type(storage), "_pwrite", late)
    client = await world.client()
    for before in (0, 1):
        data = block(1000 + before)[: 4 * KiB]
        if before:
            client.codec.flush()  # ends what is done in one pass
        written = client.codec.write(0, data)  # so short that all come in one piece
        read = client.codec.read(0, len(data))
        client.send()
        assert (await client.reply(read)).data == data, "a thread was writing that range"
        assert not (await client.reply(written)).error


async def test_short_replies_that_a_client_has_not_read_yet_do_not_change(world: World) -> None:
    slow, quick = await world.client(), await world.client()
    slow.stream.pause()
    cookies = []
    for number in range(BLOCKS):  # until the kernel takes no more, and a while longer
        cookies += [slow.codec.read(number * BLOCK + at, 4 * KiB) for at in range(0, BLOCK, 4 * KiB)]
        slow.send()
        await turns(2)
        for at in range(0, 64 * KiB, 4 * KiB):
            quick.codec.read((BLOCKS - 1) * BLOCK + at, 4 * KiB)
        quick.send()
        await turns(2)
    server_end = next(one for one in world.server.clients() if one.stream.queued_bytes)
    assert server_end.stream.queued_bytes <= QUEUED_BYTES_MAX + AtOnce.REPLIES_BYTES
    slow.stream.resume()
    for index, cookie in enumerate(cookies):
        number = index * 4 * KiB // BLOCK
        assert (await slow.reply(cookie)).data == block(number)[: 4 * KiB], f"a reply from block {number}"


async def test_short_replies_that_have_to_wait_take_no_more_memory_than_they_are_long(world: World) -> None:
    client = await world.client()
    (server_end,) = world.server.clients()
    client.stream.pause()
    while not server_end.stream.queued_bytes:
        client.codec.read(0, 4 * KiB)
        client.send()
        await turns(2)
    queued_bytes = server_end.stream.queued_bytes
    for _ in range(100):
        client.codec.write(0, b"x")
        client.send()
        await turns(2)
    assert server_end.stream.queued_bytes > queued_bytes, "no reply has to wait"
    assert len(server_end._sending) <= 1
    pieces = server_end.stream._queue  # type: ignore[attr-defined]
    assert sum(type(piece) is memoryview for piece in pieces) <= 1, "each keeps all of the memory that it is a part of"
    client.stream.abort()


async def test_a_write_that_fails_at_once_is_answered_so_and_those_around_it_are_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = world.edge.node.storage  # type: ignore[attr-defined]
    real = type(storage).try_pwrite
    tries = 0

    def failing(self: FileStorage, offset: int, data: Buffer) -> bool:
        nonlocal tries
        tries += offset == BLOCK
        if offset == BLOCK:
            raise IoError(errno.ENOSPC, self.name, "write", offset, len(data))
        return bool(real(self, offset, data))

    monkeypatch.setattr(type(storage), "try_pwrite", failing)
    client = await world.client()
    new = b"n" * 4 * KiB
    cookies = [client.codec.write(number * BLOCK, new) for number in range(3)]
    cookies.append(client.codec.read(2 * BLOCK, 4 * KiB))
    client.send()
    async with asyncio.timeout(20):
        errors = [(await client.reply(cookie)).error for cookie in cookies]
    assert errors == [0, errno.ENOSPC, 0, 0]
    assert (await client.reply(cookies[3])).data == new
    assert tries == 1, "it was tried again"
    export = world.server.export("disk")
    assert (export.writes, export.bytes_written) == (2, 8 * KiB)
    assert (export.reads, export.bytes_read) == (1, 4 * KiB)


async def test_what_is_done_at_once_is_no_longer_turn_than_others_have(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await world.client()
    export, await_turn = world.server.export("disk"), world.server.await_turn
    reads: list[int] = []

    def awaits_turn(connection: Connection) -> None:
        reads.append(export.reads)
        await_turn(connection)

    monkeypatch.setattr(world.server, "await_turn", awaits_turn)
    world.server.make_way()
    cookies = [client.codec.read(number * BLOCK, 4 * KiB) for number in range(BLOCKS)]
    client.send()
    for cookie in cookies:
        assert not (await client.reply(cookie)).error
    a_turn = WAY_TURN_BYTES // (4 * KiB + AtOnce.REQUEST_BYTES)
    assert reads == list(range(a_turn, BLOCKS, a_turn))


async def test_nothing_is_done_at_once_any_more_when_the_server_stops(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = world.edge.node.storage  # type: ignore[attr-defined]
    in_a_thread = type(storage)._pwrite
    go_on = threading.Event()

    def late(self: object, offset: int, data: Buffer) -> None:
        go_on.wait(30)
        in_a_thread(self, offset, data)

    monkeypatch.setattr(type(storage), "try_pwrite", lambda *_: False)
    monkeypatch.setattr(type(storage), "_pwrite", late)
    client = await world.client()
    written = client.codec.write(0, b"x")
    client.send()
    await turns(3)
    stopping = asyncio.create_task(world.server.stop())
    await turns(3)
    read = client.codec.read(BLOCK, 4 * KiB)
    client.send()
    try:
        assert (await client.reply(read)).error == errno.ESHUTDOWN
    finally:
        go_on.set()
    assert not (await client.reply(written)).error
    await stopping


def begins_reads_only(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has files say that no read is worth a try, and begin each; returns where they were told to."""
    begun: list[int] = []

    def begin(storage: FileStorage, offset: int, length: int, ended: ReadEnded) -> bool:
        begun.append(offset)
        asyncio.get_running_loop().call_soon(ended, storage._pread(offset, length, storage.size), None)
        return True

    def tried(*_: object) -> bool:
        raise AssertionError("a read was tried")

    monkeypatch.setattr(FileStorage, "reads_wait", True)
    monkeypatch.setattr(FileStorage, "begin_pread", begin)
    monkeypatch.setattr(FileStorage, "try_pread_into", tried)
    return begun


async def test_a_read_that_is_not_worth_a_try_is_begun_at_once_and_costs_no_coroutine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begins_reads_only(monkeypatch)
    monkeypatch.setattr(Connection, "_start", lambda *_, **__: pytest.fail("a coroutine was started"))
    client = await world.client()
    for _ in range(2):  # the second time it is known that nothing can be done before all is parsed
        cookies = [client.codec.read(number * BLOCK, 4 * KiB) for number in range(4)]
        client.send()
        for number, cookie in enumerate(cookies):
            assert (await client.reply(cookie)).data == block(number)[: 4 * KiB]
    assert begun == [number * BLOCK for number in range(4)] * 2


async def test_no_read_is_begun_any_more_when_the_server_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = begins_reads_only(monkeypatch)
    client = await world.client()
    (connection,) = world.server._connections
    connection._refusing = True
    read = client.codec.read(BLOCK, 4 * KiB)
    client.send()
    assert (await client.reply(read)).error == errno.ESHUTDOWN
    assert not begun


async def test_a_client_whose_requests_mostly_wait_pays_little_for_those_that_need_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = world.edge.node.storage  # type: ignore[attr-defined]
    passes: list[int] = []
    do_at_once = ServerCodec._do_at_once

    def counted(codec: ServerCodec, at_once: AtOnce) -> None:
        do_at_once(codec, at_once)
        passes.append(at_once.reads)

    async def read(count: int) -> None:
        for _ in range(count):
            cookie = client.codec.read(0, 4 * KiB)
            client.send()
            assert (await client.reply(cookie)).data == block(0)[: 4 * KiB]

    client = await world.client()
    monkeypatch.setattr(ServerCodec, "_do_at_once", counted)
    with monkeypatch.context() as cold:
        cold.setattr(type(storage), "try_pread_into", lambda *_: False)
        await read(100)
    assert not sum(passes)
    assert 5 <= len(passes) <= 10
    passes.clear()
    await read(2 * SKIPS_MAX)
    assert sum(passes) >= SKIPS_MAX - 1, "those that need not wait are done so again"


# Flushes that are begun.


@pytest.fixture
async def waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Ended]]:
    """Has files begin each sync, and no request take a coroutine; who waits for the end of a sync."""
    told: list[Ended] = []

    def begin(storage: FileStorage, ended: Ended) -> bool:
        told.append(ended)
        return True

    monkeypatch.setattr(FileStorage, "begin_sync", begin)
    monkeypatch.setattr(Connection, "_answer", lambda *_: pytest.fail("a coroutine was started"))
    yield told
    for ended in told:
        ended(None)


async def begun(waiting: list[Ended]) -> None:
    async with asyncio.timeout(30):
        while not waiting:
            await asyncio.sleep(0)


async def test_a_flush_costs_no_coroutine_and_is_answered_after_the_sync(world: World, waiting: list[Ended]) -> None:
    client = await world.client()
    for _ in range(2):
        write, flush = client.codec.write(0, b"x"), client.codec.flush()
        client.send()
        assert not (await client.reply(write)).error
        replies = len(client.replies)
        await begun(waiting)
        await turns(5)
        assert len(client.replies) == replies
        waiting.pop()(None)
        assert not (await client.reply(flush)).error


async def test_a_flush_that_was_begun_and_fails_is_answered_with_what_went_wrong(
    world: World, waiting: list[Ended]
) -> None:
    client = await world.client()
    flush = client.codec.flush()
    client.send()
    await begun(waiting)
    waiting.pop()(IoError(errno.ENOSPC, "disk", "flush"))
    assert (await client.reply(flush)).error == errno.ENOSPC


async def test_a_server_stops_only_after_a_flush_that_was_begun_and_begins_no_other(
    world: World, waiting: list[Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await world.client()
    flush = client.codec.flush()
    client.send()
    await begun(waiting)
    monkeypatch.undo()
    stopping = asyncio.create_task(world.server.stop())
    await turns(3)
    another = client.codec.flush()
    client.send()
    assert (await client.reply(another)).error == errno.ESHUTDOWN
    assert not stopping.done()
    waiting.pop()(None)
    assert not (await client.reply(flush)).error
    await stopping


async def test_a_flush_whose_client_has_gone_holds_its_export_until_the_sync_is_done(
    world: World, waiting: list[Ended]
) -> None:
    client = await world.client()
    client.codec.flush()
    client.send()
    await begun(waiting)
    client.stream.abort()
    await turns(5)
    assert world.edge.busy == 1
    waiting.pop()(None)
    await turns(5)
    assert world.edge.busy == 0
    assert not world.server._connections
