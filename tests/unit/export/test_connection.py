"""A connection: one reply to each request, nobody waits for anybody, bounded memory, and a clean end."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from tests.nbd_world import HELLO, entering, request
from tests.serving_world import SIZE, Client, OldClient, Serving, turns

from fleecer.block.node import Extent
from fleecer.errors import IoError, LocalProtocolError
from fleecer.export import Export, connection
from fleecer.export.connection import PART_BYTES
from fleecer.export.server import (
    HURRY_REQUESTS,
    LONG_TURN_BYTES,
    SHARE,
    SHORT_TURNS,
    TURNS_MAX,
    WAY_TURN_BYTES,
    WAY_TURNS,
)
from fleecer.ranges import Buffer
from fleecer.testing.streams import MemoryStream
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import Request
from fleecer.wire.nbd import constants as nbd


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    world = Serving()
    yield world
    world.fault.clear()
    await world.close()


@pytest.fixture
async def big() -> AsyncIterator[Serving]:
    world = Serving(64 * MiB)
    yield world
    world.fault.clear()
    await world.close()


# Exactly one reply.


@pytest.mark.parametrize("piece_bytes", [1 << 30, 1])
async def test_every_command_is_carried_out_and_answered_once(serving: Serving, piece_bytes: int) -> None:
    client = await serving.client(piece_bytes=piece_bytes)
    codec = client.codec
    cookies = [
        codec.write(100, b"hello", nbd.CMD_FLAG_FUA),
        codec.read(90, 30),
        codec.write_zeroes(4096, 100),
        codec.trim(8192, 4096),
        codec.cache(0, 4096),
        codec.flush(),
        codec.block_status(0, SIZE),
        codec.read(4000, 300),
    ]
    client.send()
    replies = [await client.reply(cookie) for cookie in cookies]
    await turns()
    assert len(client.replies) == len(cookies)
    assert [reply.error for reply in replies] == [0] * len(cookies)
    assert serving.data[100:105] == b"hello"
    assert replies[1].data == serving.data[90:120]
    assert replies[7].data == serving.data[4000:4300]
    assert not any(serving.data[4096:4196])


async def test_old_clients_get_simple_replies(serving: Serving) -> None:
    client = OldClient(serving.stream())
    await client.take(18)  # the greeting
    option = nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_EXPORT_NAME, 4) + b"disk"
    client.stream.send([HELLO + option])
    size, _ = nbd.EXPORT_NAME_REPLY.unpack(await client.take(nbd.EXPORT_NAME_REPLY.size))
    assert size == SIZE
    client.stream.send([request(nbd.CMD_READ, 512, 1024, cookie=7), request(nbd.CMD_READ, SIZE, 1, cookie=8)])
    assert await client.simple_reply() == (0, 7)
    assert await client.take(1024) == serving.data[512:1536]
    assert await client.simple_reply() == (nbd.EINVAL, 8)
    client.stream.send([request(nbd.CMD_BLOCK_STATUS, 0, 1024, cookie=9)])
    assert await client.simple_reply() == (nbd.EINVAL, 9)
    client.stream.send([request(nbd.CMD_WRITE, 3, cookie=10, data=b"old way")])
    assert await client.simple_reply() == (0, 10)
    assert serving.data[3:10] == b"old way"
    client.stream.close()


class BrokenExport(Export):
    """An export that ends requests in ways it must not; `way` is what a read or a status does."""

    way: Callable[[Request], Any] = staticmethod(lambda request: None)

    async def execute(self, request: Request, tried: bool = False) -> Buffer | None:
        if request.command != nbd.CMD_READ:
            return await super().execute(request, tried)
        found = self.way(request)
        answer: Buffer | None = await found if isinstance(found, Awaitable) else found
        return answer

    async def status(self, request: Request, context: str) -> list[Extent]:
        found: list[Extent] = self.way(request)
        return found


async def _late_bug(request: Request) -> Buffer:
    await asyncio.sleep(0)
    raise ZeroDivisionError


async def _late_cancel(request: Request) -> Buffer:
    await asyncio.sleep(0)
    raise asyncio.CancelledError


def _bug(request: Request) -> Buffer:
    raise ZeroDivisionError


WAYS: dict[str, Callable[[Request], Any]] = {
    "no data": lambda request: None,
    "too little data": lambda request: b"x",
    "too few zeroes": lambda request: b"",
    "too much data": lambda request: bytes(request.length + 1),
    "a bug": _bug,
    "a bug after a wait": _late_bug,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strict", [True, False])
async def test_a_request_that_ends_without_a_fit_answer_is_answered_once_and_shown_as_a_bug(
    way: str, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    serving = Serving(strict=strict)
    export = BrokenExport("broken", "broken", serving.attach("export 'broken'"))
    export.way = WAYS[way]
    serving.server.add(export)
    client = await serving.client("broken")
    cookies = [client.codec.read(at, 512) for at in (0, 512)]
    ok = client.codec.write(0, b"works")
    client.send()
    for cookie in cookies:
        reply = await client.reply(cookie)
        assert (reply.error, reply.message) == (errno.EIO, "internal error")
    assert (await client.reply(ok)).error == 0
    await turns()
    assert len(client.replies) == 3
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2
    assert len(serving.internal_errors) == (2 if strict else 0)
    serving.internal_errors.clear()
    await serving.close()


async def test_a_failed_request_is_answered_even_if_whoever_is_told_of_it_fails_too(serving: Serving) -> None:
    def told(*_: object) -> None:
        raise ZeroDivisionError

    serving.export.on_failure = told
    serving.fault.fail("read", times=2)
    client = await serving.client()
    cookies = [client.codec.read(at, 512) for at in (0, 512)]
    client.send()
    for cookie in cookies:
        assert (await client.reply(cookie)).error == errno.EIO
    assert [type(error) for error in serving.internal_errors] == [ZeroDivisionError] * 2
    serving.internal_errors.clear()


async def test_block_status_that_tells_nothing_is_answered_once_and_shown_as_a_bug(
    caplog: pytest.LogCaptureFixture,
) -> None:
    serving = Serving()

    async def nothing(offset: int, length: int) -> list[Extent]:
        return []

    export = Export("mute", "mute", serving.attach("export 'mute'"), contexts={"x-test:mute": nothing})
    serving.server.add(export)
    client = await serving.client("mute", contexts=("base:allocation", "x-test:mute"))
    cookie = client.codec.block_status(0, SIZE)
    client.send()
    assert (await client.reply(cookie)).error == errno.EIO
    (error,) = serving.internal_errors
    assert isinstance(error, LocalProtocolError)
    serving.internal_errors.clear()
    await serving.close()


async def test_a_cancelled_request_is_answered() -> None:
    serving = Serving()
    export = BrokenExport("broken", "broken", serving.attach("export 'broken'"))
    export.way = _late_cancel
    serving.server.add(export)
    client = await serving.client("broken")
    cookie = client.codec.read(0, 512)
    client.send()
    assert (await client.reply(cookie)).error == errno.EIO
    await serving.close()


async def test_a_failing_request_carries_its_cause_and_the_others_go_on(serving: Serving) -> None:
    serving.fault.fail("write", 4096, 512, errno=errno.ENOSPC)
    client = await serving.client()
    bad = client.codec.write(4096, bytes(512))
    good = client.codec.write(0, b"good")
    client.send()
    reply = await client.reply(bad)
    assert (reply.error, reply.message) == (
        errno.ENOSPC,
        "write of 512 bytes at 4096 on 'disk': No space left on device",
    )
    assert (await client.reply(good)).error == 0


async def test_block_status_over_several_contexts_that_fails_is_answered_once(serving: Serving) -> None:
    async def failing(offset: int, length: int) -> list[Extent]:
        raise IoError(errno.EACCES, "disk", "block status", offset, length, "not for you")

    export = Export("two", "two", serving.attach("export 'two'"), contexts={"x-test:bad": failing})
    serving.server.add(export)
    client = await serving.client("two", contexts=("base:allocation", "x-test:bad"))
    assert set(client.codec.contexts) == {"base:allocation", "x-test:bad"}
    cookie = client.codec.block_status(0, SIZE)
    again = client.codec.read(0, 512)
    client.send()
    reply = await client.reply(cookie)
    assert "not for you" in reply.message
    assert (await client.reply(again)).error == 0  # a second reply to the first cookie would have ended the connection
    assert not client.endings


async def test_block_status_answers_for_every_context(serving: Serving) -> None:
    async def striped(offset: int, length: int) -> list[Extent]:
        return [Extent(min(1000, length), offset // 1000 % 2)]

    export = Export("two", "two", serving.attach("export 'two'"), contexts={"x-test:stripes": striped})
    serving.server.add(export)
    nbd_client = await serving.connect("two", contexts=("base:allocation", "x-test:stripes"))
    answers = await nbd_client.block_status(500, 2000)
    assert answers == {"base:allocation": [(2000, 0)], "x-test:stripes": [(1000, 0), (1000, 1)]}
    await nbd_client.close()


# Nobody waits for anybody.


async def test_a_request_that_waits_holds_up_no_other(serving: Serving) -> None:
    held = serving.fault.hold("read", 0, 512)
    client = await serving.client()
    slow = client.codec.read(0, 512)
    quick = [client.codec.read(at, 512) for at in range(512, 20 * 512, 512)]
    client.send()
    for cookie in quick:
        await client.reply(cookie)
    assert [reply.cookie for reply in client.replies] == quick
    held.release()
    assert (await client.reply(slow)).data == serving.data[:512]


async def test_requests_of_one_batch_are_answered_in_one_send(serving: Serving) -> None:
    client = await serving.client()
    before = serving.server_stream.send_count
    cookies = [client.codec.read(at * 512, 512) for at in range(50)]
    client.send()
    await client.reply(cookies[-1])
    assert serving.server_stream.send_count == before + 1


async def test_requests_that_end_together_are_answered_in_one_send(serving: Serving) -> None:
    holds = [serving.fault.hold("read", at * 512, 512) for at in range(20)]
    client = await serving.client()
    cookies = [client.codec.read(at * 512, 512) for at in range(20)]
    client.send()
    for held in holds:
        await held.reached()
    before = serving.server_stream.send_count
    for held in holds:
        held.release()
    for cookie in cookies:
        await client.reply(cookie)
    assert serving.server_stream.send_count == before + 1


# Turns.


class Greedy:
    """Clients that ask for a lot at once, 256 KiB at a time; `served` tells what was read in each turn of the loop."""

    def __init__(self, serving: Serving, clients: list[Client]) -> None:
        self.serving = serving
        self.clients = clients
        self.count = 0
        self.served: list[int] = []

    def ask(self, count: int) -> None:
        self.count += count
        for client in self.clients:
            for at in range(count):
                client.codec.read(at * 256 * KiB, 256 * KiB)
            client.send()

    async def turn(self) -> None:
        before = self.serving.export.bytes_read
        await asyncio.sleep(0)
        self.served.append(self.serving.export.bytes_read - before)

    async def all_answered(self) -> None:
        """Counts no more turns."""
        for client in self.clients:
            await client.until(lambda client=client: len(client.replies) == self.count)  # type: ignore[misc]


@pytest.fixture
async def greedy(big: Serving) -> Greedy:
    return Greedy(big, [await big.client(buffer_bytes=64 * MiB) for _ in range(2)])


async def test_who_asks_for_much_goes_on_a_little_in_each_turn_and_others_come_between(
    big: Serving, greedy: Greedy
) -> None:
    small = await big.client()
    greedy.ask(32)
    await turns(2)
    cookie = small.codec.read(0, 512)
    small.send()
    replied = 0
    while big.export.bytes_read < 2 * 32 * 256 * KiB + 512:
        await greedy.turn()
        replied = replied or (len(greedy.served) if small.replies else 0)
    assert max(greedy.served) <= LONG_TURN_BYTES + 512, "more than one went on in a turn"
    assert 0 < replied < 10, "others waited for those who ask for much"
    assert (await small.reply(cookie)).data == big.data[:512]
    await greedy.all_answered()


async def test_turns_are_long_until_somebody_asks_for_a_little_and_then_again(big: Serving, greedy: Greedy) -> None:
    small = await big.client()
    greedy.ask(8)
    await greedy.all_answered()
    greedy.ask(64)
    await turns(3)
    await greedy.turn()
    assert greedy.served == [LONG_TURN_BYTES]
    cookie = small.codec.read(0, 512)
    small.send()
    while not small.replies:
        await asyncio.sleep(0)
    for _ in range(SHORT_TURNS - 6):
        await greedy.turn()
    assert set(greedy.served[1:]) == {connection.TURN_BYTES}
    for _ in range(10):
        await greedy.turn()
    assert greedy.served[-3:] == [LONG_TURN_BYTES] * 3
    assert (await small.reply(cookie)).data == big.data[:512]
    await greedy.all_answered()


def hurry(client: Client) -> None:
    """Asks for so many little reads that the client is kept busy."""
    for at in range(HURRY_REQUESTS + 1):
        client.codec.read(at * 512, 512)
    client.send()


async def test_turns_are_long_beside_somebody_who_is_kept_busy(big: Serving, greedy: Greedy) -> None:
    hurried = await big.client()
    cookie = hurried.codec.read(0, 512)  # a little: turns are short
    hurried.send()
    await hurried.reply(cookie)
    greedy.ask(48)
    await turns(3)
    for _ in range(12):
        hurry(hurried)
        await greedy.turn()
    assert sum(length >= LONG_TURN_BYTES for length in greedy.served) >= 6
    await turns(3)
    await greedy.turn()
    assert greedy.served[-1] == LONG_TURN_BYTES
    await greedy.all_answered()


async def test_as_many_long_turns_come_at_once_as_others_took_time(big: Serving, greedy: Greedy) -> None:
    ticks = itertools.count()
    greedy.ask(96)
    await turns(3)
    big.clock = lambda: next(ticks)  # each look at it takes a second: others had one, and each turn takes one
    for _ in range(3):
        await greedy.turn()
    assert greedy.served[1:] == [SHARE * LONG_TURN_BYTES] * 2
    big.clock = lambda: 0.0
    await greedy.turn()
    assert greedy.served[-1] == LONG_TURN_BYTES, "others had none"
    await greedy.all_answered()


async def test_turns_at_once_are_limited_and_never_come_while_they_are_kept_short(big: Serving, greedy: Greedy) -> None:
    hurried, small = await big.client(), await big.client()
    now_s = 0.0
    big.clock = lambda: now_s
    greedy.ask(160)
    hurry(hurried)  # somebody else is there: nothing goes aside, which would hold connections up here
    await turns(4)
    for _ in range(3):
        now_s += 1000.0
        await greedy.turn()
    assert greedy.served == [TURNS_MAX * LONG_TURN_BYTES] * 3
    small.codec.read(0, 512)
    small.send()
    await turns(4)
    for _ in range(3):
        now_s += 1000.0
        await greedy.turn()
    assert greedy.served[-3:] == [connection.TURN_BYTES] * 3
    await greedy.all_answered()


async def test_who_asks_for_one_turn_at_a_time_has_long_ones_too(big: Serving) -> None:
    client = await big.client(buffer_bytes=64 * MiB)
    for _ in range(SHORT_TURNS + 1):  # from the handshake on turns are short
        cookie = client.codec.read(0, 256 * KiB)
        client.send()
        await client.reply(cookie)
    greedy = Greedy(big, [client])
    greedy.ask(8)
    while not any(greedy.served):
        await greedy.turn()
    assert greedy.served[-1] == LONG_TURN_BYTES


def watched(stream: MemoryStream) -> list[bool]:
    """Whether each send of 64 KiB and more was one that may go aside, from now on."""
    asides: list[bool] = []
    send = stream.send

    def watch(pieces: Sequence[Buffer], *, aside: bool = False) -> None:
        if sum(map(len, pieces)) >= 64 * KiB:
            asides.append(aside)
        send(pieces, aside=aside)

    stream.send = watch  # type: ignore[method-assign]
    return asides


async def test_long_replies_go_aside_while_there_is_more_to_do(big: Serving) -> None:
    client = await big.client(buffer_bytes=64 * MiB)
    asides = watched(big.server_stream)
    greedy = Greedy(big, [client])
    for _ in range(SHORT_TURNS + 1):  # from the handshake on turns are short
        greedy.ask(1)
        await greedy.all_answered()
    assert not any(asides), "there was nothing else to do"
    asides.clear()
    for _ in range(3):
        greedy.ask(24)
        await greedy.all_answered()
    assert asides[0]
    assert asides.count(True) >= 3 * 5
    for number, reply in enumerate(client.replies):
        at = 0 if number <= SHORT_TURNS else (number - SHORT_TURNS - 1) % 24 * 256 * KiB
        assert reply.data == big.data[at : at + 256 * KiB], f"reply {number} was changed before it was sent"


@pytest.mark.parametrize("count", [1, HURRY_REQUESTS + 1])
async def test_nothing_goes_aside_while_somebody_asks_for_little(big: Serving, greedy: Greedy, count: int) -> None:
    small = await big.client()
    asides = [watched(client.stream) for client in big.server.clients()]  # type: ignore[arg-type]
    greedy.ask(8)
    await greedy.all_answered()
    assert any(map(any, asides))
    for _ in range(count):
        cookie = small.codec.read(0, 512)
    small.send()
    await small.reply(cookie)
    greedy.ask(1)  # with this turn the server hears of it
    await greedy.all_answered()
    for one in asides:
        one.clear()
    greedy.ask(SHORT_TURNS // 4)
    await greedy.all_answered()
    assert any(asides)
    assert not any(map(any, asides))


async def test_turns_are_short_for_somebody_who_asks_for_a_little_beside_somebody_busy(
    big: Serving, greedy: Greedy
) -> None:
    hurried, small = await big.client(), await big.client()
    greedy.ask(64)
    await turns(3)
    for _ in range(16):
        hurry(hurried)
        small.codec.read(0, 512)
        small.send()
        await greedy.turn()
    assert 0 < max(greedy.served[4:]) < LONG_TURN_BYTES
    await greedy.all_answered()


async def test_one_goes_on_in_each_turn_though_many_clients_make_room_at_once(big: Serving) -> None:
    greedy = Greedy(big, [await big.client(buffer_bytes=128 * KiB) for _ in range(8)])
    greedy.ask(32)
    await turns(9)
    while big.export.bytes_read < 8 * 32 * 256 * KiB:
        await greedy.turn()
    assert 0 < max(greedy.served) <= LONG_TURN_BYTES
    await greedy.all_answered()


@pytest.mark.parametrize(("count", "length"), [(32, 1 * MiB), (4000, 1)])
async def test_a_turn_ends_after_many_small_requests_and_after_many_zeroes(
    big: Serving, count: int, length: int
) -> None:
    big.data[:] = bytes(64 * MiB)
    client = await big.client(buffer_bytes=64 * MiB)
    for at in range(count):
        client.codec.read(at * length, length)
    client.send()
    served = []
    while big.export.reads < count:
        before = big.export.reads
        await asyncio.sleep(0)
        served.append(big.export.reads - before)
    assert max(served) <= LONG_TURN_BYTES // max(length, 4 * KiB)


async def test_turns_are_very_short_for_a_while_for_who_needs_several(big: Serving) -> None:
    client = await big.client(buffer_bytes=64 * MiB)
    for at in range(3000):
        client.codec.read(at, 1)
    client.send()
    big.server.make_way()
    served = []
    while big.export.reads < 3000:
        before = big.export.reads
        await asyncio.sleep(0)
        served.append(big.export.reads - before)
    short = WAY_TURN_BYTES // (4 * KiB)
    assert max(served[:WAY_TURNS]) == short
    assert max(served) >= LONG_TURN_BYTES // (4 * KiB), "only for a while"


async def test_a_connection_that_has_ended_is_forgotten(big: Serving) -> None:
    client = await big.client()
    cookie = client.codec.read(0, 512)
    client.send()
    await client.reply(cookie)
    assert list(big.server._little_asked) == big.server.clients()
    client.stream.close()
    await client.ended()
    assert not big.server._little_asked


# Long reads.


def chunks_of(data: bytes) -> list[tuple[int, bool, int, int]]:
    """(type, whether it is the last, offset, bytes of data) of each chunk of a read."""
    found = []
    while data:
        _, flags, kind, _, length = nbd.CHUNK.unpack_from(data)
        body, data = data[nbd.CHUNK.size : nbd.CHUNK.size + length], data[nbd.CHUNK.size + length :]
        at = nbd.ERROR_BODY.unpack_from(body)[1] + nbd.ERROR_BODY.size if kind & nbd.REPLY_TYPE_ERROR_BIT else 0
        found.append((kind, bool(flags & nbd.REPLY_FLAG_DONE), nbd.OFFSET.unpack_from(body, at)[0], length - 8))
    return found


async def answer_to(serving: Serving, asked: bytes, length: int, *, structured: bool = True) -> bytes:
    """The first `length` bytes that come when a client asks for something."""
    client = OldClient(serving.stream())
    client.stream.send([entering("disk", structured=structured)])
    await turns()
    client.data.clear()
    client.stream.send([asked])
    taken = await client.take(length)
    client.stream.close()
    await turns()
    assert not client.data
    return taken


async def test_a_long_read_is_answered_in_parts_that_end_at_multiples_of_theirs_and_is_one_read(big: Serving) -> None:
    start, length = 100, 2 * PART_BYTES + 50
    answer = await answer_to(big, request(nbd.CMD_READ, start, length), length + 3 * nbd.DATA_CHUNK.size)
    data = nbd.REPLY_TYPE_OFFSET_DATA
    assert chunks_of(answer) == [
        (data, False, start, PART_BYTES - start),
        (data, False, PART_BYTES, PART_BYTES),
        (data, True, 2 * PART_BYTES, start + 50),
    ]
    assert (big.export.reads, big.export.bytes_read) == (1, length)


async def test_a_read_that_is_no_longer_than_a_part_is_answered_whole(big: Serving) -> None:
    answer = await answer_to(big, request(nbd.CMD_READ, 1, PART_BYTES), PART_BYTES + nbd.DATA_CHUNK.size)
    assert chunks_of(answer) == [(nbd.REPLY_TYPE_OFFSET_DATA, True, 1, PART_BYTES)]


async def test_a_long_read_is_answered_whole_where_the_client_knows_no_parts_or_wants_none(big: Serving) -> None:
    length = 3 * PART_BYTES
    whole = await answer_to(big, request(nbd.CMD_READ, 7, length, flags=nbd.CMD_FLAG_DF), nbd.DATA_CHUNK.size + length)
    assert chunks_of(whole) == [(nbd.REPLY_TYPE_OFFSET_DATA, True, 7, length)]
    whole = await answer_to(big, request(nbd.CMD_READ, 7, length), nbd.SIMPLE_REPLY.size + length, structured=False)
    assert whole[nbd.SIMPLE_REPLY.size :] == big.data[7 : 7 + length]


async def test_a_long_read_fails_where_one_of_its_parts_does_and_the_others_are_answered(big: Serving) -> None:
    big.fault.fail("read", PART_BYTES + 4096, 512, times=2)
    text = f"read of {PART_BYTES} bytes at {PART_BYTES} on 'disk': Input/output error"
    length = 2 * PART_BYTES + 2 * nbd.DATA_CHUNK.size + nbd.CHUNK.size + nbd.ERROR_BODY.size + len(text) + 8
    answer = await answer_to(big, request(nbd.CMD_READ, 0, 3 * PART_BYTES), length)
    assert text.encode() in answer
    assert sorted(chunk[:1] + chunk[2:3] for chunk in chunks_of(answer)) == [
        (nbd.REPLY_TYPE_OFFSET_DATA, 0),
        (nbd.REPLY_TYPE_OFFSET_DATA, 2 * PART_BYTES),
        (nbd.REPLY_TYPE_ERROR_OFFSET, PART_BYTES),
    ]
    assert [last for _, last, _, _ in chunks_of(answer)] == [False, False, True]
    client = await big.connect()
    with pytest.raises(IoError, match="Input/output error"):
        await client.pread(0, 3 * PART_BYTES)
    assert await client.pread(0, 512) == big.data[:512]
    await client.close()


async def test_parts_that_end_in_another_order_make_one_answer(big: Serving) -> None:
    """The last to be answered ends it, wherever it lies."""
    held = big.fault.hold("read", 0, 512)
    client = await big.client(buffer_bytes=8 * MiB)
    cookie = client.codec.read(0, 4 * PART_BYTES)
    small = client.codec.read(8 * MiB, 512)
    client.send()
    await client.reply(small)
    assert big.export.bytes_read == 4 * PART_BYTES + 512
    held.release()
    assert (await client.reply(cookie)).data == big.data[: 4 * PART_BYTES]


async def test_requests_behind_a_long_read_keep_order_when_it_is_held_up(big: Serving) -> None:
    client = await big.client(buffer_bytes=64 * KiB)
    client.stream.pause()
    cookies = [client.codec.read(at * MiB, 2 * MiB) for at in range(3)] + [client.codec.read(0, 512)]
    client.send()
    await turns()
    assert big.export.bytes_read < 2 * MiB, "a client that does not read is read for"
    client.stream.resume()
    await client.reply(cookies[-1])
    assert [reply.cookie for reply in client.replies] == cookies
    assert [bytes(reply.data) for reply in client.replies[:3]] == [
        bytes(big.data[at * MiB : (at + 2) * MiB]) for at in range(3)
    ]


async def test_a_long_read_that_waits_for_its_client_is_refused_when_the_server_stops(big: Serving) -> None:
    client = await big.client(buffer_bytes=64 * KiB)
    cookie = client.codec.read(0, 8 * MiB)
    client.stream.pause()
    client.send()
    await turns()
    stopping = asyncio.ensure_future(big.server.stop())
    await turns()
    client.stream.resume()
    assert (await client.reply(cookie)).error == errno.ESHUTDOWN
    await stopping


# Bounded memory.


async def test_a_client_that_never_reads_is_held_up_and_nobody_else(big: Serving) -> None:
    stuck = await big.client()
    stuck.stream.pause()
    server_end = big.server_stream
    for _ in range(10):
        for _ in range(8):
            stuck.codec.read(0, 1 * MiB)
        stuck.send()
        await turns(20)
    bound = connection.QUEUED_BYTES_MAX + LONG_TURN_BYTES + 2 * MiB
    assert connection.QUEUED_BYTES_MAX < server_end.queued_bytes <= bound
    reads = big.export.reads
    await turns()
    assert big.export.reads == reads, "reads went on for a client that does not read"
    assert big.export.edge.busy == 0, "a request waits for a client"
    guest = await big.connect()
    for at in range(0, 32 * MiB, MiB):
        await guest.pwrite(at, b"\xee" * MiB)  # of the very range that the stuck client reads
    assert await guest.pread(0, 4) == b"\xee" * 4
    await guest.close()
    stuck.stream.resume()  # it comes to its senses: all is answered
    await stuck.until(lambda: len(stuck.replies) == 80)


async def test_status_replies_count_against_the_bound_too(serving: Serving) -> None:
    stripes = [Extent(1, at % 2) for at in range(16 * KiB)]

    async def ragged(offset: int, length: int) -> list[Extent]:
        return stripes

    export = Export("ragged", "ragged", serving.attach("export 'ragged'"), contexts={"x-test:ragged": ragged})
    serving.server.add(export)
    client = await serving.client("ragged", contexts=("x-test:ragged",))
    client.stream.pause()
    for _ in range(200):
        client.codec.block_status(0, SIZE)
    client.send()
    await turns()
    bound = connection.QUEUED_BYTES_MAX + LONG_TURN_BYTES + 2 * 8 * len(stripes)
    assert connection.QUEUED_BYTES_MAX < serving.server_stream.queued_bytes <= bound
    client.stream.abort()


async def test_requests_in_flight_are_bounded_by_number(serving: Serving) -> None:
    holds = [serving.fault.hold("read", 0, 512) for _ in range(300)]
    client = await serving.client()
    cookies = [client.codec.read(0, 512) for _ in range(300)]
    client.send()
    await turns(400)
    assert sum(held.is_reached for held in holds) == connection.IN_FLIGHT_MAX
    assert serving.export.edge.busy == connection.IN_FLIGHT_MAX
    serving.fault.clear()
    for cookie in cookies:
        await client.reply(cookie)


async def test_flushes_that_end_at_once_hold_nothing_up(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IN_FLIGHT_MAX", 4)
    client = await serving.client()
    held = serving.fault.hold("read")
    hung = client.codec.read(0, 512)
    client.send()
    await asyncio.wait_for(held.reached(), 10)
    cookies = [client.codec.flush() for _ in range(3)]
    good = client.codec.read(512, 512)
    client.send()
    for cookie in cookies:
        assert not (await client.reply(cookie)).error
    assert (await asyncio.wait_for(client.reply(good), 10)).data == serving.data[512:1024]
    held.release()
    assert (await client.reply(hung)).data == serving.data[:512]


async def test_requests_in_flight_are_bounded_by_bytes(big: Serving) -> None:
    holds = [big.fault.hold("read") for _ in range(100)]
    client = await big.client()
    cookies = [client.codec.read(0, 4 * MiB) for _ in range(40)]
    client.send()
    await turns()
    reached = sum(held.is_reached for held in holds)
    assert reached == connection.IN_FLIGHT_BYTES_MAX // PART_BYTES + 1
    big.fault.clear()
    for cookie in cookies:
        await client.reply(cookie)


async def test_status_requests_in_flight_are_bounded_by_what_their_answers_may_take(serving: Serving) -> None:
    go_on = asyncio.Event()
    asked = 0

    async def slow(offset: int, length: int) -> list[Extent]:
        nonlocal asked
        asked += 1
        await go_on.wait()
        return [Extent(length, 0)]

    serving.server.add(Export("slow", "slow", serving.attach("export 'slow'"), contexts={"x-test:slow": slow}))
    client = await serving.client("slow", contexts=("x-test:slow",))
    cookies = [client.codec.block_status(0, SIZE) for _ in range(200)]
    client.send()
    await turns(20)
    assert asked == 33
    go_on.set()
    for cookie in cookies:
        await client.reply(cookie)


# The end.


@pytest.mark.parametrize("farewell", ["disconnect", "garbage"])
async def test_a_client_that_goes_without_reading_its_last_replies_is_waited_for_a_while(
    big: Serving, monkeypatch: pytest.MonkeyPatch, farewell: str
) -> None:
    monkeypatch.setattr(connection, "STOP_GRACE_S", 0.05)
    client = await big.client()
    client.stream.pause()
    client.codec.read(0, 512 * KiB)
    if farewell == "disconnect":
        client.codec.disconnect()
    client.send()
    await turns()
    if farewell == "garbage":
        client.stream.send([b"x" * 28])
    await turns()
    assert big.server.clients()
    async with asyncio.timeout(10):
        while big.server.clients():
            await asyncio.sleep(0.01)


async def test_a_client_that_goes_with_much_unanswered_is_waited_for_while_it_reads(
    big: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STOP_GRACE_S", 0.2)
    reads, stalls = await big.client(), await big.client()
    for client in (reads, stalls):
        client.stream.pause()
        cookies = [client.codec.read(0, 512 * KiB) for _ in range(6)]
        client.codec.disconnect()
        client.send()
    for _ in range(10):  # for much longer than the grace
        await asyncio.sleep(0.05)
        reads.stream.resume()
        await turns(3)
        reads.stream.pause()
    assert len(reads.replies) < len(cookies)
    assert len(big.server.clients()) == 1, "who reads was not waited for, or who does not still is"
    reads.stream.resume()
    for cookie in cookies:
        assert (await reads.reply(cookie)).data == big.data[: 512 * KiB]
    await reads.ended()


async def test_a_reply_that_is_about_to_be_sent_is_not_cut_off(big: Serving) -> None:
    held = big.fault.hold("read", 0, 512)
    client = await big.client()
    [server_end] = big.server.clients()
    cookie = client.codec.read(0, 512)
    client.codec.disconnect()
    client.send()
    await held.reached()
    held.release()
    while not server_end._send_due:
        await asyncio.sleep(0)
    server_end._end_time_to_read(server_end.stream.taken_bytes)  # as its timer does, should it be due just now
    assert (await client.reply(cookie)).data == big.data[:512]
    await asyncio.wait_for(server_end.ended, 5)


async def test_a_client_that_goes_is_answered_however_long_its_requests_take(
    big: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STOP_GRACE_S", 0.02)
    held = big.fault.hold("read", 0, 512)
    client = await big.client()
    cookie = client.codec.read(0, 512)
    client.codec.disconnect()
    client.send()
    await held.reached()
    await asyncio.sleep(0.1)
    held.release()
    assert (await client.reply(cookie)).data == big.data[:512]
    await client.ended()


async def test_what_comes_while_a_client_is_sent_away_is_refused_not_forgotten(
    big: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STOP_GRACE_S", 30.0)
    held = big.fault.hold("read", 0, 512)
    client = await big.client(buffer_bytes=64 * KiB)
    cookies = [client.codec.read(0, 512), client.codec.read(1 * MiB, 512 * KiB)]
    client.stream.pause()
    client.send()
    await held.reached()
    await turns()
    stopping = asyncio.ensure_future(big.server.remove("disk", hard=True))
    await turns()
    cookies += [client.codec.read(4096, 512) for _ in range(3)]
    client.send()
    await turns()
    held.release()
    await turns()
    client.stream.resume()
    replies = [await client.reply(cookie) for cookie in cookies]
    assert [reply.error for reply in replies] == [0, 0] + [errno.ESHUTDOWN] * 3
    await stopping


async def test_disconnect_is_obeyed_once_all_that_was_asked_is_answered(serving: Serving) -> None:
    held = serving.fault.hold("write", 0, 512)
    client = await serving.client()
    slow = client.codec.write(0, b"w" * 512)
    quick = client.codec.read(1024, 512)
    client.codec.disconnect()
    client.send()
    await client.reply(quick)
    await turns()
    assert not client.endings
    held.release()
    assert (await client.reply(slow)).error == 0
    await client.ended()
    assert client.codec.failure is None


async def test_a_client_that_vanishes_leaves_the_effects_of_its_requests_and_nothing_else(serving: Serving) -> None:
    held = serving.fault.hold("write", 0, 512)
    client = await serving.client()
    client.codec.write(0, b"w" * 512)
    client.send()
    await held.reached()
    (theirs,) = serving.server.clients(serving.export)
    client.stream.abort()
    await turns()
    assert serving.export.edge.busy == 1
    assert not theirs.ended.done(), "the connection must outlive its requests"
    held.release()
    await theirs.ended
    assert serving.data[:512] == b"w" * 512
    assert serving.export.edge.busy == 0
    assert not serving.server.clients()


async def test_stop_ends_requests_in_flight_and_refuses_new_ones(serving: Serving) -> None:
    held = serving.fault.hold("write", 0, 512)
    client = await serving.client()
    slow = client.codec.write(0, b"w" * 512)
    client.send()
    await held.reached()
    stopping = asyncio.ensure_future(serving.server.stop())
    await turns()
    late = client.codec.read(1024, 512)
    client.send()
    reply = await client.reply(late)
    assert (reply.error, reply.message) == (errno.ESHUTDOWN, "shutting down")
    assert not stopping.done()
    held.release()
    assert (await client.reply(slow)).error == 0
    await client.ended()
    await stopping


async def test_requests_that_waited_for_their_turn_are_refused_when_the_server_stops(serving: Serving) -> None:
    for _ in range(connection.IN_FLIGHT_MAX):
        serving.fault.hold("read", 0, 512)
    client = await serving.client()
    started = [client.codec.read(0, 512) for _ in range(connection.IN_FLIGHT_MAX)]
    waiting = [client.codec.read(0, 512) for _ in range(10)]
    client.send()
    await turns()
    stopping = asyncio.ensure_future(serving.server.stop())
    for cookie in waiting:
        assert (await client.reply(cookie)).error == errno.ESHUTDOWN
    serving.fault.clear()
    for cookie in started:
        assert (await client.reply(cookie)).error == 0
    await stopping


async def test_stop_does_not_wait_for_a_client_that_never_reads(big: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STOP_GRACE_S", 0.01)
    stuck = await big.client()
    stuck.stream.pause()
    for _ in range(1000):
        stuck.codec.read(0, 1 * MiB)
    stuck.send()
    await turns()
    assert big.server_stream.queued_bytes > connection.QUEUED_BYTES_MAX
    async with asyncio.timeout(10):
        await big.server.stop()


async def test_a_client_that_reads_gets_its_last_replies_when_the_server_stops(big: Serving) -> None:
    client = await big.client()
    client.stream.pause()
    length = connection.QUEUED_BYTES_MAX // 4  # all are started; what waits for its start is refused
    cookies = [client.codec.read(0, length) for _ in range(4)]
    client.send()
    await turns()
    assert big.server_stream.queued_bytes > 0
    stopping = asyncio.ensure_future(big.server.stop())
    await turns()
    client.stream.resume()
    for cookie in cookies:
        assert (await client.reply(cookie)).data == big.data[:length]
    await stopping


async def test_what_was_asked_before_a_violation_is_answered_and_then_the_client_is_dropped(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(serving.stream(), "disk")
    await client.until(lambda: client.codec.ready)
    good = client.codec.read(0, 512)
    client.codec.outgoing.append(b"\xff" * 28)
    client.send()
    assert (await client.reply(good)).error == 0
    await client.ended()
    assert "dropped NBD client left end: request magic" in caplog.text


# What the commands mean.


async def test_writing_to_a_read_only_export_is_refused(serving: Serving) -> None:
    serving.offer("past", writable=False)
    before = bytes(serving.data)
    stream = serving.stream()
    client = OldClient(stream)
    await client.take(18)
    stream.send([entering("past", structured=False)])
    await turns()
    client.data.clear()
    for cookie, command in enumerate((nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES)):
        data = b"x" * 512 if command == nbd.CMD_WRITE else b""
        stream.send([request(command, 0, 512, cookie=cookie, data=data)])
        assert await client.simple_reply() == (nbd.EPERM, cookie)
    assert serving.data == before
    stream.close()


@pytest.mark.parametrize("command", [nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_FLUSH, nbd.CMD_CACHE])
@pytest.mark.parametrize("length", [0, 512])
async def test_fua_is_answered_only_after_a_flush(serving: Serving, command: int, length: int) -> None:
    held = serving.fault.hold("flush")
    stream = serving.stream()
    client = OldClient(stream)
    await client.take(18)
    stream.send([entering("disk", structured=False)])
    await turns()
    client.data.clear()
    data = b"x" * length if command == nbd.CMD_WRITE else b""
    length = 0 if command == nbd.CMD_FLUSH else length
    stream.send([request(command, 0, length, flags=nbd.CMD_FLAG_FUA, cookie=5, data=data)])
    await asyncio.wait_for(held.reached(), 10)
    assert not client.data
    held.release()
    assert await client.simple_reply() == (0, 5)
    stream.close()


@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_CACHE])
async def test_requests_of_no_bytes_succeed_and_touch_nothing(serving: Serving, command: int) -> None:
    before = bytes(serving.data)
    stream = serving.stream()
    client = OldClient(stream)
    await client.take(18)
    stream.send([entering("disk", structured=False)])
    await turns()
    client.data.clear()
    stream.send([request(command, 512, 0, cookie=3)])
    assert await client.simple_reply() == (0, 3)
    assert serving.data == before
    stream.close()


async def test_fast_zeroing_is_refused_where_it_is_not_fast(serving: Serving) -> None:
    serving.fault.limits = dataclasses.replace(serving.fault.limits, zero_is_fast=False)
    client = await serving.client()
    fast = client.codec.write_zeroes(0, 512, nbd.CMD_FLAG_FAST_ZERO)
    plain = client.codec.write_zeroes(512, 512)
    client.send()
    assert (await client.reply(fast)).error == errno.ENOTSUP
    assert any(serving.data[:512])
    assert (await client.reply(plain)).error == 0
    assert not any(serving.data[512:1024])


async def test_zeroes_are_sent_as_a_hole(serving: Serving) -> None:
    serving.data[: 64 * KiB] = bytes(64 * KiB)
    client = await serving.client()
    before = serving.server_stream.sent_bytes
    cookie = client.codec.read(0, 64 * KiB)
    client.send()
    assert (await client.reply(cookie)).data == bytes(64 * KiB)
    assert serving.server_stream.sent_bytes - before < 100


async def test_only_one_extent_is_told_where_only_one_is_asked_for(serving: Serving) -> None:
    asked: list[int] = []

    async def stripes(offset: int, length: int) -> list[Extent]:
        asked.append(offset)
        return [Extent(min(1000, length), offset // 2000 % 2)]

    export = Export("two", "two", serving.attach("export 'two'"), contexts={"x-test:stripes": stripes})
    serving.server.add(export)
    client = await serving.client("two", contexts=("x-test:stripes",))
    one = client.codec.block_status(0, SIZE, nbd.CMD_FLAG_REQ_ONE)
    client.send()
    assert (await client.reply(one)).extents == {"x-test:stripes": [(2000, 0)]}
    assert asked == [0, 1000, 2000], "more was looked up than is told"


async def test_a_status_answer_put_together_from_many_lets_others_work_after_each(serving: Serving) -> None:
    async def same(offset: int, length: int) -> list[Extent]:
        asked.append(turn)
        return [Extent(min(1000, length), 1)]

    asked: list[int] = []
    turn = 0
    export = Export("one", "one", serving.attach("export 'one'"), contexts={"x-test:same": same})
    serving.server.add(export)
    client = await serving.client("one", contexts=("x-test:same",))
    cookie = client.codec.block_status(0, SIZE)
    client.send()
    while not client.replies:
        await asyncio.sleep(0)
        turn += 1
    assert (await client.reply(cookie)).extents == {"x-test:same": [(SIZE, 1)]}
    assert len(asked) == len(set(asked)) == -(-SIZE // 1000)


async def test_a_default_export_name_in_the_old_handshake_is_served(serving: Serving) -> None:
    stream = serving.stream()
    client = OldClient(stream)
    await client.take(18)
    stream.send([HELLO + nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_EXPORT_NAME, 0)])
    size, _ = nbd.EXPORT_NAME_REPLY.unpack(await client.take(nbd.EXPORT_NAME_REPLY.size))
    assert size == SIZE
    stream.close()
