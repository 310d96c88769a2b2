"""raw: the format that is none (QEMU's driver of that name): the child's bytes, under a name of their own."""

from __future__ import annotations

from fleecer.block.node import ReadAtOnce, WriteAtOnce
from fleecer.block.nodes.filter import FilterNode
from fleecer.ranges import Buffer


class RawNode(FilterNode):
    """Hands everything on."""

    driver = "raw"

    __slots__ = ()

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`."""
        return self.child.reader()

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`. The door above has tried at once, which is to try the child."""
        return await self.child.pread(offset, length, tried=True)

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`."""
        return self.child.writer()
