"""The door: bounds, permission, counting, drain, splitting and padding, on nodes that check what reaches them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecer import eager
from fleecer.block.edge import Edge
from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, merge_extents
from fleecer.errors import IoError, PermissionConflict
from fleecer.ranges import Buffer, align_up, is_zero
from fleecer.testing.memory import Pause, random_turns


class StrictNode(Node):
    """Bytes in memory. Fails the test for any request that a node may rely on never seeing; records all others."""

    driver = "strict"

    def __init__(self, content: int | bytes, limits: Limits, *, read_only: bool = False, pause: Pause | None = None):
        self.data = bytearray(content)
        super().__init__("strict0", len(self.data), limits=limits, read_only=read_only)
        self.pause = pause
        self.seen: list[tuple[str, int, int]] = []
        self.serialising: list[bool] = []
        self.error: IoError | None = None

    async def _enter(self, operation: str, offset: int, length: int, end_max: int) -> None:
        alignment = self.limits.request_alignment_bytes
        assert offset >= 0
        assert length > 0
        assert offset % alignment == 0
        assert length % alignment == 0
        assert offset + length <= end_max
        if operation in {"read", "write"}:
            assert length <= self.limits.transfer_max_bytes
        await self._begin(operation, offset, length)

    async def _begin(self, operation: str, offset: int, length: int) -> None:
        self.seen.append((operation, offset, length))
        if self.pause is not None:
            await self.pause()
        if self.error is not None:
            raise self.error

    @property
    def end(self) -> int:
        return align_up(self.size, self.limits.request_alignment_bytes)

    @property
    def write_end(self) -> int:
        return 1 << 60 if self.limits.growable else self.end

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._enter("read", offset, length, self.end)
        data = bytes(self.data[offset : offset + length])
        if self.pause is not None:
            await self.pause()
        return data + bytes(length - len(data))

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        await self._enter("write", offset, len(data), self.write_end)
        self.serialising.append(serialising)
        self._put(offset, data)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        await self._enter("zero", offset, length, self.write_end)
        self.serialising.append(serialising)
        self._put(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self._enter("discard", offset, length, self.end)
        self._put(offset, bytes(length))

    async def flush(self) -> None:
        await self._begin("flush", 0, 0)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._enter("status", offset, length, self.end)
        unit = self.limits.request_alignment_bytes
        kinds = [
            Extent(unit, HOLE | ZERO if is_zero(self.data[at : at + unit]) else 0)
            for at in range(offset, offset + length, unit)
        ]
        return merge_extents(kinds)

    def _put(self, offset: int, data: Buffer) -> None:
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data
        if self.limits.growable:
            self.size = max(self.size, offset + len(data))


def strict(content: int | bytes, alignment: int = 1, transfer_max: int = 1 << 25, **options: Any) -> StrictNode:
    names = {"growable", "zero_is_fast", "can_discard"} & options.keys()
    limits = Limits(
        request_alignment_bytes=alignment,
        transfer_max_bytes=transfer_max,
        **{name: options.pop(name) for name in names},
    )
    return StrictNode(content, limits, **options)


def edge_to(node: Node, *, writable: bool = True, may_grow: bool = False) -> Edge:
    return Edge(node, "the test", "disk", writable=writable, may_grow=may_grow)


SIZES = st.sampled_from([8192, 8192 + 512, 12288 + 100, 5000])
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "discard", "status"]), st.integers(0, 13_000), st.integers(1, 13_000)
    ),
    max_size=12,
)


@given(size=SIZES, alignment=st.sampled_from([1, 512, 4096]), units=st.sampled_from([1, 2, 100]), requests=REQUESTS)
@settings(deadline=None)
def test_requests_of_any_shape_reach_the_node_in_its_shape_and_do_what_they_say(
    size: int, alignment: int, units: int, requests: list[tuple[str, int, int]]
) -> None:
    async def main() -> None:
        content = bytes(i % 251 + 1 for i in range(size))
        node = strict(content, alignment, max(alignment, 512) * units)
        edge, model = edge_to(node), bytearray(content)
        for number, (operation, position, wanted) in enumerate(requests):
            offset = position % size
            length = min(wanted, size - offset)
            end = offset + length
            if operation == "read":
                assert await edge.pread(offset, length) == model[offset:end]
            elif operation == "write":
                await edge.pwrite(offset, bytes([number + 1]) * length)
                model[offset:end] = bytes([number + 1]) * length
            elif operation == "zero":
                await edge.zero(offset, length)
                model[offset:end] = bytes(length)
            elif operation == "discard":
                await edge.discard(offset, length)
                start, stop = align_up(offset, alignment), end - end % alignment
                if start < stop:
                    model[start:stop] = bytes(stop - start)
            else:
                extents = await edge.block_status(offset, length)
                assert sum(extent.length for extent in extents) == length
                at = offset
                for extent in extents:
                    assert not extent.flags & ZERO or is_zero(model[at : at + extent.length])
                    at += extent.length
            assert node.data[:size] == model
        assert edge.busy == 0
        assert node.padding is None or len(node.padding) == 0

    asyncio.run(main())


async def test_a_request_that_fits_ends_without_waiting() -> None:
    node = strict(1 << 20)
    edge = edge_to(node)
    ended: list[str] = []

    async def all_six() -> None:
        await edge.pwrite(3, b"abc", fua=True)
        assert await edge.pread(3, 3) == b"abc"
        await edge.zero(0, 100)
        await edge.discard(0, 100)
        await edge.flush()
        await edge.block_status(0, 100)
        ended.append("all")

    assert eager.start(all_six()) is None
    assert ended == ["all"]
    padded = edge_to(strict(1 << 20, 512))
    assert eager.start(padded.pwrite(3, b"abc")) is None


async def test_long_requests_are_split_at_multiples_of_the_longest_transfer() -> None:
    node = strict(bytes(range(256)) * 64, transfer_max=4096)
    edge = edge_to(node)
    assert await edge.pread(100, 10_000) == node.data[100:10_100]
    assert node.seen == [("read", 100, 3996), ("read", 4096, 4096), ("read", 8192, 1908)]
    node.seen.clear()
    await edge.pwrite(4096, b"x" * 8192, serialising=True)
    assert node.seen == [("write", 4096, 4096), ("write", 8192, 4096)]
    assert node.serialising == [True, True]


@pytest.mark.parametrize("seed", range(10))
async def test_concurrent_writes_within_one_unit_do_not_lose_each_other(seed: int) -> None:
    node = strict(8192, 4096, pause=random_turns(seed))
    edges = [edge_to(node), edge_to(node)]  # the claims belong to the node, not to an edge
    writes: list[Coroutine[Any, Any, None]] = [
        edges[i % 2].pwrite(i * 37 % 8192, bytes([i + 1]), serialising=i % 3 == 0) for i in range(100)
    ]
    await asyncio.gather(*writes)
    assert {node.data[i * 37 % 8192] for i in range(100)} == set(range(1, 101))


@pytest.mark.parametrize("seed", range(10))
async def test_an_aligned_write_is_not_undone_by_a_padded_neighbour(seed: int) -> None:
    node = strict(8192, 512, pause=random_turns(seed))
    edge = edge_to(node)
    await asyncio.gather(
        edge.pwrite(5, b"a"), edge.pwrite(0, b"b" * 1024), edge.zero(4096, 512), edge.pwrite(4100, b"c")
    )
    assert node.data[:5] + node.data[6:1024] == b"b" * 1023
    assert node.data[5] in b"ab"
    assert is_zero(node.data[4096:4100])
    assert is_zero(node.data[4101:4608])


@pytest.mark.parametrize("operation", ["discard", "zero"])
async def test_a_unit_that_a_padded_write_has_read_is_not_emptied_before_it_is_written(operation: str) -> None:
    """Else the write would bring back what a reader has already seen gone."""
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        reading.set()
        await go_on.wait()

    node = strict(b"o" * 1024, 512, pause=pause)
    edge = edge_to(node)
    write = asyncio.create_task(edge.pwrite(10, b"n"))
    await reading.wait()
    emptying = asyncio.create_task(edge.discard(0, 512) if operation == "discard" else edge.zero(0, 512))
    for _ in range(5):
        await asyncio.sleep(0)
    assert node.seen == [("read", 0, 512)]
    go_on.set()
    await asyncio.gather(write, emptying)
    assert [seen for seen, _, _ in node.seen] == ["read", "write", operation]
    assert is_zero(node.data[:512])


async def test_a_padded_write_past_the_end_of_a_growing_node_reads_nothing_there() -> None:
    node = strict(b"x" * 1024, 512, growable=True)
    edge = edge_to(node, may_grow=True)
    await edge.pwrite(3000, b"abc")
    assert node.seen == [("write", 2560, 512)]
    node.seen.clear()
    await edge.pwrite(1000, b"y" * 2000)
    assert [seen for seen in node.seen if seen[0] == "read"] == [("read", 512, 512), ("read", 2560, 512)]
    assert node.data == b"x" * 1000 + b"y" * 2000 + b"abc" + bytes(69)
    assert node.size == 3072


async def test_zero_is_padded_with_writes_and_keeps_the_rest() -> None:
    node = strict(b"x" * 4096, 512)
    await edge_to(node).zero(500, 1100)
    assert node.data == b"x" * 500 + bytes(1100) + b"x" * 2496
    assert ("zero", 512, 1024) in node.seen
    await edge_to(node).zero(2000, 4)
    assert is_zero(node.data[2000:2004])
    assert node.data[1999] == node.data[2004] == ord("x")


async def test_serialising_reaches_the_node() -> None:
    for alignment in (1, 512):
        node = strict(4096, alignment)
        edge = edge_to(node)
        await edge.pwrite(0, bytes(512), serialising=True)
        await edge.zero(0, 512, serialising=True)
        await edge.pwrite(0, bytes(512))
        assert node.serialising == [True, True, False]


async def test_fua_flushes_after_the_change_and_not_after_a_failed_one() -> None:
    node = strict(4096)
    edge = edge_to(node)
    await edge.pwrite(0, b"x", fua=True)
    await edge.zero(0, 1, fua=True)
    await edge.discard(0, 1, fua=True)
    assert [operation for operation, _, _ in node.seen] == ["write", "flush", "zero", "flush", "discard", "flush"]
    node.seen.clear()
    node.error = IoError(errno.ENOSPC, "strict0", "write")
    with pytest.raises(IoError):
        await edge.pwrite(0, b"x", fua=True)
    assert ("flush", 0, 0) not in node.seen
    assert edge.busy == 0


@pytest.mark.parametrize(
    ("request_of", "code", "text"),
    [
        (lambda e: e.pread(4095, 2), errno.EINVAL, "read of 2 bytes at 4095 on 'strict0': the range passes the end"),
        (lambda e: e.pread(-1, 1), errno.EINVAL, "at -1"),
        (lambda e: e.pwrite(4096, b"x"), errno.ENOSPC, "write of 1 bytes at 4096"),
        (lambda e: e.zero(0, 4097), errno.ENOSPC, "the end at 4096 bytes"),
        (lambda e: e.discard(4000, 1000), errno.EINVAL, "discard of 1000 bytes"),
        (lambda e: e.block_status(4096, 1), errno.EINVAL, "block status of 1 bytes"),
    ],
)
async def test_a_request_outside_the_node_is_refused(request_of: Any, code: int, text: str) -> None:
    node = strict(4096)
    edge = edge_to(node)
    with pytest.raises(IoError, match=text) as caught:
        await request_of(edge)
    assert caught.value.errno == code
    assert node.seen == []
    assert edge.busy == 0


async def test_an_empty_request_does_nothing() -> None:
    node = strict(4096)
    edge = edge_to(node)
    assert len(await edge.pread(0, 0)) == 0
    await edge.pwrite(0, b"")
    await edge.zero(0, 0)
    await edge.discard(0, 0)
    assert node.seen == []


async def test_an_edge_without_write_permission_changes_nothing() -> None:
    node = strict(4096)
    edge = edge_to(node, writable=False)
    for request in (edge.pwrite(0, b"x"), edge.zero(0, 1), edge.discard(0, 512)):
        with pytest.raises(IoError, match=r"the test \(disk\) may only read") as caught:
            await request
        assert caught.value.errno == errno.EPERM
    assert node.seen == []


async def test_a_writing_edge_does_not_take_a_read_only_node() -> None:
    with pytest.raises(PermissionConflict, match="read-only"):
        edge_to(strict(4096, read_only=True))


async def test_a_fast_zero_is_refused_where_there_is_none_and_nothing_is_touched() -> None:
    node = strict(4096, zero_is_fast=False)
    with pytest.raises(IoError) as caught:
        await edge_to(node).zero(0, 4096, fast_only=True)
    assert caught.value.errno == errno.ENOTSUP
    assert node.seen == []


async def test_discard_spares_units_that_are_only_partly_inside() -> None:
    node = strict(b"x" * 2048, 512)
    edge = edge_to(node)
    await edge.discard(1, 1022)
    assert node.seen == []
    await edge.discard(1, 1535)
    assert node.seen == [("discard", 512, 1024)]
    unable = strict(b"x" * 2048, can_discard=False)
    await edge_to(unable).discard(0, 2048, fua=True)
    assert unable.seen == [("flush", 0, 0)]


async def test_drain_waits_for_requests_in_flight_and_holds_new_ones_back_in_order() -> None:
    turn = asyncio.Event()
    node = strict(4096, pause=turn.wait)
    edge = edge_to(node)
    running = asyncio.create_task(edge.pwrite(0, b"1"))
    await asyncio.sleep(0)
    edge.close_gate()
    idle = asyncio.create_task(edge.idle())
    held = [asyncio.create_task(edge.pwrite(i, b"2")) for i in range(1, 5)]
    held.append(asyncio.create_task(edge.flush()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not idle.done()
    assert edge.busy == 1
    turn.set()
    await asyncio.gather(running, idle)
    assert node.seen == [("write", 0, 1)]
    assert edge.busy == 0
    await edge.idle()  # a second waiter finds it idle at once
    edge.open_gate()
    await asyncio.gather(*held)
    assert node.seen[1:] == [("write", 1, 1), ("write", 2, 1), ("write", 3, 1), ("write", 4, 1), ("flush", 0, 0)]


async def test_idle_is_told_for_every_kind_of_request_failed_ones_too() -> None:
    turn = asyncio.Event()
    node = strict(4096, pause=turn.wait)
    node.error = IoError(errno.EIO, "strict0", "any")
    edge = edge_to(node)
    requests: list[Coroutine[Any, Any, object]] = [
        edge.pread(0, 1),
        edge.pwrite(0, b"x"),
        edge.zero(0, 1),
        edge.discard(0, 1),
        edge.block_status(0, 1),
        edge.flush(),
    ]
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    assert edge.busy == len(tasks)
    edge.close_gate()
    idle = asyncio.create_task(edge.idle())
    await asyncio.sleep(0)
    turn.set()
    await idle
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, IoError) for result in results)
    edge.open_gate()


async def test_requests_held_at_the_gate_go_to_the_node_that_was_put_in_meanwhile() -> None:
    old, new = strict(4096), strict(8192)
    edge = edge_to(old)
    edge.close_gate()
    held = asyncio.create_task(edge.pwrite(5000, b"x"))
    cancelled = asyncio.create_task(edge.pread(0, 1))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    await edge.idle()
    edge.node = new
    edge.open_gate()
    await held
    assert old.seen == []
    assert new.seen == [("write", 5000, 1)]
    assert edge.size == 8192
    assert cancelled.cancelled()


async def test_a_gate_closed_again_at_once_lets_nobody_slip_through() -> None:
    node = strict(4096)
    edge = edge_to(node)
    edge.close_gate()
    held = asyncio.create_task(edge.pread(0, 1))
    await asyncio.sleep(0)
    edge.open_gate()
    edge.close_gate()
    for _ in range(5):
        await asyncio.sleep(0)
    assert node.seen == []
    edge.open_gate()
    await held
    assert node.seen == [("read", 0, 1)]


async def test_a_node_is_not_swapped_under_a_running_request() -> None:
    turn = asyncio.Event()
    edge = edge_to(strict(4096, pause=turn.wait))
    running = asyncio.create_task(edge.pread(0, 1))
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="1 requests in flight"):
        edge.node = strict(4096)
    turn.set()
    await running


async def test_status_of_a_padded_node_is_cut_to_what_was_asked() -> None:
    node = strict(bytes(512) + b"x" * 512 + bytes(1024), 512)
    edge = edge_to(node)
    assert await edge.block_status(100, 1000) == [Extent(412, HOLE | ZERO), Extent(512, 0), Extent(76, HOLE | ZERO)]
    assert await edge.block_status(600, 1) == [Extent(1, 0)]
