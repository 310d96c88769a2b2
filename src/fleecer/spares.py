"""Large buffers that are used again. New memory costs as much as the copy into it: it is zeroed, and paged in.

A spare comes from `take`, travels like any buffer (ranges.py: it belongs to whoever has it), and is given back by the
last to have it, once nothing refers to its content any more. Nobody has to: one that is forgotten is just freed.

Invariants:
- Only what `take` made is kept by `give`, so what somebody else made, and may still hold, is never handed out again.
- Kept memory is bounded, by lengths and in all.
"""

from __future__ import annotations

from fleecer.ranges import Buffer
from fleecer.units import KiB, MiB

LENGTH_MIN = 64 * KiB
"""Shorter ones are made anew: that is as quick."""
LENGTH_MAX = 1 * MiB
LENGTHS_MAX = 8
KEPT_MAX_BYTES = 2 * MiB
"""Of each length. Clients that are in a hurry use one or two lengths."""


class Spare(bytearray):
    """A buffer that may be used again."""

    __slots__ = ()


_kept: dict[int, list[Spare]] = {}


def take(length: int) -> bytearray:
    """`length` bytes; what they are is left from before, so whoever takes them writes them all."""
    if not LENGTH_MIN <= length <= LENGTH_MAX:
        return bytearray(length)
    try:
        return _kept[length].pop()
    except (KeyError, IndexError):
        return Spare(length)


def give(buffer: Buffer) -> None:
    """Gives a buffer back, if it is a spare. The caller is the last that had it, and forgets it."""
    if type(buffer) is not Spare:
        return
    length = len(buffer)
    spares = _kept.get(length)
    if spares is None:
        if len(_kept) >= LENGTHS_MAX:
            _kept.clear()
        spares = _kept[length] = []
    if len(spares) * length < KEPT_MAX_BYTES:
        spares.append(buffer)
