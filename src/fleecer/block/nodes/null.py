"""null-co: takes every write and keeps none; for measuring, and as a sink (QEMU's driver of that name)."""

from __future__ import annotations

import asyncio

from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node
from fleecer.ranges import Buffer, zeroes


class NullNode(Node):
    """`size` bytes of nothing; every read gives zeroes, each request taking `latency_s`.

    `read_zeroes` says so in block status too; without, a reader must ask for the bytes.
    """

    driver = "null-co"

    __slots__ = ("_flags", "_latency_s")

    def __init__(self, name: str, size: int, *, read_zeroes: bool = True, latency_s: float = 0.0) -> None:
        super().__init__(name, size, limits=Limits(reads_zero_when_new=read_zeroes))
        self._flags = HOLE | ZERO if read_zeroes else 0
        self._latency_s = latency_s

    async def pread(self, offset: int, length: int) -> Buffer:
        """Zeroes."""
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        return zeroes(length)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """Forgets `data`."""
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """Nothing to do."""
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def discard(self, offset: int, length: int) -> None:
        """Nothing to do."""
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def flush(self) -> None:
        """Nothing to do."""
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """One run."""
        return [Extent(length, self._flags)]
