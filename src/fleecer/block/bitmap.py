"""A sparse bitmap over cluster numbers: its memory follows the clusters touched, never the disk's size.

Bits live in chunks that are made when a bit in them is first set; a chunk that is absent is all zeroes. Ranges are
[start, end) in bits. A 64 TiB disk with nothing marked costs nothing, which is what makes taking a snapshot instant.

Invariant: a chunk that another bitmap may have too, or that stands for all ones, is in `_shared` and is never changed:
whoever changes a bit in it takes a copy first.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray

_CHUNK_SHIFT = 15
_CHUNK_BITS = 1 << _CHUNK_SHIFT
_CHUNK_MASK = _CHUNK_BITS - 1
_ALL_ONES = bitarray(_CHUNK_BITS)
_ALL_ONES.setall(1)


class Bitmap:
    """A set of cluster numbers with quick range operations."""

    __slots__ = ("_chunks", "_shared")

    def __init__(self) -> None:
        self._chunks: dict[int, bitarray] = {}
        self._shared: set[int] = set()

    def __getitem__(self, bit: int) -> int:
        chunk = self._chunks.get(bit >> _CHUNK_SHIFT)
        return 0 if chunk is None else chunk[bit & _CHUNK_MASK]

    def set(self, start: int, end: int) -> None:
        """Sets every bit of the range. It takes no memory for what it fills from end to end."""
        key = start >> _CHUNK_SHIFT
        if end - start < _CHUNK_BITS and key == (end - 1) >> _CHUNK_SHIFT:  # by far the most frequent case
            first = start & _CHUNK_MASK
            self._own(key)[first : first + end - start] = 1
            return
        for key, first, last in _by_chunk(start, end):
            if last - first == _CHUNK_BITS:
                self._chunks[key] = _ALL_ONES
                self._shared.add(key)
            else:
                self._own(key)[first:last] = 1

    def clear(self, start: int, end: int) -> None:
        """Clears every bit of the range."""
        for key, first, last in _by_chunk(start, end):
            if key in self._chunks:
                self._own(key)[first:last] = 0

    def _own(self, key: int) -> bitarray:
        """A chunk that may be changed."""
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = bitarray(_CHUNK_BITS)
            chunk.setall(0)
        elif key in self._shared:
            chunk = self._chunks[key] = chunk.copy()
            self._shared.remove(key)
        return chunk

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

    def any(self) -> bool:
        """Whether any bit is set."""
        return any(chunk.any() for chunk in self._chunks.values())

    def update(self, other: Bitmap) -> None:
        """Sets every bit that is set in `other`. What only `other` has is shared, so it costs little."""
        for key, theirs in other._chunks.items():
            if key not in self._chunks:
                self._chunks[key] = theirs
                self._shared.add(key)
                other._shared.add(key)
            elif self._chunks[key] is not theirs:
                mine = self._own(key)
                mine |= theirs


def _by_chunk(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The range as (chunk, first bit in it, bit after the last in it)."""
    while start < end:
        key = start >> _CHUNK_SHIFT
        stop = min(end, (key + 1) << _CHUNK_SHIFT)
        base = key << _CHUNK_SHIFT
        yield key, start - base, stop - base
        start = stop
