"""Whether the file of an image was cut short: the tables are there, what they refer to is not.

A sound image costs two reads, of the refcount table and of one refcount block: if the last cluster that is counted lies
in the file, so does every cluster that is referred to. Only otherwise are the tables of the disk searched; a count past
the end alone is a leak, as a crash may leave it.

What is legal: the file ends inside its last cluster, and what is missing of it reads as zeroes; a cluster with the zero
flag lies past the end. Entries that break other rules are no concern here: requests that meet them are told.
"""

from __future__ import annotations

from array import array
from typing import Final

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import Header, l1_entries_needed
from fleecer.formats.qcow2.refcounts import RefcountWidth
from fleecer.formats.qcow2.steps import Read, Steps
from fleecer.formats.qcow2.subclusters import mapping_of
from fleecer.formats.qcow2.tables import COPIED, OFFSET_MASK, Mapping, decode_table
from fleecer.units import GiB, KiB

_EMPTY_BLOCKS_MAX: Final = 8
"""Refcount blocks without a count that are passed over before the tables are searched instead."""
_L1_ENTRIES_AT_ONCE: Final = 8 * KiB
_SEARCHED_BYTES_MAX: Final = 1 * GiB
"""L2 tables that are searched: for a disk of 8 TiB with clusters of 64 KiB. A hostile header may name far more."""


def check_not_cut(header: Header, file_size: int, path: str) -> Steps[None]:
    """Raises CorruptImage if the disk's clusters or L2 tables lie past the end of the file, at `file_size` bytes.

    Internal snapshots are not searched: they are no part of the disk. Refcounts of a dirty image prove nothing, so its
    tables are searched in any case. What the search does not come to is told by the requests that meet it.
    """
    if not header.dirty and (yield from _all_counted_is_there(header, file_size)):
        return
    mapping = mapping_of(header, path)
    bits, size = header.cluster_bits, header.cluster_size
    seen: set[int] = set()
    needed = l1_entries_needed(header.size, bits, extended_l2=header.extended_l2)
    for start in range(0, needed, _L1_ENTRIES_AT_ONCE):
        count = min(_L1_ENTRIES_AT_ONCE, needed - start)
        l1 = decode_table((yield Read(header.l1_table_offset + start * 8, count * 8)))
        for index, entry in enumerate(l1, start):
            table = entry & ~COPIED
            if not table or table & mapping.odd_bits or table in seen:
                continue
            if len(seen) * size >= _SEARCHED_BYTES_MAX:
                return
            seen.add(table)
            first = index << (bits - mapping.entry_bits)
            if table + size > file_size:
                raise _cut(path, f"the L2 table of cluster {first} of the disk ends at byte {table + size}", file_size)
            _check_entries(mapping, mapping.decode((yield Read(table, size))), first, file_size)


def _all_counted_is_there(header: Header, file_size: int) -> Steps[bool]:
    """Whether the last cluster in use, as the refcounts have it, begins in the file. False if they do not tell."""
    bits, size = header.cluster_bits, header.cluster_size
    length = header.refcount_table_clusters << bits
    if header.refcount_table_offset + length > file_size:
        return False
    width = RefcountWidth(header.refcount_order)
    table = yield Read(header.refcount_table_offset, length)
    for _ in range(_EMPTY_BLOCKS_MAX):
        number = (len(table.rstrip(b"\0")) - 1) // 8
        if number < 0:
            return False
        block = int.from_bytes(table[number * 8 : number * 8 + 8], "big")
        if not block or block % size or block + size > file_size:
            return False
        last = width.find_last_used((yield Read(block, size)))
        if last >= 0:
            return (number * header.refcounts_per_block + last) << bits < file_size
        table = table[: number * 8]
    return False


def _check_entries(mapping: Mapping, entries: array[int], first: int, file_size: int) -> None:
    """Raises CorruptImage for the first entry of an L2 table that names what is not in the file."""
    if max(map(OFFSET_MASK.__and__, entries[: len(entries) // mapping.arrays])) < file_size:
        return  # nearly always, and much faster
    for index in mapping.used(entries):
        try:
            host = mapping.content_offset(entries, index, first + index)
        except CorruptImage:
            continue
        if host >= file_size:
            raise _cut(mapping.path, f"cluster {first + index} of the disk is at byte {host}", file_size)


def _cut(path: str, what: str, file_size: int) -> CorruptImage:
    end = f"past the end of the file at {file_size}"
    return CorruptImage(path, f"{what}, {end}: the image was cut short; restore it from a backup")
