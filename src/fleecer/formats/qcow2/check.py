"""References against refcounts: what `qemu-img check` judges, and refcounts built anew from references.

Both walks are generators: they yield `Read` (and, in `rebuild`, `Write`) steps and do no I/O themselves. Each L2 table
is read once however many L1 tables name it, weighted by their number. Invariants: memory grows with the clusters that
are referred to; a damaged table is reported, never followed outside the file.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import NamedTuple

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.bitmaps import read_bitmaps
from fleecer.formats.qcow2.header import Header
from fleecer.formats.qcow2.refcounts import RefcountWidth, References, lay_out_refcounts
from fleecer.formats.qcow2.snapshots import read_snapshots
from fleecer.formats.qcow2.steps import Read, Steps, Write
from fleecer.formats.qcow2.subclusters import mapping_of
from fleecer.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK, decode_table, encode_table
from fleecer.units import MiB

MESSAGES_MAX = 100


@dataclasses.dataclass(slots=True)
class CheckReport:
    """What a check found.

    A corruption endangers data: a refcount too low, an entry that points nowhere, a wrong COPIED bit. A leak wastes
    space: a refcount too high. `messages` tells the first of them; `end` is where the last cluster in use ends.
    """

    corruptions: int = 0
    leaks: int = 0
    end: int = 0
    messages: list[str] = dataclasses.field(default_factory=list)

    def corrupt(self, message: str) -> None:
        """Counts a corruption."""
        self.corruptions += 1
        self._tell(message)

    def leak(self, message: str) -> None:
        """Counts a leaked cluster."""
        self.leaks += 1
        self._tell(message)

    def _tell(self, message: str) -> None:
        if len(self.messages) < MESSAGES_MAX:
            self.messages.append(message)


class _Walk:
    """One walk over all that an image refers to."""

    def __init__(self, header: Header, file_size: int, path: str) -> None:
        self.header = header
        self.file_size = file_size
        self.file_clusters = -(-file_size >> header.cluster_bits)
        self.path = path
        self.mapping = mapping_of(header, path)
        self.report = CheckReport()
        self.references = References()
        # L2 tables: how many L1 entries name each.
        self.tables: dict[int, int] = {}

    def refer(self, first: int, count: int, weight: int, what: str) -> None:
        """Counts references to clusters, those in the file."""
        if first + count > self.file_clusters:
            self.report.corrupt(f"{what} refers to cluster {first + count - 1}, past the file's end")
            count = max(0, self.file_clusters - first)
        self.references.add(first, count, weight)

    def refer_bytes(self, offset: int, length: int, what: str) -> None:
        """Counts one reference to each cluster of a range."""
        bits = self.header.cluster_bits
        if length:
            self.refer(offset >> bits, ((offset + length - 1) >> bits) - (offset >> bits) + 1, 1, what)

    def each_entry(self, offset: int, count: int, see: Callable[[int, int], None]) -> Steps[None]:
        """Calls `see(index, entry)` for each entry of a table that is not 0."""
        step = MiB // 8
        for start in range(0, count, step):
            data = yield Read(offset + start * 8, min(step, count - start) * 8)
            for at, entry in enumerate(decode_table(data), start):
                if entry:
                    see(at, entry)

    def count(self) -> Steps[None]:
        """Counts every reference but those that the refcount structure makes."""
        header, path = self.header, self.path
        self.refer(0, 1, 1, "the header")
        yield from self._count_l1(header.l1_table_offset, header.l1_size, "the L1 table")
        try:
            table = yield from read_snapshots(header, self.file_size, path)
        except CorruptImage as error:
            self.report.corrupt(error.problem)
        else:
            self.refer_bytes(header.snapshots_offset, table.length, "the snapshot table")
            for number, snapshot in enumerate(table.snapshots):
                yield from self._count_l1(snapshot.l1_table_offset, snapshot.l1_size, f"L1 table of snapshot {number}")
        try:
            directory = yield from read_bitmaps(header, self.file_size, path)
        except CorruptImage as error:
            self.report.corrupt(error.problem)
        else:
            self.refer_bytes(directory.offset, directory.length, "the bitmap directory")
            for number, bitmap in enumerate(directory.bitmaps):
                yield from self._count_bitmap(bitmap.table_offset, bitmap.table_entries, f"bitmap {number}")
        for offset in sorted(self.tables):
            yield from self._count_l2(offset, self.tables[offset])

    def _count_l1(self, offset: int, size: int, what: str) -> Steps[None]:
        def see(index: int, entry: int) -> None:
            try:
                table = self.mapping.table_offset(entry, index, self.file_size)
            except CorruptImage as error:
                self.report.corrupt(f"{what}: {error.problem}")
            else:
                self.tables[table] = self.tables.get(table, 0) + 1

        self.refer_bytes(offset, size * 8, what)
        yield from self.each_entry(offset, size, see)

    def _count_bitmap(self, offset: int, size: int, what: str) -> Steps[None]:
        def see(index: int, entry: int) -> None:
            host = entry & OFFSET_MASK
            if entry & ~(OFFSET_MASK & -self.header.cluster_size | (not host)):
                self.report.corrupt(f"{what}: table entry {index} is {entry:#018x}: misaligned or reserved bits set")
            elif host:
                self.refer(host >> self.header.cluster_bits, 1, 1, what)

        self.refer_bytes(offset, size * 8, what)
        yield from self.each_entry(offset, size, see)

    def _count_l2(self, offset: int, weight: int) -> Steps[None]:
        what = f"L2 table at {offset}"
        self.refer(offset >> self.header.cluster_bits, 1, weight, what)
        data = yield Read(offset, self.header.cluster_size)
        entries = self.mapping.decode(data)
        for at in self.mapping.used(entries):
            try:
                found = self.mapping.host_clusters(entries, at, at, self.file_size)
            except CorruptImage as error:
                self.report.corrupt(f"{what}: {error.problem}")
            else:
                if found is not None:
                    self.refer(found.first, found.clusters, weight, what)

    def refcount_blocks(self) -> Steps[dict[int, int]]:
        """Host offsets of the refcount blocks by their number; counts the references made by table and blocks."""
        header = self.header
        length = header.refcount_table_clusters << header.cluster_bits
        self.refer_bytes(header.refcount_table_offset, length, "the refcount table")
        blocks: dict[int, int] = {}
        seen: set[int] = set()

        def see(number: int, offset: int) -> None:
            if offset % header.cluster_size or offset >= self.file_size:
                self.report.corrupt(f"refcount table entry {number} is {offset}: misaligned or past the file's end")
            elif offset in seen:
                self.report.corrupt(f"refcount table entry {number} is {offset}, the block of another entry")
            else:
                self.refer(offset >> header.cluster_bits, 1, 1, f"refcount table entry {number}")
                seen.add(offset)
                blocks[number] = offset

        yield from self.each_entry(header.refcount_table_offset, length >> 3, see)
        return blocks

    def compare(self, blocks: dict[int, int]) -> Steps[None]:
        """Compares references with refcounts; from then on `references` holds the refcount of each cluster in use."""
        per_block = self.header.refcounts_per_block
        width = RefcountWidth(self.header.refcount_order)
        for number in self.references.blocks(per_block):
            if number not in blocks:
                self._compare_block(number * per_block, [0] * per_block)
        for number in sorted(blocks):
            counts = width.decode((yield Read(blocks[number], self.header.cluster_size)))
            self._compare_block(number * per_block, list(counts))

    def _compare_block(self, first: int, counts: list[int]) -> None:
        expected = self.references.counts(first, len(counts))
        if counts != expected:
            for at, (count, references) in enumerate(zip(counts, expected, strict=True)):
                if count != references:
                    self._judge(first + at, references, count)

    def _judge(self, cluster: int, references: int, count: int) -> None:
        if count > references:
            self.report.leak(f"cluster {cluster} is leaked: refcount {count}, {references} references")
        else:
            self.report.corrupt(f"cluster {cluster} has refcount {count} but {references} references")
        if references:
            self.references[cluster] = count

    def copied_bits(self, *, fix: bool) -> Steps[None]:
        """Reports entries of active tables with a wrong COPIED bit; with `fix`, also writes them right."""
        header = self.header
        offsets: set[int] = set()
        for start in range(0, header.l1_size, header.l2_entries):
            offset, count = header.l1_table_offset + start * 8, min(header.l2_entries, header.l1_size - start)
            entries = decode_table((yield Read(offset, count * 8)))
            offsets.update(entry & OFFSET_MASK for entry in entries)
            if self._set_right(entries, f"L1 entries from {start} on", l1=True) and fix:
                yield Write(offset, encode_table(entries))
        for offset in sorted(offsets & self.tables.keys()):
            entries = self.mapping.decode((yield Read(offset, header.cluster_size)))
            if self._set_right(entries, f"L2 table at {offset}", l1=False) and fix:
                yield Write(offset, self.mapping.encode(entries))

    def _set_right(self, entries: array[int], what: str, l1: bool) -> bool:
        bits, references = self.header.cluster_bits, self.references
        changed = False
        count = len(entries) if l1 else len(entries) // self.mapping.arrays
        for at, entry in enumerate(entries[:count]):
            if not entry:
                continue
            host = 0 if entry & COMPRESSED and not l1 else entry & OFFSET_MASK
            alone = bool(host) and references[host >> bits] == 1
            if alone != bool(entry & COPIED):
                self.report.corrupt(f"{what}: entry {at} is {entry:#018x}: its COPIED bit contradicts the refcount")
                entries[at] ^= COPIED
                changed = True
        return changed


def check(header: Header, file_size: int, path: str) -> Steps[CheckReport]:
    """Checks an image whose header has been parsed. It must not change meanwhile; only `Read` steps are asked for."""
    walk = _Walk(header, file_size, path)
    yield from walk.count()
    blocks = yield from walk.refcount_blocks()
    walk.report.end = walk.references.end << header.cluster_bits
    yield from walk.compare(blocks)
    yield from walk.copied_bits(fix=False)
    return walk.report


class Rebuilt(NamedTuple):
    """Where the new refcount table stands. The header must name it only when every write is durable."""

    table_offset: int
    table_clusters: int


def rebuild(header: Header, file_size: int, path: str) -> Steps[Rebuilt]:
    """Builds refcounts and COPIED bits anew from what the tables refer to, for an image with the dirty bit set.

    The new structure stands behind the last cluster in use, so nothing that is referred to is overwritten, and a
    rebuild cut short can be done again. Raises CorruptImage, before any write, if a table is damaged.
    """
    walk = _Walk(header, file_size, path)
    yield from walk.count()
    if walk.report.corruptions:
        raise CorruptImage(path, f"refcounts cannot be rebuilt: {walk.report.messages[0]}")
    yield from walk.copied_bits(fix=True)
    layout = lay_out_refcounts(walk.references, header.refcount_order, header.cluster_bits, walk.references.end, path)
    for offset, data in layout.pieces:
        yield Write(offset, data)
    return Rebuilt(layout.table_offset, layout.table_clusters)
