"""Refcounts: entries of every width, references counted in memory, and a refcount structure laid out anew.

Source: qcow2.rst, "Host cluster management". Invariants: an entry never changes its neighbours; counts that do not fit
their width are refused, never cut.
"""

from __future__ import annotations

import functools
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from fleecer.errors import CorruptImage, UsageError
from fleecer.formats.qcow2.header import REFCOUNT_TABLE_BYTES_MAX
from fleecer.ranges import Buffer

_CHUNK_BITS: Final = 9
_TYPECODES: Final = {4: "H", 5: "I", 6: "Q"}


class RefcountWidth:
    """How counts of 1 << `order` bits stand in a refcount block: big-endian, or from a byte's lowest bit upwards."""

    __slots__ = ("_has_free", "bits", "maximum", "order")

    def __init__(self, order: int) -> None:
        self.order = order
        self.bits = 1 << order
        self.maximum = (1 << self.bits) - 1
        # For widths below a byte: 1 for each value of a byte in which some count is 0.
        self._has_free = _bytes_with_a_zero_field(self.bits) if order < 3 else b""

    def entries_in(self, length: int) -> int:
        """Counts held by `length` bytes."""
        return length * 8 >> self.order

    def decode(self, data: Buffer) -> Sequence[int]:
        """All counts held by `data`."""
        if self.order < 3:
            fields = range(0, 8, self.bits)
            return [value >> at & self.maximum for value in data for at in fields]
        if self.order == 3:
            return bytes(data)
        counts = array(_TYPECODES[self.order])
        counts.frombytes(data)
        if sys.byteorder == "little":
            counts.byteswap()
        return counts

    def get(self, data: Buffer, index: int) -> int:
        """The count at `index`."""
        if self.order >= 3:
            size = self.bits >> 3
            return int.from_bytes(data[index * size : (index + 1) * size], "big")
        at = index << self.order
        return data[at >> 3] >> (at & 7) & self.maximum

    def put(self, data: bytearray, index: int, count: int) -> None:
        """Sets the count at `index`; it must not exceed `maximum`."""
        assert 0 <= count <= self.maximum, f"refcount {count} does not fit {self.bits} bits"
        if self.order >= 3:
            size = self.bits >> 3
            data[index * size : (index + 1) * size] = count.to_bytes(size, "big")
        else:
            at = index << self.order
            shift = at & 7
            data[at >> 3] = data[at >> 3] & ~(self.maximum << shift) | count << shift

    def put_ones(self, data: bytearray, index: int, run: int) -> None:
        """Sets `run` counts from `index` on to 1."""
        if self.order >= 3:
            size = self.bits >> 3
            data[index * size : (index + run) * size] = (1).to_bytes(size, "big") * run
        else:
            for at in range(index, index + run):
                self.put(data, at, 1)

    def find_free(self, data: Buffer, index: int) -> int:
        """The first index from `index` on whose count is 0, -1 if there is none."""
        end = self.entries_in(len(data))
        if self.order >= 3:
            return self._find_free_wide(bytes(data), index)
        flags = bytes(data).translate(self._has_free)
        while index < end:
            byte = flags.find(1, index >> (3 - self.order))
            if byte < 0:
                return -1
            index = max(index, byte << (3 - self.order))
            stop = (byte + 1) << (3 - self.order)
            while index < stop:
                if not self.get(data, index):
                    return index
                index += 1
        return -1

    def _find_free_wide(self, data: bytes, index: int) -> int:
        size = self.bits >> 3
        zero = bytes(size)
        at = index * size
        while True:
            at = data.find(zero, at)
            if at < 0 or at % size == 0:
                return at if at < 0 else at // size
            # Zero bytes across two entries: whether the second is free is seen at its own start.
            at += size - at % size

    def find_last_used(self, data: bytes) -> int:
        """The last index whose count is not 0, -1 if there is none."""
        used = len(data.rstrip(b"\0"))
        if self.order >= 3:
            return (used - 1) // (self.bits >> 3)
        # Lower indexes stand in a byte's lower bits.
        return (used * 8 - 9 + data[used - 1].bit_length()) >> self.order if used else -1

    def free_run(self, data: Buffer, index: int, most: int) -> int:
        """How many counts from `index` on are 0, at most `most`."""
        most = min(most, self.entries_in(len(data)) - index)
        if self.order >= 3:
            size = self.bits >> 3
            part = bytes(data[index * size : (index + most) * size])
            return (len(part) - len(part.lstrip(b"\0"))) // size
        run = 0
        while run < most and not self.get(data, index + run):
            run += 1
        return run


