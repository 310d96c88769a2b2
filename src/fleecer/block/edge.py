"""The one door to a node: every request of every parent passes an `Edge`.

The door checks bounds and permission, counts requests in flight, holds them back while its gate is closed (drain),
splits what exceeds the node's limits, and pads what is not aligned to them.

Invariants:
- `busy` counts the requests that have passed the gate and not yet returned; drained means gate closed and busy == 0.
- The node is looked up after the gate, so a node swapped in under drain sees every request that follows, and the node
  swapped out none.
- An edge that was detached refuses what waits at its gate and what still comes.
- A request that fits is handed on without a task, a lock or an allocation of its own; one that need not wait, without
  a coroutine either.
- A padded write reads, changes and writes whole units under a serialising claim of the node's `padding`; on such a node
  every read and write takes a claim there, so neither sees or loses a half of it.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator

from fleecer import spares
from fleecer.block.node import Extent, Node, merge_extents
from fleecer.errors import FleecerError, IoError, PermissionConflict, quoted
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce, align_down, align_up
from fleecer.storage.api import Ended, ReadEnded
from fleecer.waiters import Waiters


class Edge:
    """A parent's hold on a node.

    `parent` and `role` name it in messages ("export 'web'", "file"). `writable` is whether this parent may change the
    node; `shares_write` whether it puts up with others doing so. `may_grow` lets writes pass the node's end.
    """

    __slots__ = (
        "_closers",
        "_gate",
        "_has_ended",
        "_idle",
        "_node",
        "_plain",
        "busy",
        "may_grow",
        "parent",
        "role",
        "shares_write",
        "writable",
    )

    def __init__(
        self,
        node: Node,
        parent: str,
        role: str,
        *,
        writable: bool = False,
        shares_write: bool = True,
        may_grow: bool = False,
    ) -> None:
        self.parent = parent
        self.role = role
        self.writable = writable
        self.shares_write = shares_write
        self.may_grow = may_grow
        self.busy = 0
        self._closers = 0
        self._gate: Waiters | None = None  # there while it is closed
        self._has_ended = False
        self._idle: Waiters | None = None
        self.node = node

    def __str__(self) -> str:
        return f"{self.parent} ({self.role})"

    @property
    def node(self) -> Node:
        """The node that requests go to. Set it only while the edge is drained or before its first request."""
        return self._node

    @node.setter
    def node(self, node: Node) -> None:
        if self.busy:
            raise AssertionError(f"edge {self} was swapped with {self.busy} requests in flight")
        if self.writable and node.read_only:
            raise PermissionConflict(f"{self} wants to write to node {quoted(node.name)}, which is read-only")
        self._node = node
        self._plain = node.padding is None

    @property
    def size(self) -> int:
        """The node's size in bytes."""
        return self._node.size

    # What needs no wait is over before anything else can happen: no gate closes under it, and nobody has to count it.

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """As `pread`, if that can be done at once; None, with nothing done, if not, or if it is to be refused."""
        return spares.take_filled(self._fill, offset, length) if self._takes_read(offset, length) else None

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        """As `try_pread`, into memory of the caller's; see `ReadAtOnce`."""
        return self._takes_read(offset, len(into)) and self._fill(offset, into)

    def _fill(self, offset: int, into: memoryview) -> bool:
        node = self._node
        read = node.reader()
        if read is None or not read(offset, into):
            return False
        if node.check is not None:
            node.check()
        return True

    def _takes_read(self, offset: int, length: int) -> bool:
        """Whether the node can be handed that as it is, and now."""
        node = self._node
        return (
            self._gate is None
            and self._plain
            and offset >= 0
            and length > 0
            and offset + length <= node.size
            and length <= node.limits.transfer_max_bytes
        )

    def try_pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> bool:
        """As `pwrite`, if that can be done at once; False, with nothing done, if not, or if it is to be refused."""
        node = self._node
        length = len(data)
        if (
            self._gate is not None
            or not self._plain
            or not self.writable
            or offset < 0
            or length <= 0
            or (offset + length > node.size and not self.may_grow)
            or length > node.limits.transfer_max_bytes
        ):
            return False
        write = node.serialising_writer() if serialising else node.writer()
        return write is not None and write(offset, data)

    def reader(self) -> ReadAtOnce | None:
        """As `try_pread_into`, for many requests in a row, inside the node and its limits; see `Node.reader`."""
        node = self._node
        if self._gate is not None or not self._plain or node.check is not None:
            return None
        return node.reader()

    def writer(self) -> WriteAtOnce | None:
        """As `try_pwrite`, for many requests in a row; see `reader`."""
        if self._gate is not None or not self._plain or not self.writable:
            return None
        return self._node.writer()

    def serialising_writer(self) -> WriteAtOnce | None:
        """As `try_pwrite`, serialising, for many requests in a row; see `reader`."""
        if self._gate is not None or not self._plain or not self.writable:
            return None
        return self._node.serialising_writer()

    # What has to wait, but for one request only, costs no coroutine either.

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """As `pread` after `try_pread` was tried in vain, if that can begin now; see `Node.begin_pread`.

        False, with nothing done, if not, or if it is to be refused.
        """
        if not self._takes_read(offset, length):
            return False
        begun = self._node.begin_pread(offset, length, functools.partial(self._pread_ended, ended))
        self.busy += begun
        return begun

    def _pread_ended(self, ended: ReadEnded, data: Buffer, error: Exception | None) -> None:
        if error is None and self._node.check is not None:
            try:
                self._node.check()
            except FleecerError as broken:
                data, error = b"", broken
        self.busy -= 1
        if self._idle is not None and not self.busy:
            self._now_idle()
        ended(data, error)

    def begin_flush(self, ended: Ended) -> bool:
        """As `flush`, if that can begin now; see `Node.begin_flush`. False, with nothing done, if not."""
        if self._gate is not None:
            return False
        self.busy += 1
        begun = self._node.begin_flush(functools.partial(self._flush_ended, ended))
        self.busy -= not begun
        return begun

    def _flush_ended(self, ended: Ended, error: Exception | None) -> None:
        self.busy -= 1
        if self._idle is not None and not self.busy:
            self._now_idle()
        ended(error)

    # The six operations. Each passes the gate, checks, counts, and hands on.

    async def pread(self, offset: int, length: int, tried: bool = False) -> Buffer:
        """`length` bytes at `offset`; see `Node.pread`. Raises IoError (EINVAL) outside the node.

        `tried` says that to do it at once was tried this very moment, in vain.
        """
        if not tried:
            at_once = self.try_pread(offset, length)
            if at_once is not None:
                return at_once
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        if offset < 0 or length <= 0 or offset + length > node.size:
            return self._refuse_range("read", offset, length)
        self.busy += 1
        try:
            if self._plain and length <= node.limits.transfer_max_bytes:
                data = await node.pread(offset, length)
            else:
                data = await _shaped_pread(node, offset, length)
            if node.check is not None:
                node.check()
            return data
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()

    async def pwrite(
        self, offset: int, data: Buffer, fua: bool = False, serialising: bool = False, tried: bool = False
    ) -> None:
        """Writes `data`; see `Node.pwrite`. With `fua` it is durable on return. `tried` is as for `pread`.

        Raises IoError: EPERM without write permission, ENOSPC outside the node.
        """
        if not tried and self.try_pwrite(offset, data, serialising):
            if fua:
                await self.flush()
            return
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        length = len(data)
        if not self.writable or offset < 0 or length <= 0 or (offset + length > node.size and not self.may_grow):
            self._refuse_change("write", offset, length)
            return
        self.busy += 1
        try:
            if self._plain and length <= node.limits.transfer_max_bytes:
                await node.pwrite(offset, data, serialising)
            else:
                await _shaped_pwrite(node, offset, data, serialising)
            if fua:
                await node.flush()
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()

    async def zero(
        self,
        offset: int,
        length: int,
        unmap: bool = True,
        fua: bool = False,
        fast_only: bool = False,
        serialising: bool = False,
    ) -> None:
        """Makes the range read as zeroes; see `Node.zero`.

        With `fast_only` it is refused with ENOTSUP, and nothing touched, where the node would write zeroes one by one.
        """
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        if not self.writable or offset < 0 or length <= 0 or (offset + length > node.size and not self.may_grow):
            self._refuse_change("write zeroes", offset, length)
            return
        if fast_only and not node.limits.zero_is_fast:
            raise IoError(errno.ENOTSUP, node.name, "write zeroes", offset, length, "no fast way to zero here")
        self.busy += 1
        try:
            if self._plain:
                await node.zero(offset, length, unmap, serialising)
            else:
                await _shaped_zero(node, offset, length, unmap, serialising)
            if fua:
                await node.flush()
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()

    async def discard(self, offset: int, length: int, fua: bool = False) -> None:
        """Hints that the content is not needed; see `Node.discard`. Units only partly inside the range are kept."""
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        if not self.writable or offset < 0 or length <= 0 or offset + length > node.size:
            self._refuse_change("discard", offset, length, beyond=errno.EINVAL)
            return
        self.busy += 1
        try:
            alignment = node.limits.request_alignment_bytes
            start, end = align_up(offset, alignment), align_down(offset + length, alignment)
            if node.limits.can_discard and start < end:
                await _claimed_discard(node, start, end - start)
            if fua:
                await node.flush()
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()

    async def flush(self) -> None:
        """Makes every write that has returned durable; see `Node.flush`."""
        if self._gate is not None:
            await self._pass_gate()
        self.busy += 1
        try:
            await self._node.flush()
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """What the range holds; see `Node.block_status`. Raises IoError (EINVAL) outside the node."""
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        if offset < 0 or length <= 0 or offset + length > node.size:
            self._refuse_range("block status", offset, length)
        self.busy += 1
        try:
            if self._plain:
                extents = await node.block_status(offset, length)
            else:
                extents = await _shaped_block_status(node, offset, length)
            if node.check is not None:
                node.check()
            return extents
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()

    # Drain: close the gate, wait for busy == 0, change the graph, open the gate. graph.py drives it.

    def close_gate(self) -> None:
        """From now on new requests wait at the gate, until everyone who has closed it has opened it again."""
        self._closers += 1
        if self._gate is None:
            self._gate = Waiters()

    async def idle(self) -> None:
        """Returns when no request is in flight behind the closed gate."""
        assert self._gate is not None, f"waiting for {self} to be idle with its gate open"
        while self.busy:
            self._idle = self._idle or Waiters()
            await self._idle.wait()

    def open_gate(self) -> None:
        """Lets the waiting requests go on, in the order they came, unless somebody else keeps the gate closed."""
        assert self._gate is not None, f"the gate of {self} is open already"
        self._closers -= 1
        if not self._closers and not self._has_ended:
            gate, self._gate = self._gate, None
            gate.wake()

    def end(self) -> None:
        """The edge has been detached: requests that wait at its gate, and those that still come, are refused."""
        self._has_ended = True
        self._gate = self._gate or Waiters()
        self._gate.wake()

    async def _pass_gate(self) -> None:
        while self._gate is not None:
            if self._has_ended:
                raise IoError(errno.ESHUTDOWN, self._node.name, "request", detail=f"{self} has ended")
            await self._gate.wait()

    def _now_idle(self) -> None:
        if self._idle is not None:
            idle, self._idle = self._idle, None
            idle.wake()

    def _refuse_range(self, operation: str, offset: int, length: int, code: int = errno.EINVAL) -> Buffer:
        if not length:
            return b""
        size = self._node.size
        raise IoError(code, self._node.name, operation, offset, length, f"the range passes the end at {size} bytes")

    def _refuse_change(self, operation: str, offset: int, length: int, beyond: int = errno.ENOSPC) -> None:
        if not self.writable:
            raise IoError(errno.EPERM, self._node.name, operation, offset, length, f"{self} may only read")
        self._refuse_range(operation, offset, length, code=beyond)


