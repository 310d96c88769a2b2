"""Large buffers as simulations have them: those of a sector are large already, and one that is given back is spoiled.

So whoever still reads, sends or writes what nobody has any more (spares.py) has bytes that no disk ever held, and the
oracles see them. Real spares are spoiled only once somebody else takes them, which few schedules bring about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeGuard

from fleecer import spares
from fleecer.ranges import Buffer

LENGTH_MIN = 512
SPOILED = 0xA5


class _Memory(bytearray):
    """Memory of `take`."""


def take(length: int) -> bytearray | memoryview:
    """As `spares.take`."""
    return memoryview(_Memory(length)) if length >= LENGTH_MIN else bytearray(length)


def give(buffer: Buffer) -> None:
    """As `spares.give`, but nobody ever gets it again."""
    if is_spare(buffer):
        buffer[:] = bytes([SPOILED]) * len(buffer)


def is_spare(buffer: Buffer) -> TypeGuard[memoryview]:
    """As `spares.is_spare`."""
    return type(buffer) is memoryview and type(buffer.obj) is _Memory and len(buffer) == len(buffer.obj)


_STAND_INS = {"LENGTH_MIN": LENGTH_MIN, "take": take, "give": give, "is_spare": is_spare}


@contextlib.contextmanager
def spoiled_when_given() -> Iterator[None]:
    """Inside, these stand in for spares.py's."""
    before = {name: getattr(spares, name) for name in _STAND_INS}
    try:
        for name, stand_in in _STAND_INS.items():
            setattr(spares, name, stand_in)
        yield
    finally:
        for name, real in before.items():
            setattr(spares, name, real)
