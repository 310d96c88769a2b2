"""log: a filter that writes a line for each request as it ends; for finding out what a client really does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fleecer.block.edge import Edge
from fleecer.block.node import Extent
from fleecer.block.nodes.fault import Operation
from fleecer.block.nodes.filter import FilterNode
from fleecer.errors import told
from fleecer.ranges import Buffer

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class LogNode(FilterNode):
    """Writes lines such as "disk0 read 4096+512 ok 0.000031 s"; a failure's text stands where "ok" is.

    `write_line` takes the text without a newline; by default it goes to this module's logger, at level debug.
    """

    driver = "log"

    __slots__ = ("_write_line",)

    def __init__(self, name: str, child: Edge, write_line: Callable[[str], None] = _logger.debug) -> None:
        super().__init__(name, child)
        self._write_line = write_line

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        return await self._logged("read", offset, length, self.child.pread(offset, length))

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        await self._logged("write", offset, len(data), self.child.pwrite(offset, data, serialising=serialising))

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        request = self.child.zero(offset, length, unmap, serialising=serialising)
        await self._logged("write zeroes", offset, length, request)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        await self._logged("discard", offset, length, self.child.discard(offset, length))

    async def flush(self) -> None:
        """See `Node.flush`."""
        await self._logged("flush", 0, 0, self.child.flush())

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`."""
        return await self._logged("block status", offset, length, self.child.block_status(offset, length))

    async def _logged(self, operation: Operation, offset: int, length: int, request: Awaitable[T]) -> T:
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        outcome = "ok"
        try:
            return await request
        except BaseException as error:
            outcome = told(error)
            raise
        finally:
            place = f" {offset}+{length}" if length else ""
            self._write_line(f"{self.name} {operation}{place} {outcome} {clock() - begun_s:.6f} s")
