"""raw: the format that is none (QEMU's driver of that name): the child's bytes, under a name of their own."""

from __future__ import annotations

from fleecer.block.node import ReadAtOnce, WriteAtOnce
from fleecer.block.nodes.filter import FilterNode


class RawNode(FilterNode):
    """Hands everything on."""

    driver = "raw"

    __slots__ = ()

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`."""
        return self.child.reader()

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`."""
        return self.child.writer()
