"""Copying and comparing nodes: what is read, what is written, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from fleecer.block.edge import Edge
from fleecer.block.node import Extent, Limits, Node
from fleecer.errors import IoError, UsageError
from fleecer.jobs import transfer
from fleecer.ranges import Buffer
from fleecer.testing.memory import MemoryNode
from fleecer.units import KiB, MiB, TiB


class Watched(MemoryNode):
    """A node that counts, and whose reads wait at `gate` where one is given."""

    def __init__(self, content: int | bytes, gate: asyncio.Event | None = None) -> None:
        super().__init__("watched", content)
        self.gate = gate
        self.read_ranges: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self.reading = self.reading_max = 0

    async def pread(self, offset: int, length: int) -> Buffer:
        self.read_ranges.append((offset, length))
        self.reading += 1
        self.reading_max = max(self.reading, self.reading_max)
        try:
            if self.gate is not None:
                await self.gate.wait()
            return await super().pread(offset, length)
        finally:
            self.reading -= 1

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        self.written.append((offset, len(data)))
        await super().pwrite(offset, data)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        self.zeroed.append((offset, length))
        await super().zero(offset, length, unmap)


class Vast(Node):
    """1 TiB of zeroes with one MiB of data near the end."""

    driver = "vast"
    DATA = TiB - 5 * MiB

    def __init__(self) -> None:
        super().__init__("vast", TiB, limits=Limits(), read_only=True)
        self.status_calls = 0

    async def pread(self, offset: int, length: int) -> Buffer:
        assert offset >= self.DATA
        assert offset + length <= self.DATA + MiB, "only data is read"
        return bytes([7]) * length

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        raise AssertionError("nobody writes here")

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        raise AssertionError("nobody writes here")

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError("nobody writes here")

    async def flush(self) -> None:
        return

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        self.status_calls += 1
        length = min(length, 1 << 30)
        if offset < self.DATA:
            return [Extent(min(length, self.DATA - offset), 3)]
        if offset < self.DATA + MiB:
            return [Extent(min(length, self.DATA + MiB - offset), 0)]
        return [Extent(length, 3)]


class Sink(Vast):
    """As large, and takes writes."""

    def __init__(self) -> None:
        super().__init__()
        self.read_only = False
        self.writes: list[tuple[int, int]] = []

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        self.writes.append((offset, len(data)))


def reading(node: Node) -> Edge:
    return Edge(node, "test", "source")


def writing(node: Node) -> Edge:
    return Edge(node, "test", "target", writable=True)


def disk(seed: int, size: int) -> bytes:
    """Runs of data and of zeroes, none aligned to anything."""
    generator = random.Random(seed)
    content = bytearray()
    while len(content) < size:
        length = generator.randrange(1, 300 * KiB)
        content += bytes(length) if generator.random() < 0.5 else generator.randbytes(length)
    return bytes(content[:size])


@pytest.mark.parametrize("target_is_zero", [True, False])
@pytest.mark.parametrize("size", [1, 4095, MiB, 5 * MiB + 77])
async def test_a_copy_reads_as_its_source_whatever_the_target_held(size: int, target_is_zero: bool) -> None:
    content = disk(size, size)
    target = MemoryNode("target", size if target_is_zero else b"\xaa" * size)
    done = await transfer.copy(reading(MemoryNode("s", content)), writing(target), target_is_zero=target_is_zero)
    assert bytes(target.data) == content
    assert done.read == done.data
    assert done.written <= done.read


async def test_a_larger_target_keeps_what_lies_beyond_the_source() -> None:
    target = MemoryNode("target", b"\xaa" * (2 * MiB))
    await transfer.copy(reading(MemoryNode("s", MiB)), writing(target), target_is_zero=False)
    assert bytes(target.data) == bytes(MiB) + b"\xaa" * MiB


async def test_a_smaller_target_is_refused_before_anything_is_written() -> None:
    target = Watched(MiB - 1)
    with pytest.raises(UsageError, match=r"target 'watched' has 1048575 bytes, too few for the source's 1048576"):
        await transfer.copy(reading(MemoryNode("s", MiB)), writing(target), target_is_zero=True)
    assert not target.written


async def test_holes_are_neither_read_nor_written_and_zeroes_in_data_are_not_written() -> None:
    content = bytearray(8 * MiB)
    content[MiB + 3] = 1  # a page with data among zeroes
    source, target = Watched(bytes(content)), Watched(8 * MiB)
    done = await transfer.copy(reading(source), writing(target), target_is_zero=True)
    assert source.read_ranges == [(MiB, 4 * KiB)]
    assert target.written == [(MiB, 4 * KiB)]
    assert not target.zeroed
    assert (done.data, done.read, done.written) == (4 * KiB, 4 * KiB, 4 * KiB)


class Opaque(Watched):
    """Cannot tell holes from data."""

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, 0)]


async def test_zeroes_found_in_data_are_zeroed_on_a_target_that_held_something() -> None:
    content = disk(3, 3 * MiB + 11)
    target = MemoryNode("target", b"\xaa" * len(content))
    await transfer.copy(reading(Opaque(content)), writing(target), target_is_zero=False)
    assert bytes(target.data) == content


async def test_zeroes_found_in_data_stay_holes() -> None:
    content = bytearray(3 * MiB)
    content[2 * MiB :] = b"\x01" * MiB
    target = Watched(3 * MiB)
    done = await transfer.copy(reading(Opaque(bytes(content))), writing(target), target_is_zero=True)
    assert target.written == [(2 * MiB, MiB)]
    assert (done.read, done.written) == (3 * MiB, MiB)


async def test_the_cost_of_a_tebibyte_of_holes_is_that_of_asking_for_them() -> None:
    source, target = Vast(), Sink()
    done = await transfer.copy(reading(source), writing(target), target_is_zero=True)
    assert done.written == MiB
    assert sum(length for _, length in target.writes) == MiB
    assert source.status_calls < 2100
    assert await transfer.compare(reading(source), reading(Vast())) is None


async def test_several_steps_are_in_flight_but_no_more_than_the_limit() -> None:
    gate = asyncio.Event()
    source = Watched(b"\x01" * (32 * MiB), gate)
    task = asyncio.ensure_future(
        transfer.copy(reading(source), writing(MemoryNode("t", 32 * MiB)), target_is_zero=True)
    )
    while source.reading < transfer.STEPS_AT_ONCE:
        await asyncio.sleep(0)
    gate.set()
    await task
    assert source.reading_max == transfer.STEPS_AT_ONCE


async def test_the_total_is_known_before_the_first_step_and_progress_reaches_it() -> None:
    content = disk(5, 6 * MiB)
    told: list[tuple[int, int]] = []
    await transfer.copy(
        reading(MemoryNode("s", content)),
        writing(MemoryNode("t", 6 * MiB)),
        target_is_zero=True,
        report=lambda progress: told.append((progress.read, progress.data)),
    )
    assert len({data for _, data in told}) == 1
    assert [read for read, _ in told] == sorted(read for read, _ in told)
    assert told[-1][0] == told[-1][1]


async def test_the_first_failure_ends_a_copy_once_what_is_in_flight_has_ended() -> None:
    gate = asyncio.Event()

    class Failing(Watched):
        async def pread(self, offset: int, length: int) -> Buffer:
            if offset == (transfer.STEPS_AT_ONCE - 1) * MiB:
                raise IoError(errno.EIO, "s", "read", offset, length)
            return await super().pread(offset, length)

    source = Failing(b"\x01" * (64 * MiB), gate)
    copying = transfer.copy(reading(source), writing(MemoryNode("t", 64 * MiB)), target_is_zero=True)
    task = asyncio.ensure_future(copying)
    while source.reading < transfer.STEPS_AT_ONCE - 1:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done(), "seven reads are in flight still"
    gate.set()
    with pytest.raises(IoError, match="read of 1048576 bytes at 7340032"):
        await task
    assert not source.reading
    assert len(source.read_ranges) == transfer.STEPS_AT_ONCE - 1, "no step was begun after the failure"


async def test_a_cancelled_copy_ends_once_what_is_in_flight_has_ended() -> None:
    gate = asyncio.Event()
    source, target = Watched(b"\x01" * (64 * MiB), gate), Watched(64 * MiB)
    edge = reading(source)
    task = asyncio.ensure_future(transfer.copy(edge, writing(target), target_is_zero=True))
    while source.reading < transfer.STEPS_AT_ONCE:
        await asyncio.sleep(0)
    for _ in range(2):  # a second one changes nothing
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
    assert not task.done()
    assert edge.busy == transfer.STEPS_AT_ONCE
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not edge.busy
    assert len(source.read_ranges) == transfer.STEPS_AT_ONCE
    assert len(target.written) == transfer.STEPS_AT_ONCE, "what was read was written before it ended"


@pytest.mark.parametrize("at", [0, 4096, 2 * MiB - 1, 3 * MiB + 5])
async def test_comparing_finds_the_byte_that_differs(at: int) -> None:
    content = disk(9, 3 * MiB + 6)
    other = bytearray(content)
    other[at] ^= 1
    assert await transfer.compare(reading(MemoryNode("a", content)), reading(MemoryNode("b", bytes(other)))) == at
    assert await transfer.compare(reading(MemoryNode("a", content)), reading(MemoryNode("b", content))) is None


async def test_comparing_looks_at_data_where_the_other_side_claims_a_hole() -> None:
    content = bytearray(2 * MiB)
    content[MiB + 9] = 1
    left, right = MemoryNode("a", bytes(content)), MemoryNode("b", 2 * MiB)
    assert await transfer.compare(reading(left), reading(right)) == MiB + 9
    assert await transfer.compare(reading(right), reading(left)) == MiB + 9


async def test_empty_disks_are_copied_and_equal() -> None:
    source, target = MemoryNode("a", 0), MemoryNode("b", 0)
    assert (await transfer.copy(reading(source), writing(target), target_is_zero=True)).data == 0
    assert await transfer.compare(reading(source), reading(target)) is None
