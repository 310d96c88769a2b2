"""L1 and L2 entries, and what they mean: look-ups that return plans (qcow2.rst, "Cluster mapping").

A plan tells where a run of guest bytes lives; executing it is the node's work. Invariants: a plan's host bytes start
inside the file and are aligned as the format wants, reserved bits were clear; whatever is not so raises CorruptImage
and yields no plan. Neighbours that can be read in one go come as one plan.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import Header
from fleecer.ranges import Buffer

COPIED: Final = 1 << 63
"""The cluster's refcount is exactly one: it may be written in place."""
COMPRESSED: Final = 1 << 62
ZERO_FLAG: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
SECTOR: Final = 512


class Data(NamedTuple):
    """Stored as they are, at `host_offset`. The file may end inside the run; what is missing reads as zeroes."""

    host_offset: int
    length: int


class Zero(NamedTuple):
    """Zeroes by the entry's flag; `allocated` where host clusters are set aside for them."""

    length: int
    allocated: bool


class Compressed(NamedTuple):
    """`length` bytes from `offset_in_cluster` of a cluster that is packed in at most `host_length` bytes."""

    host_offset: int
    host_length: int
    offset_in_cluster: int
    length: int


class Backing(NamedTuple):
    """Not allocated here: the backing file's bytes, zeroes past its end or where there is none."""

    length: int


Plan = Data | Zero | Compressed | Backing


class HostClusters(NamedTuple):
    """Host clusters that one entry refers to: the first one's number, and how many."""

    first: int
    clusters: int


