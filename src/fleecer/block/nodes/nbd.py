"""nbd: an export of an NBD server as a node (QEMU's driver of that name)."""

from __future__ import annotations

from fleecer.block.node import HOLE, ZERO, Extent, Limits, Node, merge_extents
from fleecer.errors import IoError, told
from fleecer.net.nbd_client import ALLOCATION, NbdClient
from fleecer.ranges import Buffer, align_down, zeroes
from fleecer.units import GiB, MiB
from fleecer.wire.nbd.constants import PAYLOAD_MAX_BYTES

_RANGE_MAX_BYTES = 1 * GiB  # of a request without payload: its length has 32 bits
_ZEROES_MAX_BYTES = 1 * MiB  # zeroes written out at once, where the server has no command for it


class NbdNode(Node):
    """A connection to an export, which it owns. A tail shorter than the server's block is cut.

    The first failed flush is final, whatever the server says to the next: it may have lost what was written before.
    """

    driver = "nbd"

    __slots__ = ("_client", "_poison")

    def __init__(self, name: str, client: NbdClient, *, read_only: bool = False) -> None:
        info = client.info
        unit = info.block_size_min
        limits = Limits(
            request_alignment_bytes=unit,
            preferred_bytes=info.block_size_preferred,
            transfer_max_bytes=align_down(min(info.block_size_max, PAYLOAD_MAX_BYTES), unit),
            zero_is_fast=client.can_zero,
            can_discard=client.can_trim,
        )
        super().__init__(name, align_down(info.size, unit), limits=limits, read_only=read_only or info.read_only)
        self._client = client
        self._poison: IoError | None = None

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        return await self._client.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        await self._client.pwrite(offset, data)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        step = _RANGE_MAX_BYTES if self._client.can_zero else _ZEROES_MAX_BYTES
        for start in range(offset, offset + length, step):
            size = min(step, offset + length - start)
            if self._client.can_zero:
                await self._client.zero(start, size, unmap=unmap)
            else:
                await self._client.pwrite(start, zeroes(size))

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        for start in range(offset, offset + length, _RANGE_MAX_BYTES):
            await self._client.trim(start, min(_RANGE_MAX_BYTES, offset + length - start))

    async def flush(self) -> None:
        """See `Node.flush`. A server without the command keeps nothing back."""
        if not self._client.can_flush or self.read_only:
            return
        if self._poison is None:
            try:
                await self._client.flush()
            except IoError as error:
                self._poison = self._poison or error
        if self._poison is not None:  # one that was sent before another failed proves nothing either
            detail = f"{told(self._poison)}; what was written may be lost: check it, and connect anew"
            raise IoError(self._poison.errno, self.name, "flush", detail=detail)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`. A server that cannot tell has data everywhere."""
        length = min(length, _RANGE_MAX_BYTES)
        if ALLOCATION not in self._client.contexts:
            return [Extent(length, 0)]
        runs = (await self._client.block_status(offset, length))[ALLOCATION]
        return merge_extents([Extent(run, flags & (HOLE | ZERO)) for run, flags in runs])

    async def close(self) -> None:
        """See `Node.close`."""
        await self._client.close()