# Requests that do not fit a node's limits as they are: split, and padded to its alignment under a claim.


def _pieces(offset: int, length: int, piece_max: int, alignment: int) -> Iterator[tuple[int, int]]:
    """The range cut at multiples of `piece_max`, itself a multiple of `alignment`."""
    step = max(align_down(piece_max, alignment), alignment)
    end = offset + length
    while offset < end:
        stop = min(align_down(offset, step) + step, end)
        yield offset, stop - offset
        offset = stop


async def _shaped_pread(node: Node, offset: int, length: int) -> Buffer:
    alignment = node.limits.request_alignment_bytes
    start = align_down(offset, alignment)
    end = min(align_up(offset + length, alignment), align_up(node.size, alignment))
    claim = node.padding.enter(start, end - start) if node.padding is not None else None
    try:
        if claim is not None and claim.blockers:
            await claim.granted()
        data = bytearray(end - start)
        for at, size in _pieces(start, end - start, node.limits.transfer_max_bytes, alignment):
            data[at - start : at - start + size] = await node.pread(at, size)
    finally:
        if claim is not None and node.padding is not None:
            node.padding.leave(claim)
    return data if (start, end) == (offset, offset + length) else memoryview(data)[offset - start :][:length]


async def _shaped_pwrite(node: Node, offset: int, data: Buffer, serialising: bool) -> None:
    view = memoryview(data)
    padding = node.padding
    if padding is None:
        await _split_pwrite(node, offset, view, serialising)
        return
    alignment = node.limits.request_alignment_bytes
    start, end = align_down(offset, alignment), align_up(offset + len(view), alignment)
    unaligned = (start, end) != (offset, offset + len(view))
    claim = padding.enter(start, end - start, serialising=unaligned)
    try:
        if claim.blockers:
            await claim.granted()
        if unaligned:
            whole = bytearray(end - start)
            # A unit past the end of a node that is about to grow holds zeroes; there is nothing to read.
            if start < min(offset, node.size):
                whole[:alignment] = await node.pread(start, alignment)
            last = end - alignment
            if offset + len(view) < end and (last > start or start == offset) and last < node.size:
                whole[-alignment:] = await node.pread(last, alignment)
            whole[offset - start : offset - start + len(view)] = view
            view = memoryview(whole)
        await _split_pwrite(node, start, view, serialising)
    finally:
        padding.leave(claim)