def decode_table(data: Buffer) -> array[int]:
    """Big-endian 64-bit entries as an array in this machine's order. `data` is a multiple of 8 bytes."""
    entries = array("Q")
    entries.frombytes(data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def encode_table(entries: array[int]) -> bytes:
    """The entries as they stand in the file."""
    copy = entries[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()


class Mapping:
    """One image's rules for L1 and L2 entries. It holds no entries, only what the header says about them."""

    entry_bits = 3
    """An L2 entry has 1 << `entry_bits` bytes."""
    arrays = 1
    """How many numbers `decode` makes of an entry: first that of each, in order, then what else there is."""

    def __init__(self, header: Header, path: str) -> None:
        self.path = path
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.has_zero_flag = header.version >= 3
        self.odd_bits = ~(OFFSET_MASK & -header.cluster_size) & (COPIED - 1)
        """Bits below COPIED that are clear in the entry of an ordinary data cluster, and in any good L1 entry."""
        self._standard_odd_bits = self.odd_bits & ~(ZERO_FLAG if self.has_zero_flag else 0)
        self._size_shift = 62 - (header.cluster_bits - 8)
        self._sectors_mask = (1 << (header.cluster_bits - 8)) - 1

    def decode(self, data: Buffer) -> array[int]:
        """L2 entries as an array, by the number of their cluster."""
        return decode_table(data)

    def encode(self, entries: array[int]) -> bytes:
        """What `decode` took, as it stands in the file."""
        return encode_table(entries)

    def used(self, entries: array[int]) -> Iterator[int]:
        """The indexes of the entries that say anything at all."""
        return (index for index, entry in enumerate(entries) if entry)

    def content_offset(self, entries: array[int], index: int, cluster: int) -> int:
        """Where the file has to reach for the content of a cluster; 0 where it has none of its own, or none to be read.

        `cluster` is as for `plan`.
        """
        if entries[index] & COMPRESSED:
            return self._packed(entries, index, cluster, 1 << 64)[0]
        host, has_content = self._host(entries, index, cluster)
        return host if has_content else 0

    def table_offset(self, entry: int, l1_index: int, file_end: int) -> int:
        """Host offset of the L2 table that an L1 entry names, 0 where there is none."""
        offset = entry & ~COPIED
        if offset & self.odd_bits or (not offset and entry):
            raise CorruptImage(self.path, f"L1 entry {l1_index} is {entry:#018x}: misaligned or reserved bits set")
        if offset >= file_end and offset:
            raise CorruptImage(self.path, f"L1 entry {l1_index} names {offset}, past the file's end at {file_end}")
        return offset

    def compressed(self, entry: int, cluster: int, file_end: int) -> tuple[int, int]:
        """Host offset and length of a compressed cluster's bytes. `cluster` is the guest cluster, for messages."""
        host = entry & ((1 << self._size_shift) - 1)
        length = ((entry >> self._size_shift & self._sectors_mask) + 1) * SECTOR - host % SECTOR
        if host >> 56 or not host:
            raise CorruptImage(self.path, f"compressed cluster {cluster} has L2 entry {entry:#018x}: bad offset")
        if host >= file_end:
            raise CorruptImage(
                self.path, f"compressed cluster {cluster} at {host} is past the file's end at {file_end}"
            )
        return host, length

    def standard(self, entry: int, cluster: int) -> int:
        """Host offset in the entry of a cluster that is not compressed, 0 where it has none."""
        host = entry & OFFSET_MASK
        if entry & self._standard_odd_bits or (entry & COPIED and not host):
            raise CorruptImage(
                self.path, f"cluster {cluster} has L2 entry {entry:#018x}: misaligned or reserved bits set"
            )
        return host

    def plan(
        self, plans: list[Plan], entries: array[int], first: int, cluster: int, skip: int, length: int, file_end: int
    ) -> None:
        """Appends to `plans` what `length` bytes are, from `skip` bytes into the cluster of `entries[first]` on.

        `cluster` is that cluster's guest number; the range ends inside `entries`; `file_end` is the file's size.
        A run that goes on where the last of `plans` ends is joined to it.
        """
        bits = self.cluster_bits
        while length:
            if entries[first] & COMPRESSED:
                take = min(self.cluster_size - skip, length)
                plans.append(Compressed(*self._packed(entries, first, cluster, file_end), skip, take))
            else:
                take = self._plan_run(plans, entries, first, cluster, skip, length, file_end)
            passed = skip + take >> bits
            first += passed
            cluster += passed
            length -= take
            skip = 0

    def _plan_run(
        self, plans: list[Plan], entries: array[int], first: int, cluster: int, skip: int, length: int, file_end: int
    ) -> int:
        """As `plan`, for what goes on as the first entry begins, which is not compressed; returns the bytes planned."""
        size = self.cluster_size
        entry = wanted = entries[first]
        index, end = first + 1, first + (skip + length - 1 >> self.cluster_bits) + 1
        host = self.standard(entry, cluster)
        if host:
            # Entries of one run differ by a cluster each, and in COPIED, which does not matter to a reader.
            wanted &= ~COPIED
            while index < end and entries[index] & ~COPIED == wanted + size:
                wanted += size
                index += 1
        else:
            index = equal_until(entries, first, end)
        take = min((index - first) * size - skip, length)
        if entry & ZERO_FLAG:
            join_zero(plans, take, bool(host))
        elif not host:
            join_backing(plans, take)
        elif wanted < file_end:
            join_data(plans, host + skip, take)
        else:
            raise self._past_end(cluster + index - 1 - first, wanted, file_end)
        return take

    def in_place(self, entries: array[int], first: int, skip: int, length: int, file_end: int) -> tuple[int, int]:
        """Where bytes can be overwritten as they are, and how many in one write: of `length` bytes from `skip` bytes
        into the cluster of `entries[first]` on, which end inside `entries`. (0, 0) if it cannot be done at their start.
        """
        odd = self.odd_bits
        entry = entries[first]
        host = entry & ~COPIED
        if not entry & COPIED or host & odd or not host or host >= file_end:
            return 0, 0
        size = stop = self.cluster_size
        end = skip + length
        while stop < end:
            first += 1
            entry += size
            if entries[first] != entry or host + stop >= file_end:
                return host + skip, stop - skip
            stop += size
        return host + skip, length

    def host_clusters(self, entries: array[int], index: int, cluster: int, file_end: int) -> HostClusters | None:
        """The host clusters that an L2 entry refers to, None if it has none. `cluster` is as for `plan`."""
        bits = self.cluster_bits
        if entries[index] & COMPRESSED:
            host, length = self._packed(entries, index, cluster, file_end)
            return HostClusters(host >> bits, (host + length - 1 >> bits) - (host >> bits) + 1)
        host, has_content = self._host(entries, index, cluster)
        if host >= file_end and has_content:
            raise self._past_end(cluster, host, file_end)
        return HostClusters(host >> bits, 1) if host else None

    def _packed(self, entries: array[int], index: int, cluster: int, file_end: int) -> tuple[int, int]:
        """As `compressed`, of an entry among others."""
        return self.compressed(entries[index], cluster, file_end)

    def _host(self, entries: array[int], index: int, cluster: int) -> tuple[int, bool]:
        """Host offset in the entry of a cluster that is not compressed, 0 for none; whether anything is read there."""
        return self.standard(entries[index], cluster), not entries[index] & ZERO_FLAG

    def _past_end(self, cluster: int, host: int, file_end: int) -> CorruptImage:
        return CorruptImage(self.path, f"cluster {cluster} at {host} is past the file's end at {file_end}")


def equal_until(entries: array[int], first: int, end: int) -> int:
    """Where the entries equal to `entries[first]` stop, at most `end`. Large disks have tables full of them."""
    entry = entries[first]
    known = first + 1
    if known == end or entries[known] != entry:
        return known
    same = array("Q", (entry,)) * (end - first)
    beyond = end + 1
    at = end
    while known + 1 < beyond:  # up to `known` they are equal, up to `beyond` they are not
        if entries[first:at] == same[: at - first]:
            known = at
        else:
            beyond = at
        at = (known + beyond) // 2
    return known


def join_data(plans: list[Plan], host: int, length: int) -> None:
    """Appends `length` bytes stored at `host`, joined to the last plan if they go on where that ends."""
    last = plans[-1] if plans else None
    if isinstance(last, Data) and last.host_offset + last.length == host:
        plans[-1] = Data(last.host_offset, last.length + length)
    else:
        plans.append(Data(host, length))


def join_zero(plans: list[Plan], length: int, allocated: bool) -> None:
    """Appends `length` bytes of zeroes, joined to the last plan if that is of the same kind."""
    last = plans[-1] if plans else None
    if isinstance(last, Zero) and last.allocated == allocated:
        plans[-1] = Zero(last.length + length, allocated)
    else:
        plans.append(Zero(length, allocated))


def join_backing(plans: list[Plan], length: int) -> None:
    """Appends `length` bytes that are not allocated, joined to the last plan if that is of the same kind."""
    last = plans[-1] if plans else None
    if isinstance(last, Backing):
        plans[-1] = Backing(last.length + length)
    else:
        plans.append(Backing(length))
