"""Byte ranges and buffers: alignment, pieces, and the test for zeroes. Offsets and lengths are bytes."""

from __future__ import annotations

from collections.abc import Callable

from fleecer.units import MiB

Buffer = bytes | bytearray | memoryview
"""Bytes in memory. Who returns or passes one gives it away: neither side changes it afterwards."""

ReadAtOnce = Callable[[int, memoryview], bool]
"""Fills the memory with the bytes at an offset if that takes no wait; False, with nothing else done, if it would. What
the memory holds then, or after a failure, which is raised, is of no use."""
WriteAtOnce = Callable[[int, Buffer], bool]
"""Writes the bytes to an offset if that takes no wait; False, with nothing done, if it would. A failure is raised. The
bytes are the caller's again when it returns."""

ZEROES = bytes(1 * MiB)

PIECE_BYTES = 1 * MiB
"""How much one request does without a wait before others have a turn of the loop."""


def align_down(offset: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is not above `offset`."""
    return offset - offset % alignment


def align_up(offset: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `offset`."""
    return -(-offset // alignment) * alignment


def ends_piece(offset: int, length: int) -> bool:
    """Whether a multiple of `PIECE_BYTES` lies behind the first byte of a range, its end included."""
    return offset // PIECE_BYTES != (offset + length) // PIECE_BYTES


def is_power_of_two(number: int) -> bool:
    """Whether `number` is 1, 2, 4, 8 ..."""
    return number > 0 and number & (number - 1) == 0


def is_zero(data: Buffer) -> bool:
    """Whether every byte of `data` is zero. Data that is not is found out at its first non-zero bytes."""
    length = len(data)
    if length <= len(ZEROES):
        return ZEROES.startswith(data)
    view = memoryview(data)
    return all(ZEROES.startswith(view[start : start + len(ZEROES)]) for start in range(0, length, len(ZEROES)))


def zeroes(length: int) -> Buffer:
    """`length` zero bytes, without making them anew where that can be helped."""
    return memoryview(ZEROES)[:length] if length <= len(ZEROES) else bytes(length)
