"""What the writers have sent and what was acknowledged, in a file mapped by them and by the driver.

A sector's state is one number, `operation * 2`, plus 1 where the operation made it zero; 0 is the state at first. Per
disk and sector there are the state that was last submitted, the state last acknowledged, and the last operation that
may have zeroed it; per writer the states that its flushes have covered; and a ring of the latest operations with the
times they were sent and acknowledged, on the clock that all processes share.

Invariants: what is sent is entered before, what is acknowledged after; only its owner enters a sector, and the driver
while every writer rests. A sector has one operation in flight at most. Memory is bounded by the disks' size.
"""

from __future__ import annotations

import array
import mmap
import os
import time
from typing import NamedTuple

from fleecer.ranges import Buffer
from tests.soak.stamps import SECTOR, Layout

WRITE, ZERO, TRIM = range(3)
IN_FLIGHT = 0
ABANDONED = 1
"""In the place of the time of acknowledgement: still to come; or never to come, and the operation may yet be done."""

RING = 1 << 15
_FIELDS = 6
STATS = ("operations", "bytes", "flushes", "cuts", "longest_ns", "newest")


class Op(NamedTuple):
    """One operation of a writer: `number` counts its operations, times are nanoseconds of the shared clock."""

    writer: int
    number: int
    sent_ns: int
    acknowledged_ns: int
    disk: int
    first: int
    end: int
    kind: int


class Before(NamedTuple):
    """The moment before a snapshot was asked for: nothing acknowledged by then may be missing from it."""

    at_ns: int
    newest: list[int]
    acked: list[array.array[int]]


class After(NamedTuple):
    """The moment after it was made: nothing submitted later may be in it. `operations` overlap the time between."""

    submitted: list[array.array[int]]
    zeroed: list[array.array[int]]
    operations: list[Op]


