"""What a disk and its snapshots may read as: the judge of a simulation, sector by sector.

Every write fills its sectors with a number of its own, so a sector that is read tells which write it is from. Time is
counted in calls and returns, not seconds: what returned before something was called came before it.

    disk       a sector reads as a write that had begun when the read returned, and that no other write replaced for
               good before the read began: one that began after the first returned, and returned before the read began
    snapshot   a sector reads as a write that had returned before the instant and was not replaced before it; all
               reads of it, and every status that says zero, agree on which
    failed     a write that failed may show, or not, from its beginning on for ever, torn or whole
    discard    each sector keeps its value or becomes zero
    power cut  a sector reads as a change that had begun, and that no other replaced that was flushed: one that began
               after the first returned, and itself returned before a flush was called that returned before the cut
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable, Iterable

SECTOR_BYTES = 512
_STAMP = struct.Struct("<QQ")


class Violation(AssertionError):
    """The program did what no order of events allows."""


@functools.lru_cache(1 << 12)
def stamp(number: int, sector: int) -> bytes:
    """A sector's content as written by write `number` (0: zeroes)."""
    if not number:
        return bytes(SECTOR_BYTES)
    return _STAMP.pack(number, sector) * (SECTOR_BYTES // _STAMP.size)


def read_stamp(data: bytes, sector: int) -> int:
    """Which write a sector is from. Raises Violation for a mixture, or another sector's content."""
    number, place = _STAMP.unpack_from(data)
    if data != stamp(number, sector if number else 0):
        raise Violation(f"sector {sector} is torn or not its own: it begins with write {number} for sector {place}")
    return int(number)


@dataclasses.dataclass(slots=True)
class Change:
    """A write, zero or discard of sectors [first, end). `number` is what it leaves.

    `begun_at` and `durable_at` are moments of `History.clock`: when it was called, and when a flush of it returned.
    """

    number: int
    first: int
    end: int
    began: int
    ended: int | None = None
    keeps: bool = False  # a discard may leave what was there
    failed: bool = False
    lingers: bool = False  # it may be done long before it returns: FUA waits for a flush
    begun_at: int = 0
    durable_at: int | None = None


class History:
    """All changes of one disk, and what may be read of it. Sectors begin as `initial` tells, by default zero."""

    def __init__(self, sectors: int, initial: dict[int, int] | None = None) -> None:
        self.sectors = sectors
        self.now = 1
        self.clock: Callable[[], int] = int
        self._number = 0
        start = [
            Change((initial or {}).get(sector, 0), sector, sector + 1, 0, 0, durable_at=0) for sector in range(sectors)
        ]
        self._of: list[list[Change]] = [[change] for change in start]

    def tick(self) -> int:
        """Counts one call or return."""
        self.now += 1
        return self.now

    def begin_read(self) -> int:
        """A read is called; for `check_read`."""
        return self.tick()

    def begin(
        self, first: int, end: int, *, zero: bool = False, discard: bool = False, lingers: bool = False
    ) -> Change:
        """A change is called."""
        if not zero and not discard:
            self._number += 1
        number = 0 if zero or discard else self._number
        change = Change(number, first, end, self.tick(), keeps=discard, lingers=lingers, begun_at=self.clock())
        for sector in range(first, end):
            self._of[sector].append(change)
        return change

    def finish(self, change: Change, *, failed: bool = False) -> None:
        """It has returned. One that failed stays possible for ever."""
        change.failed = failed
        if not failed:
            change.ended = self.tick()

    def begin_flush(self) -> list[Change]:
        """A flush is called. Gives what it covers, for `finish_flush`."""
        return [change for changes in self._of for change in changes if change.ended is not None]

    def finish_flush(self, covered: Iterable[Change]) -> None:
        """It has returned, and not failed."""
        moment = self.clock()
        for change in covered:
            if change.durable_at is None:
                change.durable_at = moment

    def flushes_before(self, moment: int) -> int:
        """How many flushed changes of sectors a power cut at that moment must leave."""
        return sum(
            change.durable_at is not None and change.durable_at <= moment for changes in self._of for change in changes
        )

    def check_after_cut(self, moment: int, data: bytes) -> None:
        """Raises Violation unless the disk may read as `data` after a power cut at that moment of `clock`."""
        for sector, found in _stamps(0, data):
            begun = [change for change in self._of[sector] if change.begun_at <= moment]
            durable = _last_begun([c for c in begun if c.durable_at is not None and c.durable_at <= moment])
            allowed = {c.number for c in begun if c.ended is None or c.ended >= durable}
            if found not in allowed:
                raise Violation(f"sector {sector} reads as write {found} after a cut; allowed: {sorted(allowed)}")

    def allowed(self, sector: int, began: int) -> set[int]:
        """What a read of the sector may give that was called at `began` and returns now."""
        changes = self._of[sector]
        over = _last_begun([c for c in changes if c.ended is not None and c.ended < began])
        return {c.number for c in changes if c.ended is None or c.ended >= over}

    def check_read(self, offset: int, data: bytes, began: int) -> None:
        """Raises Violation unless a read of the disk, called at `began`, may have given `data`."""
        for sector, found in _stamps(offset, data):
            allowed = self.allowed(sector, began)
            if found not in allowed:
                raise Violation(f"the disk's sector {sector} reads as write {found}; allowed: {sorted(allowed)}")

    def image(self, *, answers_on_the_way: bool = False) -> list[set[int]]:
        """What each sector may be at this very instant, while no change is under way on the disk itself.

        A change that was called and has not returned is held back somewhere above, and not part of it; but where it
        lingers, or with `answers_on_the_way`, it may be done, and only its answer not here yet.
        """
        self.tick()
        image = []
        for changes in self._of:
            over = _last_begun([c for c in changes if c.ended is not None])
            image.append(
                {
                    c.number
                    for c in changes
                    if (c.failed or c.lingers or answers_on_the_way if c.ended is None else c.ended >= over)
                }
            )
        return image


class SnapshotOracle:
    """What a snapshot must read as: each sector one of `image`, the same one for ever."""

    def __init__(self, name: str, image: list[set[int]]) -> None:
        self.name = name
        self._image = image

    def check_read(self, offset: int, data: bytes) -> None:
        """Raises Violation unless a read may have given `data`; from now on it must."""
        for sector, found in _stamps(offset, data):
            self._pin(sector, found, "reads as")

    def check_zero(self, offset: int, length: int) -> None:
        """A status said zero for the range."""
        for sector in range(offset // SECTOR_BYTES, -(-(offset + length) // SECTOR_BYTES)):
            self._pin(sector, 0, "is said to be zero, write")

    def _pin(self, sector: int, found: int, how: str) -> None:
        if found not in self._image[sector]:
            allowed = sorted(self._image[sector])
            raise Violation(f"snapshot {self.name}: sector {sector} {how} {found}; at its instant it was {allowed}")
        self._image[sector] = {found}


def _last_begun(changes: list[Change]) -> int:
    """When the last of those was called that certainly replace what was there: all that ended before is gone."""
    return max([c.began for c in changes if not c.keeps], default=0)


def _stamps(offset: int, data: bytes) -> Iterable[tuple[int, int]]:
    assert offset % SECTOR_BYTES == 0, "the oracle looks at whole sectors"
    assert len(data) % SECTOR_BYTES == 0, "the oracle looks at whole sectors"
    for at in range(0, len(data), SECTOR_BYTES):
        sector = (offset + at) // SECTOR_BYTES
        yield sector, read_stamp(bytes(data[at : at + SECTOR_BYTES]), sector)
