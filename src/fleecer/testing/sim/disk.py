"""A simulated disk: a storage with a volatile cache, whose requests take seeded time, tear, fail, and lose power.

Fault model
- A request is submitted, takes effect on the content at one or two later moments (*torn* between sectors, or inside
  one, as between pread(2) and pwrite(2)), and completes at another one after that. Requests in flight overtake each
  other. Times have a heavy tail: some are a thousand times longer than most. Some requests are done at once, inside
  the call, as those in the page cache are; of these only writes can fail at once.
- What was written is readable once it has taken effect. It is durable once a sync that was submitted after the write
  had completed has completed itself. Until then, from its submission on, any subset of its sectors may be on the
  medium after a power cut, in any order with other such writes.
- A sync that fails loses: what it should have made durable stays in doubt for ever, though later syncs succeed. That is
  how Linux does it (the pages are marked clean).
- A request may fail (EIO, ENOSPC), a write that fails has changed any part of its range. It may stall for minutes. A
  short one is done in the midst of other requests, in two parts: a storage does the rest itself (storage/api.py).
- A request cannot be cancelled: whoever is cancelled while waiting for one hears of it when it has ended.
- Bits may flip in what is read: then the read returns wrong data and says nothing.

`Faults` says which request fails how; `record` keeps a log from which `crash_states` makes media.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno as _errno
import itertools
import random
from collections.abc import Callable, Collection, Iterator
from typing import Literal

from fleecer import spares
from fleecer.errors import IoError
from fleecer.ranges import Buffer, align_down, align_up, is_zero, zeroes
from fleecer.storage.api import Ended, ReadEnded, StorageLimits
from fleecer.testing.memory import begin
from fleecer.testing.sim.loop import SimLoop

SECTOR_BYTES = 512
PAGE_BYTES = 4096
STALL_S = 300.0

Kind = Literal["EIO", "ENOSPC", "short", "stall", "flip"]
Latency = Callable[[], float]


def heavy_tailed(generator: random.Random, *, typical_s: float = 1e-4, longest_s: float = 1.0) -> Latency:
    """Times of which most are near `typical_s`, and some a thousand times that."""
    draw = generator.random

    def latency() -> float:
        return float(min(longest_s, typical_s * (1.0 - draw()) ** -1.5))

    return latency


@dataclasses.dataclass(slots=True)
class Faults:
    """Which requests of a disk fail. Requests are numbered from 0 in the order of their submission.

    `at` maps numbers to faults. `for_good` makes every later request of the same operation share the fate of one that
    failed. `seen` tells how many requests there were.
    """

    at: dict[int, Kind] = dataclasses.field(default_factory=dict)
    for_good: bool = False
    seen: int = 0
    hit: list[str] = dataclasses.field(default_factory=list)
    _stuck: dict[str, Kind] = dataclasses.field(default_factory=dict)

    def next(self, operation: str) -> Kind | None:
        """The fault of the request submitted now, if any."""
        kind = self.ahead(operation)
        self.seen += 1
        if kind is not None:
            self.hit.append(f"{operation}:{kind}")
            if self.for_good:
                self._stuck[operation] = kind
        return kind

    def stop(self) -> None:
        """No more faults."""
        self.at.clear()
        self._stuck.clear()

    def ahead(self, operation: str) -> Kind | None:
        """The fault of the request that is submitted next, if any."""
        return self.at.get(self.seen) or self._stuck.get(operation)


@dataclasses.dataclass(slots=True)
class _Write:
    """A write in the log: submitted right after log position `begun`, completed before `ended` (None: not yet)."""

    begun: int
    offset: int
    data: bytes
    ended: int | None = None
    durable_at: int | None = None
    in_doubt: bool = False


class _Moment(asyncio.Future[None]):
    """A request under way cannot be cancelled (storage/api.py): whoever waits hears of that when it has ended."""

    def cancel(self, msg: object = None) -> bool:
        return False


class Breakpoint:
    """Holds one request of a disk. Made by `SimDisk.hold`."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._reached: asyncio.Future[None] = loop.create_future()
        self._released: asyncio.Future[None] = loop.create_future()

    async def reached(self) -> None:
        """Returns when a request is held here."""
        await self._reached

    def release(self) -> None:
        """Lets the held request go on."""
        self._released.set_result(None)

    async def stop(self) -> None:
        """What the request does that has come here."""
        self._reached.set_result(None)
        await asyncio.shield(self._released)