class Ledger:
    """The mapped file. Views are of 64-bit numbers, an item a sector."""

    def __init__(self, path: str, layout: Layout) -> None:
        self.layout = layout
        per_disk = 3 + layout.writers
        size = 8 * (sum(layout.sectors) * per_disk + layout.writers * (RING * _FIELDS + len(STATS)))
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, size)
            self._view = memoryview(mmap.mmap(fd, size)).cast("Q")
        finally:
            os.close(fd)
        self._at = 0
        self.acked = [self._take(count) for count in layout.sectors]
        self.submitted = [self._take(count) for count in layout.sectors]
        self.zeroed = [self._take(count) for count in layout.sectors]
        self.durable = [[self._take(count) for count in layout.sectors] for _ in range(layout.writers)]
        self._rings = [self._take(RING * _FIELDS) for _ in range(layout.writers)]
        self._stats = [self._take(len(STATS)) for _ in range(layout.writers)]
        self._settled = [0] * layout.writers

    def _take(self, count: int) -> memoryview[int]:
        view = self._view[self._at : self._at + count]
        self._at += count
        return view

    # A writer's side.

    def begin(self, writer: int, number: int, kind: int, disk: int, first: int, end: int) -> array.array[int]:
        """Enters an operation that is about to be sent. Returns what zeroed its sectors before, for `settle_trim`."""
        zeroed_before = array.array("Q", self.zeroed[disk][first:end])
        self.submitted[disk][first:end] = array.array("Q", [number * 2 + (kind != WRITE)]) * (end - first)
        if kind != WRITE:
            self.zeroed[disk][first:end] = array.array("Q", [number]) * (end - first)
        at = number % RING * _FIELDS
        entry = (number, time.monotonic_ns(), IN_FLIGHT, disk, first, end << 8 | kind)
        self._rings[writer][at : at + _FIELDS] = array.array("Q", entry)
        self.set_stat(writer, "newest", number)
        return zeroed_before

    def acknowledge(self, writer: int, number: int, acknowledged_ns: int) -> int:
        """Notes when an operation was acknowledged, or ABANDONED. Returns how many nanoseconds it took."""
        at = number % RING * _FIELDS
        ring = self._rings[writer]
        if ring[at] != number:
            raise RuntimeError(f"operation {number} of writer {writer} was in flight for more than {RING} others")
        ring[at + 2] = acknowledged_ns
        return acknowledged_ns - ring[at + 1]

    def settle(self, disk: int, first: int, end: int, state: int) -> None:
        """Enters what sectors hold from now on, until something else is submitted."""
        self.acked[disk][first:end] = array.array("Q", [state]) * (end - first)

    def settle_trim(self, disk: int, first: int, number: int, zeroed_before: array.array[int], content: Buffer) -> None:
        """Enters what a discard left: each sector went to zero or stayed as it was, and what it did is then fixed.

        One that stayed may still go back to the zeroes of before, by losing what no flush has covered since.
        """
        zero = bytes(SECTOR)
        for index, was in enumerate(zeroed_before):
            sector = first + index
            if content[index * SECTOR : (index + 1) * SECTOR] == zero:
                self.settle(disk, sector, sector + 1, number * 2 + 1)
            else:
                self.zeroed[disk][sector] = was

    def stat(self, writer: int, name: str) -> int:
        """One of the writer's counters, `STATS`."""
        return self._stats[writer][STATS.index(name)]

    def set_stat(self, writer: int, name: str, value: int) -> None:
        """Sets one of the writer's counters."""
        self._stats[writer][STATS.index(name)] = value

    # The driver's side.

    def before(self) -> Before:
        """Taken right before a snapshot is asked for."""
        newest = [self.stat(writer, "newest") for writer in range(self.layout.writers)]
        return Before(time.monotonic_ns(), newest, [array.array("Q", view) for view in self.acked])

    def after(self, before: Before) -> After:
        """Taken right after it was made. Raises RuntimeError if more happened meanwhile than the ring remembers."""
        submitted = [array.array("Q", view) for view in self.submitted]
        zeroed = [array.array("Q", view) for view in self.zeroed]
        operations: list[Op] = []
        for writer, newest in enumerate(before.newest):
            if self.stat(writer, "newest") - newest > RING // 2:
                raise RuntimeError(f"writer {writer} did more than {RING // 2} operations during one snapshot command")
            operations += [op for op in self.operations(writer) if self._concerns(op, before.at_ns)]
        return After(submitted, zeroed, operations)

    def _concerns(self, op: Op, at_ns: int) -> bool:
        """Whether an operation may have been done after `at_ns`."""
        if op.acknowledged_ns == ABANDONED:
            return op.number > self._settled[op.writer]
        return op.acknowledged_ns == IN_FLIGHT or op.acknowledged_ns >= at_ns

    def enter_contents(self, states: list[array.array[int]]) -> None:
        """Enters what the disks were found to hold, while every writer rests and no daemon runs.

        That settles what became of abandoned operations.
        """
        for disk, found in enumerate(states):
            self.acked[disk][:] = self.submitted[disk][:] = found
        self._settled = [self.stat(writer, "newest") for writer in range(self.layout.writers)]

    def operations(self, writer: int) -> list[Op]:
        """What the ring remembers of a writer."""
        ring = self._rings[writer].tolist()
        found: list[Op] = []
        for at in range(0, len(ring), _FIELDS):
            number, sent_ns, acknowledged_ns, disk, first, last = ring[at : at + _FIELDS]
            if number:
                found.append(Op(writer, number, sent_ns, acknowledged_ns, disk, first, last >> 8, last & 0xFF))
        return found

    def floor(self, disk: int) -> array.array[int]:
        """The state of each sector that some flush, or FUA, has covered."""
        return array.array("Q", map(max, zip(*(durable[disk] for durable in self.durable), strict=True)))

    def total(self, name: str) -> int:
        """The sum of a counter over all writers."""
        return sum(self.stat(writer, name) for writer in range(self.layout.writers))
