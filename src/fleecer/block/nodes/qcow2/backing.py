"""What shows through an image where it has nothing of its own: its backing node, and past the end of that zeroes."""

from __future__ import annotations

from fleecer.block.edge import Edge
from fleecer.block.node import HOLE, ZERO, Extent
from fleecer.ranges import Buffer, zeroes


async def read_backing(backing: Edge | None, offset: int, length: int) -> Buffer:
    """The bytes there. Not private where all of them are zeroes."""
    backed = 0 if backing is None else min(max(backing.size - offset, 0), length)
    if not backed or backing is None:
        return zeroes(length)
    data = await backing.pread(offset, backed)
    return data if backed == length else b"".join((data, zeroes(length - backed)))


async def backing_status(backing: Edge | None, offset: int, length: int, extents_max: int) -> list[Extent]:
    """What the range holds, in order; may stop early after `extents_max` extents."""
    end = offset + length
    backed_end = min(end, max(backing.size, offset)) if backing is not None else offset
    extents: list[Extent] = []
    while backing is not None and offset < backed_end:
        for extent in await backing.block_status(offset, backed_end - offset):
            extents.append(extent)
            offset += extent.length
        if len(extents) >= extents_max:
            return extents
    extents.append(Extent(end - offset, HOLE | ZERO))
    return extents
