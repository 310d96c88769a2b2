"""raw: the format that is none (QEMU's driver of that name): the child's bytes, under a name of their own."""

from __future__ import annotations

from fleecer.block.nodes.filter import FilterNode
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce
from fleecer.storage.api import Ended, ReadEnded


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

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Node.begin_pread`."""
        return self.child.begin_pread(offset, length, ended)

    def begin_flush(self, ended: Ended) -> bool:
        """See `Node.begin_flush`."""
        return self.child.begin_flush(ended)

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`."""
        return self.child.writer()

    def serialising_writer(self) -> WriteAtOnce | None:
        """See `Node.serialising_writer`."""
        return self.child.serialising_writer()