class SimDisk:
    """The storage. `data` is what reads see now. All times are the running loop's."""

    def __init__(
        self,
        content: int | bytes | bytearray,
        generator: random.Random,
        *,
        name: str = "disk",
        latency: Latency | None = None,
        faults: Faults | None = None,
        record: bool = False,
        growable: bool = True,
        size_max: int = 1 << 30,
        tearing: bool = True,
        tear_bytes: int = SECTOR_BYTES,
        alignment_bytes: int = 1,
        inline: float = 0.0,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.data = bytearray(content)
        self.size = len(self.data)
        self.name = name
        self.read_only = False
        self.identity = (0, id(self))
        self.is_block_device = False
        self.limits = StorageLimits(alignment_bytes=alignment_bytes, growable=growable)
        self.faults = faults
        self.in_flight = 0
        self._generator = generator
        self._latency = latency or heavy_tailed(generator)
        self._size_max = size_max
        self._base = bytes(self.data) if record else None
        self._log: list[_Write] = []
        self._position = 0  # of the log: grows with each submission and completion
        self._trace = trace
        self._tearing = tearing
        self._tear_bytes = tear_bytes
        self.inline = inline
        self._breakpoints: dict[str, Breakpoint] = {}

    # The storage.

    @property
    def reads_wait(self) -> bool:
        """See `Storage.reads_wait`."""
        return False

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        """See `Storage.try_pread_into`: at once, if `inline` has it so."""
        if not self._is_inline("read", ()):
            return False
        if self.faults is not None:
            self.faults.next("read")
        length = len(into)
        into[:] = zeroes(length)
        self._copy_out(into, offset, offset, offset + length)
        self._say(f"read {offset}+{length} at once")
        return True

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """See `Storage.try_pwrite`: at once, if `inline` has it so."""
        end = offset + len(data)
        has_room = end <= self.size or (end <= self._size_max and self.limits.growable)
        if not has_room or not self._is_inline("write", ("EIO", "ENOSPC")):
            return False
        fault = self.faults.next("write") if self.faults is not None else None
        self._say(f"write {offset}+{len(data)} at once")
        write = self._submit(offset, bytes(data))
        if fault is not None:
            self._put(offset, write.data[: self._tear(offset, len(data), fault) - offset])
            write.in_doubt = True
            self._raise("write", fault, offset, len(data))
        self._put(offset, write.data)
        self._position += 1
        write.ended = self._position
        self.size = max(self.size, end)
        return True

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Storage.begin_pread`."""
        begin(self.pread(offset, length), ended)
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Storage.pread`."""
        fault = self._begin("read", offset, length)
        try:
            await self._pass("read", fault)
            data = spares.take(length)
            cut = self._tear(offset, length, fault)
            self._copy_out(data, offset, offset, cut)
            if cut < offset + length:
                await self._wait(self._latency())
                self._copy_out(data, offset, cut, offset + length)
            await self._wait(self._latency())
            self._raise("read", fault, offset, length)
            if fault == "flip":
                data[self._generator.randrange(length)] ^= 1 << self._generator.randrange(8)
            return data
        finally:
            self._end("read", offset, length)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """See `Storage.pwrite`."""
        await self._change("write", offset, data)

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        """See `Storage.zero`."""
        await self._change("write zeroes", offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        """See `Storage.discard`: whole pages inside the range become zero."""
        start, end = align_up(offset, PAGE_BYTES), align_down(offset + length, PAGE_BYTES)
        if start < end:
            await self._change("discard", start, bytes(end - start))

    async def sync(self) -> None:
        """See `Storage.sync`."""
        fault = self._begin("sync", 0, 0)
        covered = self._unsynced()
        try:
            await self._pass("sync", fault)
            if fault in ("EIO", "ENOSPC"):
                for write in covered:
                    write.in_doubt = True
            self._raise("sync", fault, 0, 0)
            self._synced(covered)
            await self._wait(self._latency())
        finally:
            self._end("sync", 0, 0)

    def begin_sync(self, ended: Ended) -> bool:
        """See `Storage.begin_sync`: at once, if `inline` has it so; with faults it is a moment for one."""
        if self.faults is not None or not self._is_inline("sync", ()):
            begin(self._sync_told(), lambda _, error: ended(error))
            return True
        self._say("sync at once")
        self._synced(self._unsynced())
        ended(None)
        return True

    async def _sync_told(self) -> Buffer:
        await self.sync()
        return b""

    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See `Storage.extents`."""
        fault = self._begin("status", offset, length)
        try:
            await self._pass("status", fault)
            self._raise("status", fault, offset, length)
            runs = self._look(offset, length)
            await self._wait(self._latency())
            return runs
        finally:
            self._end("status", offset, length)

    async def truncate(self, size: int) -> None:
        """See `Storage.truncate`. Not a moment for faults: only new scratches are resized."""
        self._resize(size)

    def hold(self, operation: str) -> Breakpoint:
        """Holds the next request of that operation ("read", "write", "status" ...), submitted but without effect yet.

        Not one that is done at once.
        """
        breakpoint_ = self._breakpoints[operation] = Breakpoint()
        return breakpoint_

    async def close(self) -> None:
        """See `Storage.close`."""
        assert not self.in_flight, f"{self.name} was closed with {self.in_flight} requests in flight"

    async def _change(self, operation: str, offset: int, data: Buffer) -> None:
        # What is put on the medium is taken from the caller's memory at that moment, as the kernel does.
        fault = self._begin(operation, offset, len(data))
        write = self._submit(offset, bytes(data))
        end = offset + len(data)
        if end > max(self._size_max, len(self.data)) or (end > len(self.data) and not self.limits.growable):
            fault = "ENOSPC"
        try:
            try:
                await self._pass(operation, fault)
            except asyncio.CancelledError:
                if fault not in ("EIO", "ENOSPC"):  # nobody will wait for the rest, but it is done
                    self._put(offset, data)
                raise
            cut = self._tear(offset, len(data), fault)
            self._put(offset, data[: cut - offset])
            if fault in ("EIO", "ENOSPC"):
                write.in_doubt = True
            self._raise(operation, fault, offset, len(data))
            if cut < end:
                try:
                    await self._wait(self._latency())
                finally:  # whoever is cancelled here hears of it when all is done
                    self._put(cut, data[cut - offset :])
            await self._wait(self._latency())
            self._position += 1
            write.ended = self._position
            self.size = max(self.size, end)
        finally:
            self._end(operation, offset, len(data))

    # Steps of a request.

    def _begin(self, operation: str, offset: int, length: int) -> Kind | None:
        self.in_flight += 1
        self._say(f"{operation} {offset}+{length}")
        return self.faults.next(operation) if self.faults is not None else None

    def _is_inline(self, operation: str, faults: Collection[Kind]) -> bool:
        """Whether the request submitted now is done at once. One that is to fail is not, but in these ways."""
        if not self.inline or self._generator.random() >= self.inline:
            return False
        fault = self.faults.ahead(operation) if self.faults is not None else None
        return fault is None or fault in faults

    def _submit(self, offset: int, data: bytes) -> _Write:
        write = _Write(self._position, offset, data)
        if self._base is not None:
            self._position += 1
            self._log.append(write)
        return write

    def _say(self, what: str) -> None:
        if self._trace is not None:
            self._trace(f"    {self.name}: {what}")

    async def _pass(self, operation: str, fault: Kind | None) -> None:
        """What comes between a request's submission and its effect."""
        if operation in self._breakpoints:
            await self._breakpoints.pop(operation).stop()
        await self._wait(STALL_S if fault == "stall" else self._latency())

    @staticmethod
    async def _wait(delay_s: float) -> None:
        if not delay_s:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop), "a simulated disk lives in a simulation"
        moment = _Moment(loop=loop)
        loop.finish_later(delay_s, moment)
        await moment

    def _raise(self, operation: str, fault: Kind | None, offset: int, length: int) -> None:
        if fault in ("EIO", "ENOSPC"):
            raise IoError(getattr(_errno, fault), self.name, operation, offset, length)

    def _end(self, operation: str, offset: int, length: int) -> None:
        self.in_flight -= 1
        self._say(f"{operation} {offset}+{length} done")

    def _tear(self, offset: int, length: int, fault: Kind | None) -> int:
        """Where the request is cut in two: the end if it is not. One that fails leaves whole sectors."""
        end = offset + length
        unit = SECTOR_BYTES if fault in ("EIO", "ENOSPC") else self._tear_bytes
        first = align_up(offset + 1, unit)
        if fault == "short" and first < end:
            return first
        if first >= end or not self._tearing or self._generator.random() < 0.5:
            return end
        return self._generator.randrange(first, end, unit)

    def _put(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
        self.data[offset:end] = data

    def _copy_out(self, data: bytearray | memoryview, base: int, start: int, end: int) -> None:
        found = self.data[start:end]
        data[start - base : start - base + len(found)] = found

    def _look(self, offset: int, length: int) -> list[tuple[int, bool]]:
        runs: list[tuple[int, bool]] = []
        end = offset + length
        while offset < end and len(runs) < 16:
            stop = min(align_down(offset, PAGE_BYTES) + PAGE_BYTES, end)
            runs.append((stop - offset, not is_zero(self.data[offset:stop])))
            offset = stop
        return runs

    def _unsynced(self) -> list[_Write]:
        """What has ended and is not durable."""
        return [write for write in self._log if write.ended is not None and write.durable_at is None]

    def _synced(self, covered: list[_Write]) -> None:
        self._position += 1
        for write in covered:
            if not write.in_doubt:
                write.durable_at = self._position

    def _resize(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size

    # Power cuts.

    @property
    def position(self) -> int:
        """Where in the log we are: a moment for `crash_states`."""
        return self._position

    def crash_states(
        self, generator: random.Random, *, at: int | None = None, exhaustive_up_to: int = 8, samples: int = 16
    ) -> Iterator[bytearray]:
        """What the medium may hold after a power cut at log position `at` (default: now). Needs `record`.

        All subsets of the sectors in doubt, if they are at most `exhaustive_up_to`; else none, all, each alone, each
        missing as far as `samples` allow, and random ones: of sectors, and of whole writes.
        """
        assert self._base is not None, "the disk was not made with record=True"
        moment = self._position if at is None else at
        pieces: list[tuple[int, bytes, bool]] = []  # offset, data, durable; in the order of submission
        sectors: list[int] = []  # of each write in doubt, how many
        for write in self._log:
            if write.begun >= moment:
                break
            if write.durable_at is not None and write.durable_at <= moment:
                pieces.append((write.offset, write.data, True))
                continue
            starts = range(0, len(write.data), SECTOR_BYTES)
            sectors.append(len(starts))
            pieces += [(write.offset + start, write.data[start : start + SECTOR_BYTES], False) for start in starts]
        for chosen in _subsets(sectors, generator, exhaustive_up_to, samples):
            medium = bytearray(self._base)
            keep = iter(chosen)
            for offset, data, durable in pieces:
                if durable or next(keep):
                    _apply(medium, offset, data)
            yield medium


def _apply(medium: bytearray, offset: int, data: bytes) -> None:
    end = offset + len(data)
    if end > len(medium):
        medium.extend(bytes(end - len(medium)))
    medium[offset:end] = data


def _subsets(
    sectors: list[int], generator: random.Random, exhaustive_up_to: int, samples: int
) -> Iterator[tuple[bool, ...]]:
    """Which sectors are there, of writes of so many each, one after the other."""
    count = sum(sectors)
    if count <= exhaustive_up_to:
        yield from itertools.product((False, True), repeat=count)
        return
    yield (False,) * count
    yield (True,) * count
    for _ in range(samples):
        kind = generator.random()
        one = generator.randrange(count)
        if kind < 0.15:
            yield tuple(index == one for index in range(count))
        elif kind < 0.3:
            yield tuple(index != one for index in range(count))
        elif kind < 0.45:
            yield tuple(index < one for index in range(count))
        elif kind < 0.75:
            yield tuple(there for size in sectors for there in [generator.random() < 0.5] * size)
        else:
            yield tuple(generator.random() < 0.5 for _ in range(count))
