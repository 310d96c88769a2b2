"""Both codecs joined: what one role says, the other understands, whole, in pieces or byte by byte."""

from __future__ import annotations

import errno

import pytest
from tests.nbd_world import ConnectionPair, Shelf, feed, sent

from fleecer.ranges import is_zero, zeroes
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ClientCodec, ExportInfo, ExportUnknown, Reply, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd

SIZE = 1 * MiB
PIECES = pytest.mark.parametrize("piece", [1 << 30, 1000, 1], ids=["whole", "pieces", "bytewise"])
DISK = ExportInfo(
    name="disk",
    description="the disk",
    size=SIZE,
    can_multi_conn=True,
    can_trim=True,
    can_fast_zero=True,
    block_size_min=1,
    block_size_preferred=64 * KiB,
    contexts=("base:allocation", "x-test:written"),
)


class Disk:
    """Answers requests from memory, as an export does. `written` marks 512 byte sectors."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.written: set[int] = set()
        self.log: list[tuple[int, int]] = []

    def answer(self, codec: ServerCodec, request: Request) -> None:
        self.log.append((request.command, request.flags))
        start, end = request.offset, request.offset + request.length
        if request.error:
            codec.reply_error(request, request.error, request.message)
        elif request.command == nbd.CMD_READ:
            data = bytes(self.data[start:end])
            if is_zero(data) and codec.may_fragment(request):
                codec.reply_read_hole(request)
            else:
                codec.reply_read(request, data)
        elif request.command == nbd.CMD_BLOCK_STATUS:
            runs = [(512, int(sector in self.written)) for sector in range(start // 512, end // 512)]
            codec.reply_status(request, [(context, runs) for context in codec.contexts])
        else:
            if request.command in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES):
                self.data[start:end] = request.data or zeroes(end - start)
                self.written |= set(range(start // 512, -(-end // 512)))
            codec.reply_done(request)


def joined(
    disk: Disk, piece: int, *, contexts: tuple[str, ...] = DISK.contexts, name: str = "disk"
) -> tuple[ConnectionPair, Shelf]:
    shelf = Shelf(DISK)
    pair = ConnectionPair(ServerCodec(shelf), ClientCodec(name, contexts=contexts), disk.answer)
    assert pair.run(piece) == []
    return pair, shelf


def one(replies: list[Reply]) -> Reply:
    (reply,) = replies
    return reply


@PIECES
def test_negotiation_ends_with_both_sides_of_one_mind(piece: int) -> None:
    pair, shelf = joined(Disk(), piece)
    assert pair.client.ready
    assert pair.client.info == DISK
    assert pair.server.export is DISK
    assert pair.client.flags == DISK.transmission_flags(structured=True)
    assert pair.client.contexts == pair.server.contexts == DISK.contexts
    assert pair.client.structured
    assert pair.server.structured
    assert shelf.entered == ["disk"]


@PIECES
def test_every_command_goes_through(piece: int) -> None:
    disk = Disk()
    pair, _ = joined(disk, piece)
    client = pair.client
    payload = bytes(range(256)) * 10
    commands = [
        client.write(1024, payload, nbd.CMD_FLAG_FUA),
        client.read(1024, len(payload)),
        client.read(1024, len(payload), nbd.CMD_FLAG_DF),
        client.write_zeroes(1024, 512, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO),
        client.trim(8192, 512, nbd.CMD_FLAG_FUA),
        client.cache(0, 4096),
        client.flush(),
        client.read(1024, 512),
        client.block_status(0, 8192),
        client.block_status(0, 8192, nbd.CMD_FLAG_REQ_ONE),
    ]
    replies = pair.run(piece)
    assert [reply.cookie for reply in replies] == commands
    assert all(reply.error == 0 for reply in replies)
    assert bytes(replies[1].data) == bytes(replies[2].data) == payload
    assert is_zero(replies[7].data)
    runs = [(1024, 0), (2560, 1), (4608, 0)]
    assert replies[8].extents == dict.fromkeys(DISK.contexts, runs)
    assert replies[9].extents == dict.fromkeys(DISK.contexts, runs[:1])
    assert disk.log[0] == (nbd.CMD_WRITE, nbd.CMD_FLAG_FUA)
    client.disconnect()
    assert pair.run(piece) == []
    assert pair.server.finished
    assert pair.server.failure is pair.client.failure is None


@PIECES
def test_an_error_keeps_its_words_from_end_to_end(piece: int) -> None:
    def refuse(codec: ServerCodec, request: Request) -> None:
        codec.reply_error(request, errno.ENOSPC, "scratch is full\nafter 3 bytes")

    pair = ConnectionPair(ServerCodec(Shelf(DISK)), ClientCodec("disk"), refuse)
    pair.run(piece)
    pair.client.read(0, 512)
    reply = one(pair.run(piece))
    assert (reply.error, reply.message) == (errno.ENOSPC, "scratch is full\nafter 3 bytes")


@pytest.mark.parametrize("size", [64 * KiB, 256 * KiB, 600 * KiB])
@pytest.mark.parametrize("piece", [1 << 30, 70_001])
def test_large_requests_in_both_directions_keep_their_bytes(size: int, piece: int) -> None:
    disk = Disk()
    pair, _ = joined(disk, piece)
    payload = bytes(k % 249 for k in range(size))
    pair.client.write(100, payload)
    pair.client.read(100, size)
    pair.client.read(0, size)
    written, first, second = pair.run(piece)
    assert written.error == 0
    assert first.data == payload
    assert second.data == bytes(100) + payload[:-100]


@PIECES
def test_replies_may_overtake_each_other(piece: int) -> None:
    held: list[Request] = []
    pair = ConnectionPair(ServerCodec(Shelf(DISK)), ClientCodec("disk"), lambda codec, request: held.append(request))
    pair.run(piece)
    cookies = [pair.client.read(k * 512, 512) for k in range(4)]
    assert pair.run(piece) == []
    for request in reversed(held):
        pair.server.reply_read(request, bytes([request.offset // 512]) * 512)
    replies = pair.run(piece)
    assert [reply.cookie for reply in replies] == cookies[::-1]
    assert [reply.data[0] for reply in replies] == [3, 2, 1, 0]


def test_an_export_that_is_not_there_is_not_found() -> None:
    pair, _ = joined(Disk(), 1 << 30, name="other\n")
    assert isinstance(pair.client.failure, ExportUnknown)
    assert str(pair.client.failure).startswith("export 'other\\n' does not exist: the server says ")
    assert pair.server.finished
    assert pair.server.failure is None


def test_listing_and_asking_leave_no_trace() -> None:
    shelf = Shelf(DISK, ExportInfo(name="", size=0))
    for mode in ("list", "info"):
        client = ClientCodec("disk", mode="list" if mode == "list" else "info")
        pair = ConnectionPair(ServerCodec(shelf), client, Disk().answer)
        pair.run()
        assert client.finished
        assert client.failure is None
        assert pair.server.finished
        if mode == "list":
            assert client.listed == [("disk", "the disk"), ("", "")]
        else:
            assert client.info == DISK
    assert shelf.entered == []


def test_feeding_in_pieces_sends_the_same_bytes() -> None:
    transcripts = set()
    for piece in (1 << 30, 7, 1):
        disk = Disk()
        server, client = ServerCodec(Shelf(DISK)), ClientCodec("disk")
        said = b""
        for turn in range(8):
            if client.ready and turn < 6:
                client.write(turn * 512, bytes([turn]) * 700)
                client.read(0, 4096)
            from_client = sent(client)
            for request in feed(server, from_client, piece):
                disk.answer(server, request)
            from_server = sent(server)
            feed(client, from_server, piece)
            said += from_client + b"|" + from_server + b"|"
        assert client.ready
        transcripts.add(said)
    assert len(transcripts) == 1
