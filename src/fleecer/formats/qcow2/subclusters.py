"""Extended L2 entries: clusters of 32 subclusters, each of which is allocated, zero, or neither (qcow2.rst, "Extended
L2 Entries").

An entry has 16 bytes: one as ever, whose zero flag is reserved, and a bitmap. Bit x of the bitmap says that subcluster
x is at its place in the host cluster, bit 32 + x that it reads as zeroes; that both are set is an error, and so is an
allocated subcluster where there is no host cluster. The bitmap of a compressed cluster is 0.

In memory the entries of a slice stand in its first half and their bitmaps, in the same order, in the second.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import Header
from fleecer.formats.qcow2.tables import (
    COMPRESSED,
    COPIED,
    Mapping,
    Plan,
    decode_table,
    encode_table,
    equal_until,
    join_backing,
    join_data,
    join_zero,
)
from fleecer.ranges import Buffer

SUBCLUSTERS: Final = 32
ALL: Final = (1 << SUBCLUSTERS) - 1
"""Every subcluster: allocated, as a bitmap; shifted by 32, all of them zero."""


class Subclusters(NamedTuple):
    """What one entry says: the host cluster's offset, 0 for none, and which subclusters are allocated and zero."""

    host: int
    allocated: int
    zero: int


class ExtendedMapping(Mapping):
    """The rules for extended entries."""

    entry_bits = 4
    arrays = 2

    def __init__(self, header: Header, path: str) -> None:
        super().__init__(header, path)
        self.subcluster_bits = header.subcluster_size.bit_length() - 1
        self._standard_odd_bits = self.odd_bits

    def decode(self, data: Buffer) -> array[int]:
        """See `Mapping.decode`: the entries, then the bitmaps."""
        table = decode_table(data)
        return table[::2] + table[1::2]

    def encode(self, entries: array[int]) -> bytes:
        """See `Mapping.encode`."""
        half = len(entries) // 2
        table = array("Q", bytes(len(entries) * 8))
        table[::2], table[1::2] = entries[:half], entries[half:]
        return encode_table(table)

    def used(self, entries: array[int]) -> Iterator[int]:
        """See `Mapping.used`."""
        half = len(entries) // 2
        return (index for index in range(half) if entries[index] or entries[index + half])

    def subclusters(self, entries: array[int], index: int, cluster: int) -> Subclusters:
        """What the entry of a cluster that is not compressed says. `cluster` is the guest cluster, for messages."""
        bitmap = entries[index + len(entries) // 2]
        allocated, zero = bitmap & ALL, bitmap >> SUBCLUSTERS
        host = self.standard(entries[index], cluster)
        if allocated & zero or (allocated and not host):
            problem = f"cluster {cluster} has the subcluster bitmap {bitmap:#018x}, host offset {host}: a contradiction"
            raise CorruptImage(self.path, problem)
        return Subclusters(host, allocated, zero)

    def mask(self, skip: int, length: int) -> int:
        """The subclusters that `length` bytes from `skip` bytes into a cluster on touch, as bits; they end in it."""
        bits = self.subcluster_bits
        return (2 << (skip + length - 1 >> bits)) - (1 << (skip >> bits))

    def stored(self, entries: array[int], index: int, skip: int, length: int) -> int:
        """Where bytes that end in the cluster of `entries[index]` are in the file, if they are there as they are; or 0.

        Whether that is inside the file is for the caller to see.
        """
        mask = self.mask(skip, length)
        host = entries[index] & (COPIED - 1)
        is_there = entries[index + len(entries) // 2] & (mask << SUBCLUSTERS | mask) == mask
        return host + skip if is_there and host and not host & self.odd_bits else 0

    def is_absent(self, entries: array[int], index: int, cluster: int, skip: int, length: int, file_end: int) -> bool:
        """Whether bytes, as for `stored`, are not allocated. `cluster` and `file_end` are as for `plan`."""
        if entries[index] & COMPRESSED:
            return False
        found = self.subclusters(entries, index, cluster)
        if found.allocated and found.host >= file_end:
            raise self._past_end(cluster, found.host, file_end)
        return not (found.allocated | found.zero) & self.mask(skip, length)

    def _plan_run(
        self, plans: list[Plan], entries: array[int], first: int, cluster: int, skip: int, length: int, file_end: int
    ) -> int:
        size, half = self.cluster_size, len(entries) // 2
        if not entries[first] and not entries[first + half]:
            end = first + (skip + length - 1 >> self.cluster_bits) + 1
            index = min(equal_until(entries, first, end), equal_until(entries, first + half, end + half) - half)
            take = min((index - first) * size - skip, length)
            join_backing(plans, take)
            return take
        take = min(size - skip, length)
        found = self.subclusters(entries, first, cluster)
        if found.allocated and found.host >= file_end:
            raise self._past_end(cluster, found.host, file_end)
        self._plan_subclusters(plans, found, skip, skip + take)
        return take

    def _packed(self, entries: array[int], index: int, cluster: int, file_end: int) -> tuple[int, int]:
        if bitmap := entries[index + len(entries) // 2]:
            problem = f"compressed cluster {cluster} has the subcluster bitmap {bitmap:#018x}, which must be 0"
            raise CorruptImage(self.path, problem)
        return super()._packed(entries, index, cluster, file_end)

    def _host(self, entries: array[int], index: int, cluster: int) -> tuple[int, bool]:
        found = self.subclusters(entries, index, cluster)
        return found.host, found.allocated != 0

    def _plan_subclusters(self, plans: list[Plan], found: Subclusters, at: int, end: int) -> None:
        host, allocated, zero = found
        bits = self.subcluster_bits
        while at < end:
            number = at >> bits
            bit = 1 << number
            of_a_kind = allocated if allocated & bit else zero if zero & bit else ~(allocated | zero)
            stop = min((number + _ones(of_a_kind >> number)) << bits, end)
            if allocated & bit:
                join_data(plans, host + at, stop - at)
            elif zero & bit:
                join_zero(plans, stop - at, bool(host))
            else:
                join_backing(plans, stop - at)
            at = stop

    def in_place(self, entries: array[int], first: int, skip: int, length: int, file_end: int) -> tuple[int, int]:
        """See `Mapping.in_place`."""
        size, half = self.cluster_size, len(entries) // 2
        entry = entries[first]
        host = entry & ~COPIED
        if not entry & COPIED or host & self.odd_bits or not host:
            return 0, 0
        done = 0
        at = skip
        while entries[first] == entry and entry & ~COPIED < file_end:
            bitmap = entries[first + half]
            allocated, zero = bitmap & ALL, bitmap >> SUBCLUSTERS
            number = at >> self.subcluster_bits
            stop = 0 if allocated & zero else number + _ones(allocated >> number) << self.subcluster_bits
            if stop <= at:
                break
            done = min(done + stop - at, length)
            if stop < size or done == length:
                break
            at = 0
            first += 1
            entry += size
        return (host + skip, done) if done else (0, 0)


def _ones(bits: int) -> int:
    """How many bits are set from the lowest on, up to the first that is not; at most `SUBCLUSTERS`."""
    return min((~bits & (bits + 1)).bit_length() - 1, SUBCLUSTERS) if ~bits else SUBCLUSTERS


def mapping_of(header: Header, path: str) -> Mapping:
    """The rules for the entries of an image."""
    return ExtendedMapping(header, path) if header.extended_l2 else Mapping(header, path)
