"""delay: a filter that makes requests slower, by their kind; for measuring and for tests of slow disks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fleecer.block.edge import Edge
from fleecer.block.node import Extent
from fleecer.block.nodes.fault import Operation
from fleecer.block.nodes.filter import FilterNode
from fleecer.ranges import Buffer


class DelayNode(FilterNode):
    """Each request waits as long as `delays_s` says for its kind (nothing: not at all), then goes on.

    Requests wait side by side, not one after the other.
    """

    driver = "delay"

    __slots__ = ("delays_s",)

    def __init__(self, name: str, child: Edge, delays_s: Mapping[Operation, float]) -> None:
        super().__init__(name, child)
        self.delays_s = dict(delays_s)

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        await self._wait("read")
        return await self.child.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        await self._wait("write")
        await self.child.pwrite(offset, data, serialising=serialising)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        await self._wait("write zeroes")
        await self.child.zero(offset, length, unmap, serialising=serialising)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        await self._wait("discard")
        await self.child.discard(offset, length)

    async def flush(self) -> None:
        """See `Node.flush`."""
        await self._wait("flush")
        await self.child.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`."""
        await self._wait("block status")
        return await self.child.block_status(offset, length)

    async def _wait(self, operation: Operation) -> None:
        delay_s = self.delays_s.get(operation, 0.0)
        if delay_s > 0:
            await asyncio.sleep(delay_s)
