"""Judges what was read of a disk against the ledger. Pure.

Bounds: a sector must hold an operation no older than what was acknowledged before the snapshot was asked for, and no
younger than what was submitted before it was made; zeroes only where an operation between those two made them.

One instant: there must be a moment such that every operation acknowledged before it is in the snapshot, whole, and
none sent after it is. So, over all disks and writers of one snapshot,

    the latest sending of an operation that is in it  <=  the earliest acknowledgement of one that is not,

and no operation is in it in part. What a discard does is not fixed (each sector goes to zero or stays), so where one is
possible only what follows without doubt is used.
"""

from __future__ import annotations

import array
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.soak.ledger import ABANDONED, TRIM, WRITE, Op
from tests.soak.stamps import BASE_WRITER, SECTOR, Layout

ZEROES = -1
_ZERO = bytes(SECTOR)
_SHOWN_MAX = 8


class Piece(NamedTuple):
    """A run of whole sectors as it was read."""

    disk: int
    first: int
    content: bytes


class Verdict(NamedTuple):
    """`found` has, for each piece, what its sectors hold: the number of an operation, 0 for what was there at first,
    or ZEROES. `wrong` are the faults, a line each."""

    found: list[list[int]]
    wrong: list[str]
    wrong_bytes: int

    def told(self) -> str:
        """The first faults, in lines."""
        more = [f"... and {len(self.wrong) - _SHOWN_MAX} more"] if len(self.wrong) > _SHOWN_MAX else []
        return "\n".join([*self.wrong[:_SHOWN_MAX], *more])


class Limits(NamedTuple):
    """Per disk and sector: the oldest and the youngest state it may show, and the last operation that zeroed it."""

    low: Sequence[array.array[int]]
    high: Sequence[array.array[int]]
    zeroed: Sequence[array.array[int]]


def judge(layout: Layout, limits: Limits, pieces: Iterable[Piece], operations: Sequence[Op] = ()) -> Verdict:
    """Judges pieces of one snapshot, or of disks at rest: then there are no `operations` and only bounds count."""
    found: list[list[int]] = []
    wrong: list[str] = []
    instant = _Instant(layout, limits, operations)
    wrong_bytes = 0
    for piece in pieces:
        held, faults = _check_bounds(layout, limits, piece)
        found.append(held)
        wrong += faults
        wrong_bytes += SECTOR * len(faults)
        instant.look(piece, held)
    if not wrong:  # a sector out of bounds would make a second fault of itself
        wrong = instant.faults()
        wrong_bytes = SECTOR * len(wrong)
    return Verdict(found, wrong, wrong_bytes)


def _check_bounds(layout: Layout, limits: Limits, piece: Piece) -> tuple[list[int], list[str]]:
    disk, first, content = piece
    low, high, zeroed = limits.low[disk], limits.high[disk], limits.zeroed[disk]
    owners = layout.owners(disk)
    held: list[int] = []
    faults: list[str] = []
    for at in range(0, len(content), SECTOR):
        sector = first + at // SECTOR
        data = content[at : at + SECTOR]
        least, most = low[sector], high[sector]
        if data == _ZERO:
            number = ZEROES
            fits = zeroes_fit(layout, disk, sector, least, zeroed[sector])
        else:
            stamp = layout.read(disk, sector, data)
            if stamp is None:
                number, fits = ZEROES, False
            elif stamp.writer == BASE_WRITER:
                number, fits = 0, stamp.number == 0 and not least and layout.has_base(disk, sector)
            else:
                number = stamp.number
                fits = stamp.writer == owners[sector] and least >> 1 <= number <= most >> 1
                # The bound itself tells if it was a write; between the two there may be anything.
                fits = fits and number * 2 + 1 not in (least, most)
        held.append(number)
        if not fits:
            faults.append(_told(layout, disk, sector, data, (least, most, zeroed[sector])))
    return held, faults


def zeroes_fit(layout: Layout, disk: int, sector: int, least: int, zeroed: int) -> bool:
    """Whether a sector whose oldest possible state is `least` may read as zeroes."""
    if not least and not layout.has_base(disk, sector):
        return True
    return bool(least & 1) or (zeroed > 0 and zeroed >= least >> 1)


