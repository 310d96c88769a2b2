"""The base of filters: nodes with one child that hand every request on, changed or not.

A filter has the size and the abilities of its child. Alignment is left to the door below: if the filter had the
child's, a partial write would be padded, and its unit held, up here, where others who write to the child do not see it.
"""

from __future__ import annotations

import dataclasses

from fleecer.block.edge import Edge
from fleecer.block.node import Extent, Node
from fleecer.ranges import Buffer


class FilterNode(Node):
    """Hands everything on to `child`. Subclasses override what they change."""

    __slots__ = ("child",)

    def __init__(self, name: str, child: Edge) -> None:
        self.child = child
        limits = dataclasses.replace(child.node.limits, request_alignment_bytes=1)
        super().__init__(name, child.size, limits=limits, read_only=not child.writable)
        self.children = (child,)

    @property
    def size(self) -> int:
        """The child's size, which may grow under the filter."""
        return self.child.size

    @size.setter
    def size(self, size: int) -> None:
        assert size == self.child.size, "a filter has no size of its own"

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        return await self.child.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        await self.child.pwrite(offset, data, serialising=serialising)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        await self.child.zero(offset, length, unmap, serialising=serialising)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        await self.child.discard(offset, length)

    async def flush(self) -> None:
        """See `Node.flush`."""
        await self.child.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`."""
        return await self.child.block_status(offset, length)