async def _split_pwrite(node: Node, offset: int, view: memoryview, serialising: bool) -> None:
    limits = node.limits
    for at, size in _pieces(offset, len(view), limits.transfer_max_bytes, limits.request_alignment_bytes):
        await node.pwrite(at, view[at - offset : at - offset + size], serialising)


async def _shaped_zero(node: Node, offset: int, length: int, unmap: bool, serialising: bool) -> None:
    alignment = node.limits.request_alignment_bytes
    end = offset + length
    inner_start, inner_end = align_up(offset, alignment), align_down(end, alignment)
    if inner_start >= inner_end:
        await _shaped_pwrite(node, offset, bytes(length), serialising)
        return
    if offset < inner_start:
        await _shaped_pwrite(node, offset, bytes(inner_start - offset), serialising)
    assert node.padding is not None
    claim = node.padding.enter(inner_start, inner_end - inner_start)
    try:
        if claim.blockers:
            await claim.granted()
        await node.zero(inner_start, inner_end - inner_start, unmap, serialising)
    finally:
        node.padding.leave(claim)
    if inner_end < end:
        await _shaped_pwrite(node, inner_end, bytes(end - inner_end), serialising)


async def _claimed_discard(node: Node, offset: int, length: int) -> None:
    padding = node.padding
    if padding is None:
        await node.discard(offset, length)
        return
    # Lest a padded write brings back what it had read of a unit before the discard.
    claim = padding.enter(offset, length)
    try:
        if claim.blockers:
            await claim.granted()
        await node.discard(offset, length)
    finally:
        padding.leave(claim)


async def _shaped_block_status(node: Node, offset: int, length: int) -> list[Extent]:
    alignment = node.limits.request_alignment_bytes
    start, end = align_down(offset, alignment), align_up(offset + length, alignment)
    extents: list[Extent] = []
    position = start
    for extent in await node.block_status(start, end - start):
        stop = position + extent.length
        extents.append(Extent(max(0, min(stop, offset + length) - max(position, offset)), extent.flags))
        position = stop
    return merge_extents(extents) or [Extent(length, 0)]
