"""Large buffers: aligned, and used again.

New memory costs as much as the copy into it: it is zeroed, and paged in. And where it begins decides how quick the copy
is: a large `bytearray` begins 16 bytes into a page, and a copy from the page cache to there, 16 bytes further on within
its page than where it comes from, takes six times as long on processors of AMD (Zen). So large buffers begin with a
page.

A spare comes from `take`, travels like any buffer (ranges.py: it belongs to whoever has it), and is given back by the
last to have it, once nothing refers to its content any more. Nobody has to: one that is forgotten is just freed.

Invariants:
- Only what `take` made is kept by `give`, so what somebody else made, and may still hold, is never handed out again.
- Kept memory is bounded, by lengths and in all.
"""

from __future__ import annotations

import mmap
from typing import TypeGuard

from fleecer.ranges import Buffer, ReadAtOnce
from fleecer.units import KiB, MiB

LENGTH_MIN = 64 * KiB
"""Shorter ones are ordinary: those are as quick."""
LENGTH_MAX = 1 * MiB
"""Longer ones are aligned, but not kept."""
LENGTHS_MAX = 4
KEPT_MAX_BYTES = 8 * MiB
"""Of each length. Clients that are in a hurry use one or two lengths."""

Memory = mmap.mmap

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class _Memory(mmap.mmap):
    """Memory that may be used again. Nothing is mapped but memory."""


_kept: dict[int, list[memoryview]] = {}


def memory(length: int) -> Memory:
    """Zeroes, of which a page costs nothing until it is used: for connections, most of which send little."""
    return mmap.mmap(-1, length, _PRIVATE)


def take(length: int) -> bytearray | memoryview:
    """`length` bytes; what they are is left from before, so whoever takes them writes them all."""
    if length < LENGTH_MIN:
        return bytearray(length)
    if length > LENGTH_MAX:
        return memoryview(memory(length))
    try:
        return _kept[length].pop()
    except (KeyError, IndexError):
        return memoryview(_Memory(-1, length, _PRIVATE))


def give(buffer: Buffer) -> None:
    """Gives a buffer back, if it is a spare. The caller is the last that had it, and forgets it."""
    if not is_spare(buffer):
        return
    length = len(buffer)
    spares = _kept.get(length)
    if spares is None:
        if len(_kept) >= LENGTHS_MAX:
            _kept.clear()
        spares = _kept[length] = []
    if len(spares) * length < KEPT_MAX_BYTES:
        spares.append(buffer)


def take_filled(read: ReadAtOnce, offset: int, length: int) -> Buffer | None:
    """What `read` finds there, in memory of its own; None where it would have to wait."""
    data = take(length)
    if read(offset, memoryview(data)):
        return data
    give(data)
    return None


def is_spare(buffer: Buffer) -> TypeGuard[memoryview]:
    """Whether `give` would keep it: it is all of what `take` once made."""
    return type(buffer) is memoryview and type(buffer.obj) is _Memory and len(buffer) == len(buffer.obj)
