"""A sparse bitmap over cluster numbers: its memory follows the clusters touched, never the disk's size.

Bits live in chunks that are made when a bit in them is first set; a chunk that is absent is all zeroes. Ranges are
[start, end) in bits. A 64 TiB disk with nothing marked costs nothing, which is what makes taking a snapshot instant.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray

_CHUNK_SHIFT = 15
_CHUNK_BITS = 1 << _CHUNK_SHIFT
_CHUNK_MASK = _CHUNK_BITS - 1


class Bitmap:
    """A set of cluster numbers with quick range operations."""

    __slots__ = ("_chunks",)

    def __init__(self) -> None:
        self._chunks: dict[int, bitarray] = {}

    def __getitem__(self, bit: int) -> int:
        chunk = self._chunks.get(bit >> _CHUNK_SHIFT)
        return 0 if chunk is None else chunk[bit & _CHUNK_MASK]

    def set(self, start: int, end: int) -> None:
        """Sets every bit of the range."""
        for key, first, last in _by_chunk(start, end):
            chunk = self._chunks.get(key)
            if chunk is None:
                chunk = self._chunks[key] = bitarray(_CHUNK_BITS)
                chunk.setall(0)
            chunk[first:last] = 1

    def clear(self, start: int, end: int) -> None:
        """Clears every bit of the range."""
        for key, first, last in _by_chunk(start, end):
            chunk = self._chunks.get(key)
            if chunk is not None:
                chunk[first:last] = 0

    def all(self, start: int, end: int) -> bool:
        """Whether every bit of the range is set."""
        return self.run(start, end) == (1, end) if start < end else True

    def run(self, start: int, end: int) -> tuple[int, int]:
        """The value of bit `start`, and where, at most at `end`, the run of equal bits that begins there stops."""
        if start >> _CHUNK_SHIFT == (end - 1) >> _CHUNK_SHIFT:  # by far the most frequent case
            return self._run_in_chunk(start, end)
        value = self[start]
        for key, first, last in _by_chunk(start, end):
            chunk = self._chunks.get(key)
            if chunk is None:
                if value:
                    return value, (key << _CHUNK_SHIFT) + first
                continue
            at = chunk.find(1 - value, first, last)
            if at >= 0:
                return value, (key << _CHUNK_SHIFT) + at
        return value, end

    def _run_in_chunk(self, start: int, end: int) -> tuple[int, int]:
        chunk = self._chunks.get(start >> _CHUNK_SHIFT)
        if chunk is None:
            return 0, end
        first = start & _CHUNK_MASK
        value = chunk[first]
        at = chunk.find(1 - value, first, first + end - start)
        return value, end if at < 0 else start - first + at

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The range as runs of equal bits: (start, end, value)."""
        while start < end:
            value, stop = self.run(start, end)
            yield start, stop, value
            start = stop

    def count(self) -> int:
        """How many bits are set."""
        return sum(chunk.count() for chunk in self._chunks.values())

    def update(self, other: Bitmap) -> None:
        """Sets every bit that is set in `other`."""
        for key, theirs in other._chunks.items():
            mine = self._chunks.get(key)
            if mine is None:
                self._chunks[key] = theirs.copy()
            else:
                mine |= theirs


def _by_chunk(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The range as (chunk, first bit in it, bit after the last in it)."""
    while start < end:
        key = start >> _CHUNK_SHIFT
        stop = min(end, (key + 1) << _CHUNK_SHIFT)
        base = key << _CHUNK_SHIFT
        yield key, start - base, stop - base
        start = stop
