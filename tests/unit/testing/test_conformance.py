"""The conformance suite against nodes that break the contract: each must be caught, by the case that names the rule."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fleecer.block.node import HOLE, ZERO, Extent, Node
from fleecer.ranges import Buffer
from fleecer.storage.api import StorageLimits
from fleecer.testing.conformance import CASES, Subject, check_node
from fleecer.testing.memory import MemoryNode, random_turns

SIZE = 300 * 1024


class Recycles(MemoryNode):
    """Returns one buffer again and again."""

    buffer = bytearray(SIZE)

    async def pread(self, offset: int, length: int) -> Buffer:
        self.buffer[:length] = await super().pread(offset, length)
        return memoryview(self.buffer)[:length]


class HandsOutItself(MemoryNode):
    """Returns a window on its own memory."""

    async def pread(self, offset: int, length: int) -> Buffer:
        return memoryview(self.data)[offset : offset + length]


class KeepsTheCallersBuffer(MemoryNode):
    """Reads what was written last from the buffer it was given."""

    last: tuple[int, Buffer] | None = None

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        await super().pwrite(offset, data, serialising)
        self.last = (offset, data)

    async def pread(self, offset: int, length: int) -> Buffer:
        if self.last is not None and (offset, length) == (self.last[0], len(self.last[1])):
            return bytes(self.last[1])
        return await super().pread(offset, length)


class ZeroesTooMuch(MemoryNode):
    """Rounds zero outward to 512 bytes."""

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        end = min(-(-(offset + length) // 512) * 512, self.size)
        await super().zero(offset, end - offset, unmap, serialising)


class ForgetsZeroesThatStayAllocated(MemoryNode):
    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        if unmap:
            await super().zero(offset, length, unmap, serialising)


class DiscardsIntoGarbage(MemoryNode):
    async def discard(self, offset: int, length: int) -> None:
        await self.pwrite(offset, b"\xdd" * length)


class DiscardsOutward(MemoryNode):
    async def discard(self, offset: int, length: int) -> None:
        start = offset // 4096 * 4096
        await self.zero(start, min(-(-(offset + length) // 4096) * 4096, self.size) - start)


class LiesAboutZeroes(MemoryNode):
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, HOLE | ZERO)]


class TellsTooMuch(MemoryNode):
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length + 512, 0)]


class TellsNothing(MemoryNode):
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return []


class DoesNotMerge(MemoryNode):
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(1, 0), Extent(length - 1, 0)] if length > 1 else [Extent(1, 0)]


class DropsTheLastByte(MemoryNode):
    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        if offset + len(data) == self.size:
            data = memoryview(data)[:-1]
        if len(data):
            await super().pwrite(offset, data, serialising)


class Grows(MemoryNode):
    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        await super().pwrite(offset, data, serialising)
        if offset + len(data) == self.size:
            self.size += 512
            self.data.extend(bytes(512))


class LosesNeighbours(MemoryNode):
    """Reads, changes and writes pages without holding them."""

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        start, stop = offset // 4096 * 4096, min(-(-(offset + len(data)) // 4096) * 4096, self.size)
        page = bytearray(await super().pread(start, stop - start))
        page[offset - start : offset - start + len(data)] = data
        await super().pwrite(start, page, serialising)


class FlushesTwiceBadly(MemoryNode):
    async def flush(self) -> None:
        await super().flush()
        self.data[5000] ^= 1


BREAKERS: list[tuple[type[MemoryNode], str]] = [
    (Recycles, "reads are private"),
    (HandsOutItself, "reads are private"),
    (KeepsTheCallersBuffer, "written data is not kept"),
    (ZeroesTooMuch, "zeroes read as zero"),
    (ZeroesTooMuch, "random requests match a model"),
    (ForgetsZeroesThatStayAllocated, "zeroes read as zero"),
    (DiscardsIntoGarbage, "discards leave zero or old"),
    (DiscardsOutward, "discards leave zero or old"),
    (LiesAboutZeroes, "status never lies"),
    (TellsTooMuch, "status never lies"),
    (TellsNothing, "status never lies"),
    (DoesNotMerge, "status never lies"),
    (DropsTheLastByte, "requests at the end are right"),
    (Grows, "requests at the end are right"),
    (LosesNeighbours, "neighbours in one sector keep their bytes"),
    (LosesNeighbours, "disjoint requests do not disturb each other"),
    (FlushesTwiceBadly, "flush may be repeated"),
]


@pytest.mark.parametrize(("kind", "case"), BREAKERS, ids=lambda value: getattr(value, "__name__", value))
async def test_a_node_that_breaks_the_contract_is_caught(kind: type[MemoryNode], case: str) -> None:
    @contextlib.asynccontextmanager
    async def make(directory: str) -> AsyncIterator[Node]:
        pause = random_turns(3) if kind is LosesNeighbours else None
        yield kind("broken0", SIZE, pause=pause)

    with pytest.raises(AssertionError):
        await check_node(Subject(kind.__name__, make), case, "")


async def test_torn_sectors_are_caught() -> None:
    class Torn(MemoryNode):
        """Writes its bytes in two halves of a sector, and does not keep others out meanwhile."""

        async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
            for start in range(0, len(data), 256):
                self.data[offset + start : offset + start + 256] = data[start : start + 256]
                await random_turns(start)()

        async def pread(self, offset: int, length: int) -> Buffer:
            return bytes(self.data[offset : offset + length])

    @contextlib.asynccontextmanager
    async def make(directory: str) -> AsyncIterator[Node]:
        yield Torn("broken0", SIZE)

    with pytest.raises(AssertionError, match="is torn"):
        await check_node(Subject("torn", make), "overlapping requests leave old or new sectors", "")


async def test_a_node_too_small_to_be_checked_is_refused(tmp_path: Path) -> None:
    @contextlib.asynccontextmanager
    async def make(directory: str) -> AsyncIterator[Node]:
        yield MemoryNode("small0", 4096, limits=StorageLimits())

    for case in CASES:
        with pytest.raises(AssertionError, match="the node has 4096 bytes, the checks need 262144"):
            await check_node(Subject("small", make), case, str(tmp_path))
