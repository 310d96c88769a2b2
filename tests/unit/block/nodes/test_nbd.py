"""The nbd node: what it makes of a server that can do less, or wants its requests cut and aligned."""

from __future__ import annotations

import asyncio
import errno

import pytest
from tests.serving_world import ScriptedServer, scripted, turns

from fleecer.block.edge import Edge
from fleecer.block.node import HOLE, ZERO, Extent
from fleecer.block.nodes.nbd import NbdNode
from fleecer.errors import IoError
from fleecer.units import GiB, KiB, MiB
from fleecer.wire.nbd import ExportInfo, Request
from fleecer.wire.nbd import constants as nbd


async def node_of(**info: object) -> tuple[NbdNode, ScriptedServer]:
    """A node over a server that answers everything, reads with zeroes."""
    client, server = await scripted(ExportInfo(name="disk", **info))  # type: ignore[arg-type]

    def answer(request: Request) -> None:
        if request.command == nbd.CMD_READ:
            server.codec.reply_read(request, bytes(request.length))
        elif request.command == nbd.CMD_BLOCK_STATUS:
            server.codec.reply_status(request, [(context, [(request.length, 3)]) for context in server.codec.contexts])
        else:
            server.codec.reply_done(request)

    server.on_request = answer
    return NbdNode("nbd0", client), server


def ranges(server: ScriptedServer) -> list[tuple[int, int, int]]:
    return [(request.command, request.offset, request.length) for request in server.requests]


async def test_a_servers_block_sizes_become_limits_and_a_short_tail_is_cut() -> None:
    node, server = await node_of(
        size=10 * 4096 + 700, block_size_min=4096, block_size_preferred=8192, block_size_max=32 * KiB
    )
    assert node.size == 10 * 4096
    assert node.limits.request_alignment_bytes == 4096
    assert node.limits.preferred_bytes == 8192
    assert node.limits.transfer_max_bytes == 32 * KiB
    edge = Edge(node, "test", "file", writable=True)
    assert len(await edge.pread(100, 33 * KiB)) == 33 * KiB
    assert ranges(server) == [(nbd.CMD_READ, 0, 32 * KiB), (nbd.CMD_READ, 32 * KiB, 4096)]
    with pytest.raises(IoError) as caught:
        await edge.pread(10 * 4096, 1)
    assert caught.value.errno == errno.EINVAL
    await node.close()


async def test_the_first_failed_flush_is_final_whatever_the_server_says_later() -> None:
    node, server = await node_of(size=MiB)
    edge = Edge(node, "test", "file", writable=True)
    answer, held = server.on_request, list[Request]()
    server.on_request = held.append
    flushes = [asyncio.ensure_future(edge.flush()) for _ in range(2)]
    await turns()
    server.codec.reply_error(held[0], errno.EIO, "lost")
    server.codec.reply_done(held[1])
    server.on_request = answer
    server.send()
    flushes += [asyncio.ensure_future(edge.flush()), asyncio.ensure_future(edge.pwrite(0, b"x", fua=True))]
    for flush in flushes:
        with pytest.raises(
            IoError, match=r"'lost'; what was written may be lost: check it, and connect anew$"
        ) as caught:
            await flush
        assert caught.value.errno == errno.EIO
    assert len(await edge.pread(0, 512)) == 512
    await node.close()


async def test_ranges_longer_than_a_request_can_name_are_cut() -> None:
    node, server = await node_of(size=16 * GiB, can_trim=True, contexts=("base:allocation",))
    edge = Edge(node, "test", "file", writable=True)
    await edge.zero(5, 2 * GiB + 1)
    await edge.discard(0, 5 * GiB)
    assert await edge.block_status(0, 8 * GiB) == [Extent(GiB, HOLE | ZERO)]
    assert ranges(server) == [
        (nbd.CMD_WRITE_ZEROES, 5, GiB),
        (nbd.CMD_WRITE_ZEROES, 5 + GiB, GiB),
        (nbd.CMD_WRITE_ZEROES, 5 + 2 * GiB, 1),
        *((nbd.CMD_TRIM, at * GiB, GiB) for at in range(5)),
        (nbd.CMD_BLOCK_STATUS, 0, GiB),
    ]
    await node.close()


async def test_keeping_space_is_asked_for_where_zeroes_must_not_unmap() -> None:
    node, server = await node_of(size=MiB)
    await node.zero(0, 4096, unmap=False)
    await node.zero(0, 4096, unmap=True)
    assert [request.flags for request in server.requests] == [nbd.CMD_FLAG_NO_HOLE, 0]
    await node.close()


async def test_a_server_that_tells_no_status_has_data_everywhere() -> None:
    node, server = await node_of(size=MiB)
    assert await node.block_status(0, MiB) == [Extent(MiB, 0)]
    assert not server.requests
    await node.close()


async def test_a_server_that_cannot_trim_is_not_asked_to() -> None:
    node, server = await node_of(size=MiB, can_trim=False)
    await Edge(node, "test", "file", writable=True).discard(0, MiB)
    assert not server.requests
    await node.close()


async def test_a_read_only_export_is_a_read_only_node_that_is_not_flushed() -> None:
    node, server = await node_of(size=MiB, read_only=True)
    assert node.read_only
    await node.flush()
    assert not server.requests
    await node.close()