def _told(layout: Layout, disk: int, sector: int, data: bytes, bounds: tuple[int, int, int]) -> str:
    least, most, zeroed = bounds
    owner = layout.owners(disk)[sector]
    stamp = layout.read(disk, sector, data)
    if data == _ZERO:
        shown = "zeroes"
    elif stamp is None:
        shown = f"no whole stamp of this sector: {data[:32].hex()} ... {data[-32:].hex()}"
    elif stamp.writer == BASE_WRITER:
        shown = "what the backing file holds"
    else:
        shown = f"operation {stamp.number} of writer {stamp.writer}"
    return (
        f"disk {disk} sector {sector} (byte {sector * SECTOR}): expected writer {owner}, from {_state(least)} "
        f"to {_state(most)}, last zeroed by operation {zeroed}; found {shown}"
    )


def _state(state: int) -> str:
    return f"operation {state >> 1}{' (zeroes)' if state & 1 else ''}" if state else "the first content"


class _Instant:
    """Gathers which of the operations around a snapshot are in it, and which are not."""

    def __init__(self, layout: Layout, limits: Limits, operations: Sequence[Op]) -> None:
        self._layout = layout
        self._limits = limits
        self._by_sector: dict[tuple[int, int], list[Op]] = {}
        self._in: dict[Op, tuple[int, int]] = {}
        self._out: dict[Op, tuple[int, int]] = {}
        for op in sorted(operations, key=operator.attrgetter("number")):
            for sector in range(op.first, op.end):
                self._by_sector.setdefault((op.disk, sector), []).append(op)

    def look(self, piece: Piece, held: list[int]) -> None:
        """Takes in what the sectors of a piece hold."""
        for index, number in enumerate(held):
            place = (piece.disk, piece.first + index)
            around = self._by_sector.get(place)
            if around is None:
                continue
            oldest, newest = (number, number) if number != ZEROES else self._zeroed(place, around)
            for op in around:
                if op.number <= oldest:
                    self._in.setdefault(op, place)
                elif op.number > newest and op.kind != TRIM:
                    self._out.setdefault(op, place)

    def _zeroed(self, place: tuple[int, int], around: list[Op]) -> tuple[int, int]:
        """The oldest and the newest operation that may have left the zeroes at a place."""
        least = self._limits.low[place[0]][place[1]]
        by = [op.number for op in around if op.kind != WRITE and op.number > least >> 1]
        at_first = zeroes_fit(self._layout, *place, least, 0)
        oldest = least >> 1 if at_first or not by else by[0]
        return oldest, by[-1] if by else oldest

    def faults(self) -> list[str]:
        """What contradicts that all is of one instant."""
        found = [
            f"{_named(op)} is in the snapshot in part: in at {_at(self._in[op])}, not in at {_at(self._out[op])}"
            for op in self._in.keys() & self._out.keys()
        ]
        acknowledged = [op for op in self._out if op.acknowledged_ns > ABANDONED]
        if self._in and acknowledged:
            latest = max(self._in, key=operator.attrgetter("sent_ns"))
            earliest = min(acknowledged, key=operator.attrgetter("acknowledged_ns"))
            if latest.sent_ns > earliest.acknowledged_ns:
                found.append(
                    f"no single instant: {_named(latest)} is in the snapshot at {_at(self._in[latest])}, "
                    f"{_named(earliest)} is not at {_at(self._out[earliest])}, though it was acknowledged "
                    f"{latest.sent_ns - earliest.acknowledged_ns} ns before the other was sent"
                )
        return found


def _named(op: Op) -> str:
    return f"operation {op.number} of writer {op.writer} (disk {op.disk}, sectors {op.first} to {op.end})"


def _at(place: tuple[int, int]) -> str:
    return f"disk {place[0]} sector {place[1]}"


def check_zero_runs(reference: bytes, runs: Iterable[tuple[int, int]]) -> str:
    """Says where a run (offset, length), told to be a hole or zeroes, holds data; "" if none does."""
    for offset, length in runs:
        data = reference[offset : offset + length]
        if data.count(0) != len(data):
            at = next(index for index, byte in enumerate(data) if byte)
            return f"told to be a hole or zero from {offset} on for {length} bytes, but there is data at {offset + at}"
    return ""


def difference(reference: bytes, other: bytes, offset: int = 0) -> str:
    """Says where `other`, read at `offset`, differs from the reference; "" if it does not."""
    expected = reference[offset : offset + len(other)]
    if expected == other:
        return ""
    if len(expected) != len(other):
        return f"read {len(other)} bytes at {offset}, expected {len(expected)}"
    bad = [at for at in range(0, len(other), SECTOR) if expected[at : at + SECTOR] != other[at : at + SECTOR]]
    at = bad[0]
    return (
        f"{len(bad)} sectors differ from what the same snapshot held before, first {(offset + at) // SECTOR}: "
        f"expected {expected[at : at + 32].hex()}, found {other[at : at + 32].hex()}"
    )
