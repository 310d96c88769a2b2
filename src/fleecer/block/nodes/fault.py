"""fault: a filter whose requests fail or stop where a test says so (the role of QEMU's blkdebug).

Rules match by operation and range. A request that matches a failing rule raises IoError, by default before its child
has seen it. A request that matches a breakpoint is held, before its child sees it or after the child is done with it,
until it is released; what else comes passes by.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno as _errno
from typing import Literal

from fleecer.block.edge import Edge
from fleecer.block.node import Extent
from fleecer.block.nodes.filter import FilterNode
from fleecer.errors import IoError
from fleecer.ranges import Buffer

Operation = Literal["read", "write", "write zeroes", "discard", "flush", "block status"]


@dataclasses.dataclass(slots=True)
class _Match:
    """Requests of one operation that touch a range; `length` None is everywhere. A flush has no range, and matches."""

    operation: Operation
    offset: int
    length: int | None
    late: bool  # after the child is done, instead of before

    def matches(self, operation: Operation, offset: int, length: int, late: bool) -> bool:
        if operation != self.operation or late != self.late:
            return False
        return (
            self.length is None or not length or (offset < self.offset + self.length and self.offset < offset + length)
        )


@dataclasses.dataclass(slots=True)
class Failure(_Match):
    """A rule that makes requests fail. `hits` counts those that did."""

    errno: int
    after: int  # matching requests that still pass
    times: int | None  # requests that will yet fail; None is no end
    hits: int = 0


class Hold:
    """A breakpoint for one request; `match` says which, `pending` is where it stands until it is released."""

    __slots__ = ("_pending", "_reached", "_released", "match")

    def __init__(self, match: _Match, pending: list[Hold]) -> None:
        loop = asyncio.get_running_loop()
        self.match = match
        self._pending = pending
        self._reached: asyncio.Future[None] = loop.create_future()
        self._released: asyncio.Future[None] = loop.create_future()
        pending.append(self)

    @property
    def is_reached(self) -> bool:
        """Whether a request has come to this breakpoint, held still or released."""
        return self._reached.done()

    async def reached(self) -> None:
        """Returns when a request is held here."""
        await asyncio.shield(self._reached)

    def release(self) -> None:
        """Lets the held request go on. If none came yet, none will be held. A second call does nothing."""
        if not self._released.done():
            self._pending.remove(self)
            self._released.set_result(None)

    async def stop(self) -> None:
        """What the request does that has come here."""
        self._reached.set_result(None)
        await asyncio.shield(self._released)


class FaultNode(FilterNode):
    """The filter. Without rules it adds one comparison to a request."""

    driver = "fault"

    __slots__ = ("_failures", "_holds")

    def __init__(self, name: str, child: Edge) -> None:
        super().__init__(name, child)
        self._failures: list[Failure] = []
        self._holds: list[Hold] = []

    def fail(
        self,
        operation: Operation,
        offset: int = 0,
        length: int | None = None,
        *,
        errno: int = _errno.EIO,
        after: int = 0,
        times: int | None = 1,
        late: bool = False,
    ) -> Failure:
        """Lets the first `after` matching requests pass, then fails `times` of them (None: all from there on).

        With `late` a request fails after its child has carried it out.
        """
        failure = Failure(operation, offset, length, late, errno, after, times)
        self._failures.append(failure)
        return failure

    def hold(self, operation: Operation, offset: int = 0, length: int | None = None, *, late: bool = False) -> Hold:
        """Holds the next matching request until `release`; with `late`, after its child has carried it out."""
        return Hold(_Match(operation, offset, length, late), self._holds)

    def clear(self) -> None:
        """Forgets every rule and lets every held request go on."""
        self._failures.clear()
        for hold in list(self._holds):
            hold.release()

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        if self._failures or self._holds:
            await self._meet("read", offset, length)
        data = await self.child.pread(offset, length)
        if self._failures or self._holds:
            await self._meet("read", offset, length, late=True)
        return data

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        if self._failures or self._holds:
            await self._meet("write", offset, len(data))
        await self.child.pwrite(offset, data, serialising=serialising)
        if self._failures or self._holds:
            await self._meet("write", offset, len(data), late=True)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        if self._failures or self._holds:
            await self._meet("write zeroes", offset, length)
        await self.child.zero(offset, length, unmap, serialising=serialising)
        if self._failures or self._holds:
            await self._meet("write zeroes", offset, length, late=True)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        if self._failures or self._holds:
            await self._meet("discard", offset, length)
        await self.child.discard(offset, length)
        if self._failures or self._holds:
            await self._meet("discard", offset, length, late=True)

    async def flush(self) -> None:
        """See `Node.flush`."""
        if self._failures or self._holds:
            await self._meet("flush", 0, 0)
        await self.child.flush()
        if self._failures or self._holds:
            await self._meet("flush", 0, 0, late=True)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """See `Node.block_status`."""
        if self._failures or self._holds:
            await self._meet("block status", offset, length)
        extents = await self.child.block_status(offset, length)
        if self._failures or self._holds:
            await self._meet("block status", offset, length, late=True)
        return extents

    async def _meet(self, operation: Operation, offset: int, length: int, late: bool = False) -> None:
        """Holds and fails the request as the rules say; a held one may fail once it is released."""
        for hold in self._holds:
            if not hold.is_reached and hold.match.matches(operation, offset, length, late):
                await hold.stop()
                break
        for failure in self._failures:
            if not failure.matches(operation, offset, length, late):
                continue
            if failure.after:
                failure.after -= 1
                continue
            failure.hits += 1
            if failure.times is not None:
                failure.times -= 1
                if not failure.times:
                    self._failures.remove(failure)
            raise IoError(failure.errno, self.name, operation, offset, length)