@functools.cache
def _bytes_with_a_zero_field(bits: int) -> bytes:
    """For each value of a byte: 1 if one of its fields of so many bits is 0."""
    fields, mask = range(0, 8, bits), (1 << bits) - 1
    return bytes(any(not value >> at & mask for at in fields) for value in range(256))


class References:
    """How often each host cluster is referred to. Costs memory by the clusters referred to, not by the file's size."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}
        self.end = 0
        """One more than the highest cluster referred to."""

    def __getitem__(self, cluster: int) -> int:
        chunk = self._chunks.get(cluster >> _CHUNK_BITS)
        return chunk[cluster & (1 << _CHUNK_BITS) - 1] if chunk is not None else 0

    def __setitem__(self, cluster: int, count: int) -> None:
        key = cluster >> _CHUNK_BITS
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = array("Q", bytes(8 << _CHUNK_BITS))
        chunk[cluster & (1 << _CHUNK_BITS) - 1] = count
        self.end = max(self.end, cluster + 1)

    def counts(self, first: int, count: int) -> list[int]:
        """The references to `count` clusters from `first` on."""
        found: list[int] = []
        cluster, end = first, first + count
        while cluster < end:
            at = cluster & (1 << _CHUNK_BITS) - 1
            take = min((1 << _CHUNK_BITS) - at, end - cluster)
            chunk = self._chunks.get(cluster >> _CHUNK_BITS)
            found.extend([0] * take if chunk is None else chunk[at : at + take])
            cluster += take
        return found

    def add(self, first: int, count: int = 1, weight: int = 1) -> None:
        """`weight` more references to each of `count` clusters from `first` on."""
        for cluster in range(first, first + count):
            self[cluster] = self[cluster] + weight

    def clusters(self) -> Iterator[tuple[int, int]]:
        """(cluster, references) for each cluster referred to, in ascending order."""
        for key in sorted(self._chunks):
            for at, count in enumerate(self._chunks[key]):
                if count:
                    yield (key << _CHUNK_BITS) + at, count

    def blocks(self, per_block: int) -> list[int]:
        """Numbers of the refcount blocks, of `per_block` counts each, that are needed to hold every count."""
        return sorted({cluster // per_block for cluster, _ in self.clusters()})


class RefcountLayout(NamedTuple):
    """A refcount structure to be written: where its table stands, and the pieces (offset, bytes), blocks first."""

    table_offset: int
    table_clusters: int
    pieces: Iterator[tuple[int, bytes]]


def lay_out_refcounts(references: References, order: int, cluster_bits: int, first: int, path: str) -> RefcountLayout:
    """A refcount structure for `references`, itself standing in the clusters from `first` on, which must be unused.

    The structure's own clusters are added to `references`. Raises CorruptImage if a count does not fit the width,
    UsageError if the table would exceed its limit.
    """
    width = RefcountWidth(order)
    cluster_size = 1 << cluster_bits
    per_block = width.entries_in(cluster_size)
    for cluster, count in references.clusters():
        if count > width.maximum:
            raise CorruptImage(path, f"cluster {cluster} has {count} references; refcount_bits {width.bits} is too few")
    needed = set(references.blocks(per_block))
    blocks, table_clusters = len(needed), 1
    while True:
        end = first + blocks + table_clusters
        numbers = sorted(needed.union(range(first // per_block, (end - 1) // per_block + 1)))
        table_bytes = (numbers[-1] + 1) * 8
        if len(numbers) <= blocks and table_bytes <= table_clusters << cluster_bits:
            break
        blocks = max(blocks, len(numbers))
        table_clusters = max(table_clusters, -(-table_bytes >> cluster_bits))
    if table_clusters << cluster_bits > REFCOUNT_TABLE_BYTES_MAX:
        size = table_clusters << cluster_bits
        raise UsageError(
            f"a refcount table of {size} bytes exceeds limit {REFCOUNT_TABLE_BYTES_MAX}; use larger clusters"
        )
    # Where one more block would only be needed for itself, its cluster stays unused: not counted, not written.
    references.add(first, len(numbers))
    references.add(first + blocks, table_clusters)

    def pieces() -> Iterator[tuple[int, bytes]]:
        table = bytearray(table_clusters << cluster_bits)
        for at, number in enumerate(numbers):
            block = bytearray(cluster_size)
            for index, count in enumerate(references.counts(number * per_block, per_block)):
                if count:
                    width.put(block, index, count)
            struct.pack_into(">Q", table, number * 8, (first + at) << cluster_bits)
            yield (first + at) << cluster_bits, bytes(block)
        yield (first + blocks) << cluster_bits, bytes(table)

    return RefcountLayout((first + blocks) << cluster_bits, table_clusters, pieces())
