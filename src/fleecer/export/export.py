"""An export: one node offered under a name. Turns a request into a call on its edge, and knows no sockets or bytes.

Invariants: a request reaches the node only through the edge; what `execute` returns belongs to the caller alone.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping

from fleecer.block.edge import Edge
from fleecer.block.node import Extent
from fleecer.errors import FleecerError, IoError
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ExportInfo, Request
from fleecer.wire.nbd.constants import (
    BLOCK_SIZE_MIN_MAX,
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    PAYLOAD_MAX_BYTES,
)

ALLOCATION = "base:allocation"

StatusSource = Callable[[int, int], Awaitable[list[Extent]]]
"""Tells the extents of one metadata context over (offset, length)."""

STATUS_EXTENTS_MAX = 16 * KiB
"""Extents gathered for one reply: enough for any client, few enough to be quick."""


class Export:
    """One export. `edge` is its hold on the node; closing it is the owner's business.

    `contexts` are metadata contexts beside base:allocation. `snapshot_of` is the disk's name where this is a snapshot
    of it, else "". The counters are totals since the export was made. `on_failure` is told of requests that fail on
    the node (whether it was a read, and why); it must not raise or wait.
    """

    __slots__ = (
        "bytes_read",
        "bytes_written",
        "contexts",
        "description",
        "edge",
        "export_id",
        "name",
        "on_failure",
        "reads",
        "snapshot_of",
        "writes",
    )

    def __init__(
        self,
        export_id: str,
        name: str,
        edge: Edge,
        *,
        description: str = "",
        contexts: Mapping[str, StatusSource] | None = None,
        snapshot_of: str = "",
    ) -> None:
        self.export_id = export_id
        self.name = name
        self.edge = edge
        self.description = description
        self.contexts: dict[str, StatusSource] = {ALLOCATION: edge.block_status, **(contexts or {})}
        self.snapshot_of = snapshot_of
        self.on_failure: Callable[[Export, bool, FleecerError], None] | None = None
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0

    def info(self, *, can_multi_conn: bool) -> ExportInfo:
        """What a client is told about the export, as it stands now."""
        limits = self.edge.node.limits
        preferred = min(max(limits.preferred_bytes, 512), PAYLOAD_MAX_BYTES)
        return ExportInfo(
            name=self.name,
            description=self.description,
            size=self.edge.size,
            read_only=not self.edge.writable,
            can_multi_conn=can_multi_conn,
            can_trim=self.edge.writable and limits.can_discard,
            can_fast_zero=self.edge.writable,
            block_size_min=1,
            block_size_preferred=max(preferred, min(limits.request_alignment_bytes, BLOCK_SIZE_MIN_MAX)),
            block_size_max=max(PAYLOAD_MAX_BYTES, 1 * MiB),
            contexts=tuple(self.contexts),
        )

    def at_once(self) -> tuple[ReadAtOnce | None, WriteAtOnce | None]:
        """What reads, and what writes, without a wait, where that can be done; see `Edge.reader`.

        For requests inside the export. Whoever uses them counts what is read and written.
        """
        edge = self.edge
        if edge.node.limits.transfer_max_bytes < PAYLOAD_MAX_BYTES:
            return None, None
        return edge.reader(), edge.writer()

    async def execute(self, request: Request, tried: bool = False) -> Buffer | None:
        """Does what a read, write, flush, trim, cache or write-zeroes request asks; returns what was read.

        `tried` says that what `at_once` gave was tried this very moment, in vain.

        On return a request with FUA is durable. Raises FleecerError, whose errno the client is told.
        """
        command, flags = request.command, request.flags
        edge = self.edge
        if command == CMD_READ:
            self.reads += 1
            self.bytes_read += request.length
            return await edge.pread(request.offset, request.length, tried)
        fua = flags & CMD_FLAG_FUA != 0
        if command == CMD_WRITE and request.length:
            self.writes += 1
            self.bytes_written += request.length
            await edge.pwrite(request.offset, request.data, fua, tried=tried)
        elif command == CMD_FLUSH:
            await edge.flush()
        elif not request.length:
            if fua:
                await edge.flush()
        elif command == CMD_TRIM:
            await edge.discard(request.offset, request.length, fua)
        elif command == CMD_WRITE_ZEROES:
            self.writes += 1
            unmap = not flags & CMD_FLAG_NO_HOLE
            await edge.zero(request.offset, request.length, unmap, fua, fast_only=bool(flags & CMD_FLAG_FAST_ZERO))
        elif command == CMD_CACHE:
            # A hint to read ahead. Reading for real would only throw the data away; the page cache does its own.
            if fua:
                await edge.flush()
        else:
            raise IoError(errno.EINVAL, self.name, f"command {command}", request.offset, request.length)
        return None

    async def status(self, request: Request, context: str) -> list[Extent]:
        """The extents of one context over a block-status request's range; may stop early, as the protocol allows."""
        assert request.command == CMD_BLOCK_STATUS, "only a block-status request has extents"
        source = self.contexts.get(context)
        if source is None:
            raise IoError(errno.EINVAL, self.name, f"block status {context}", request.offset, request.length)
        offset, end = request.offset, request.offset + request.length
        one_only = bool(request.flags & CMD_FLAG_REQ_ONE)
        extents: list[Extent] = []
        while offset < end and len(extents) < STATUS_EXTENTS_MAX and (found := await source(offset, end - offset)):
            for extent in found:
                offset += extent.length
                if extents and extents[-1].flags == extent.flags:
                    extents[-1] = Extent(extents[-1].length + extent.length, extent.flags)
                elif extents and one_only:
                    return extents
                else:
                    extents.append(extent)
            if offset < end and len(extents) < STATUS_EXTENTS_MAX:
                await asyncio.sleep(0)  # thousands of short runs, all of them in memory, would hold up everybody
        return extents
