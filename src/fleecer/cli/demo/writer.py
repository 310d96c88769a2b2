"""The demo's writer: overwrites its blocks over NBD without a pause, and keeps a journal of every write.

Each block written says which block it is and which write it was, in every 16 bytes, so that whoever reads it later
knows. A block has at most one write in flight, so its writes have an order; all have their place on one clock, which
counts issues and acknowledgements.
"""

from __future__ import annotations

import asyncio
import collections
import random
import struct

from fleecer.cli.demo.disk import BLOCK_BYTES
from fleecer.net.nbd_client import NbdClient

IN_FLIGHT = 16

_STAMP = struct.Struct("<4sIQ")
_MAGIC = b"wrt:"
NEVER = 1 << 62
"""On the clock: has not been acknowledged."""


class Write:
    """One write: its number, and when it was issued and acknowledged, on the journal's clock."""

    __slots__ = ("acknowledged", "issued", "number")

    def __init__(self, number: int, issued: int) -> None:
        self.number = number
        self.issued = issued
        self.acknowledged = NEVER


class Journal:
    """Every write, by block, in order; and the clock."""

    def __init__(self) -> None:
        self.writes: dict[int, list[Write]] = {}
        self.now = 0
        self.count = 0
        self.overwritten: set[int] = set()
        self._mark = NEVER

    def tick(self) -> int:
        """The next moment."""
        self.now += 1
        return self.now

    def issue(self, block: int) -> Write:
        """Notes a write that is about to be sent."""
        self.count += 1
        write = Write(self.count, self.tick())
        self.writes.setdefault(block, []).append(write)
        return write

    def acknowledge(self, block: int, write: Write) -> None:
        """Notes that the server has answered it."""
        write.acknowledged = self.tick()
        if write.issued > self._mark:
            self.overwritten.add(block)

    def mark(self) -> int:
        """The next moment. `overwritten` gathers the blocks that writes issued after it have overwritten."""
        self.overwritten.clear()
        self._mark = self.tick()
        return self._mark


def stamped(block: int, number: int) -> bytes:
    """What write `number` puts into `block`."""
    return _STAMP.pack(_MAGIC, block, number) * (BLOCK_BYTES // _STAMP.size)


def read_stamp(data: bytes) -> tuple[int, int] | None:
    """The block and the number of the write that `data`, a block, holds whole; None if it holds no such thing."""
    magic, block, number = _STAMP.unpack_from(data)
    return (block, number) if magic == _MAGIC and data == stamped(block, number) else None


class Writer:
    """Writes from `start` to `stop`, over all its blocks again and again, some scattered, some in sequence."""

    def __init__(self, client: NbdClient, scattered: list[int], sequential: list[int]) -> None:
        self.journal = Journal()
        self._client = client
        self._scattered = list(scattered)
        self._sequential = list(sequential)
        self._order = random.Random("writer")  # noqa: S311 - an order to write in
        self._next: collections.deque[int] = collections.deque()
        self._busy: set[int] = set()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins, `IN_FLIGHT` writes at a time."""
        self._tasks = [asyncio.ensure_future(self._work()) for _ in range(IN_FLIGHT)]

    async def stop(self) -> None:
        """Ends once the writes in flight are acknowledged. Raises what a write raised."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def until(self, count: int) -> None:
        """Returns when `count` more writes have been issued. Raises what a write raised."""
        goal = self.journal.count + count
        while self.journal.count < goal:
            await self._look()

    async def until_overwritten(self) -> None:
        """Returns when every block has been overwritten since the journal's mark. Raises what a write raised."""
        while len(self.journal.overwritten) < len(self._scattered) + len(self._sequential):
            await self._look()

    async def _look(self) -> None:
        """Lets the writer go on for a little."""
        await asyncio.sleep(0.02)
        for task in self._tasks:
            if task.done():
                task.result()

    async def _work(self) -> None:
        while not self._stopping:
            block = self._choose()
            self._busy.add(block)
            write = self.journal.issue(block)
            await self._client.pwrite(block * BLOCK_BYTES, stamped(block, write.number))
            self.journal.acknowledge(block, write)
            self._busy.discard(block)

    def _choose(self) -> int:
        if not self._next:
            self._order.shuffle(self._scattered)
            stride = -(-len(self._sequential) // len(self._scattered))
            for turn, block in enumerate(self._scattered):
                self._next.append(block)
                self._next.extend(self._sequential[turn * stride : (turn + 1) * stride])
        while self._next[0] in self._busy:
            self._next.rotate(-1)
        return self._next.popleft()
