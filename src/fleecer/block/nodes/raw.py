"""raw: the format that is none (QEMU's driver of that name): the child's bytes, under a name of their own."""

from __future__ import annotations

from fleecer.block.node import ReadAtOnce, WriteAtOnce
from fleecer.block.nodes.filter import FilterNode
from fleecer.ranges import Buffer


class RawNode(FilterNode):
    """Hands everything on."""

    driver = "raw"

    __slots__ = ()

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """See `Node.try_pread`."""
        return self.child.try_pread(offset, length)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """See `Node.try_pwrite`."""
        return self.child.try_pwrite(offset, data)

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`."""
        return self.child.reader()

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`."""
        return self.child.writer()
