"""The table of internal snapshots, as far as it refers to clusters (qcow2.rst, "Snapshots")."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import L1_ENTRIES_MAX, Header
from fleecer.formats.qcow2.steps import Read, Steps
from fleecer.ranges import align_up
from fleecer.units import MiB

_ENTRY = struct.Struct(">QIHHIIQII")
EXTRA_BYTES_MAX: Final = 1024
TABLE_BYTES_MAX: Final = 64 * MiB


class Snapshot(NamedTuple):
    """An internal snapshot: its own L1 table, and what it is called."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str


class SnapshotTable(NamedTuple):
    """All snapshots, and the bytes that their table takes in the file."""

    snapshots: list[Snapshot]
    length: int


def read_snapshots(header: Header, file_size: int, path: str) -> Steps[SnapshotTable]:
    """The image's internal snapshots. Raises CorruptImage where an entry breaks the format or a limit."""
    snapshots: list[Snapshot] = []
    position = header.snapshots_offset
    for number in range(header.nb_snapshots):
        fixed = yield Read(position, _ENTRY.size)
        l1_offset, l1_size, id_size, name_size, _, _, _, _, extra_size = _ENTRY.unpack(fixed)
        if extra_size > EXTRA_BYTES_MAX:
            raise CorruptImage(path, f"snapshot {number}: extra data size {extra_size} exceeds limit {EXTRA_BYTES_MAX}")
        if l1_size > L1_ENTRIES_MAX:
            raise CorruptImage(path, f"snapshot {number}: l1_size {l1_size} exceeds limit {L1_ENTRIES_MAX}")
        if l1_offset % header.cluster_size or l1_offset + l1_size * 8 > file_size:
            raise CorruptImage(path, f"snapshot {number}: L1 table at {l1_offset} is misaligned or past the file's end")
        texts = b""
        if id_size + name_size:
            texts = yield Read(position + _ENTRY.size + extra_size, id_size + name_size)
        identity, name = (text.decode("utf-8", "replace") for text in (texts[:id_size], texts[id_size:]))
        snapshots.append(Snapshot(l1_offset, l1_size, identity, name))
        position = align_up(position + _ENTRY.size + extra_size + id_size + name_size, 8)
        if position - header.snapshots_offset > TABLE_BYTES_MAX:
            raise CorruptImage(path, f"the snapshot table exceeds limit {TABLE_BYTES_MAX} bytes")
    return SnapshotTable(snapshots, position - header.snapshots_offset)
