"""throttle: a filter that holds the rate of requests and of bytes below a limit (QEMU's driver of that name).

The limit is a leaky bucket: it drains at the rate, each request pours in its cost, and a request may start once the
bucket holds no more than the burst. A request larger than the burst still goes, and the next ones pay for it. Requests
start in the order they came.
"""

from __future__ import annotations

import asyncio

from fleecer.block.edge import Edge
from fleecer.block.nodes.filter import FilterNode
from fleecer.errors import UsageError
from fleecer.ranges import Buffer


class LeakyBucket:
    """Drains at `rate` units a second; up to `burst` units may be in it when a request starts."""

    __slots__ = ("_burst_s", "_empty_at_s", "_rate")

    def __init__(self, rate: float, burst: float = 0.0) -> None:
        if rate <= 0 or burst < 0:
            raise UsageError(f"throttle rate {rate} and burst {burst}: the rate must be above 0, the burst not below")
        self._rate = rate
        self._burst_s = burst / rate
        self._empty_at_s = 0.0

    def pour(self, amount: float, now_s: float) -> float:
        """Takes a request of `amount` units in, and returns at what time it may start: `now_s`, or later."""
        start_s = max(now_s, self._empty_at_s - self._burst_s)
        self._empty_at_s = max(self._empty_at_s, now_s) + amount / self._rate
        return start_s


class ThrottleNode(FilterNode):
    """Reads, writes, zeroes and discards wait for both buckets, flushes and block status for none.

    A limit of None is no limit. Discards cost a request and no bytes. Time is the event loop's.
    """

    driver = "throttle"

    __slots__ = ("_bytes", "_requests")

    def __init__(
        self,
        name: str,
        child: Edge,
        *,
        bytes_per_second: float | None = None,
        requests_per_second: float | None = None,
        burst_bytes: float = 0.0,
        burst_requests: float = 0.0,
    ) -> None:
        super().__init__(name, child)
        self._bytes = None if bytes_per_second is None else LeakyBucket(bytes_per_second, burst_bytes)
        self._requests = None if requests_per_second is None else LeakyBucket(requests_per_second, burst_requests)

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        await self._pass(length)
        return await self.child.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """See `Node.pwrite`."""
        await self._pass(len(data))
        await self.child.pwrite(offset, data, serialising=serialising)

    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """See `Node.zero`."""
        await self._pass(length)
        await self.child.zero(offset, length, unmap, serialising=serialising)

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        await self._pass(0)
        await self.child.discard(offset, length)

    async def _pass(self, length: int) -> None:
        now_s = asyncio.get_running_loop().time()
        start_s = now_s
        if self._bytes is not None:
            start_s = self._bytes.pour(length, now_s)
        if self._requests is not None:
            start_s = max(start_s, self._requests.pour(1, now_s))
        if start_s > now_s:
            await asyncio.sleep(start_s - now_s)
