"""copy-before-write: the filter above a live disk that keeps its past (QEMU's driver of that name).

Every change that passes is preceded by a copy of the old data for each snapshot that still needs it; copier.py has the
rules. Discards and zeroes are changes like any other. Without a snapshot the filter adds one comparison a request.
"""

from __future__ import annotations

from fleecer.block.copier import Copier
from fleecer.block.nodes.filter import FilterNode
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce
from fleecer.storage.api import Ended, ReadEnded


class CopyBeforeWriteNode(FilterNode):
    """The filter. `copier.source` is its one child, which nobody else may write to: its edge does not share writing.

    `shared` says that any number of snapshots may use the one copy that this filter makes: each is read only through
    snapshot-access. A target that is read directly needs a filter that is not.
    """

    driver = "copy-before-write"

    __slots__ = ("copier", "shared")

    def __init__(self, name: str, copier: Copier, *, shared: bool = False) -> None:
        super().__init__(name, copier.source)
        self.copier = copier
        self.shared = shared

    def follow_scratches(self) -> None:
        """Makes `children` name the disk and every scratch held: after each change of the copier's snapshots."""
        self.children = (self.child, *(snapshot.scratch for snapshot in self.copier.snapshots))

    def reader(self) -> ReadAtOnce | None:
        """See `Node.reader`."""
        return self.child.reader()

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Node.begin_pread`."""
        return self.child.begin_pread(offset, length, ended)

    def begin_flush(self, ended: Ended) -> bool:
        """See `Node.begin_flush`."""
        return self.child.begin_flush(ended)

    def writer(self) -> WriteAtOnce | None:
        """See `Node.writer`: what must be preserved first may have to wait."""
        write = self.child.writer()
        return self.copier.writer(write) if write is not None else None

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """Preserves the range for the snapshots, then writes. Raises before anything changed if preserving may fail."""
        if self.copier.must_preserve(offset, len(data)):
            await self.copier.preserve(offset, len(data))
        await self.child.pwrite(offset, data, serialising=serialising)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """As `pwrite`."""
        if self.copier.must_preserve(offset, length):
            await self.copier.preserve(offset, length)
        await self.child.zero(offset, length, unmap, serialising=serialising)

    async def discard(self, offset: int, length: int) -> None:
        """As `pwrite`: a discard may change what is read."""
        if self.copier.must_preserve(offset, length):
            await self.copier.preserve(offset, length)
        await self.child.discard(offset, length)
