"""The bitmap directory, as far as it refers to clusters (qcow2.rst, "Bitmaps extension", "Bitmap directory")."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import EXTENSION_BITMAPS, Header
from fleecer.formats.qcow2.steps import Read, Steps
from fleecer.ranges import align_up
from fleecer.units import MiB

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
BITMAPS_MAX: Final = 65535
DIRECTORY_BYTES_MAX: Final = 64 * MiB
TABLE_ENTRIES_MAX: Final = 0x8000000


class Bitmap(NamedTuple):
    """A directory entry: where the bitmap's table stands, and what the bitmap is."""

    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    name: str


class BitmapDirectory(NamedTuple):
    """All bitmaps, and where the directory stands; its length is 0 where there is none."""

    bitmaps: list[Bitmap]
    offset: int
    length: int


def read_bitmaps(header: Header, file_size: int, path: str) -> Steps[BitmapDirectory]:
    """The bitmaps that the extension names, believed or not. Raises CorruptImage where it breaks a rule or a limit."""
    extension = header.extension(EXTENSION_BITMAPS)
    if extension is None:
        return BitmapDirectory([], 0, 0)
    if len(extension) != _EXTENSION.size:
        raise CorruptImage(path, f"bitmaps extension has {len(extension)} bytes, not {_EXTENSION.size}")
    count, _, length, offset = _EXTENSION.unpack(extension)
    if count > BITMAPS_MAX:
        raise CorruptImage(path, f"nb_bitmaps {count} exceeds limit {BITMAPS_MAX}")
    if length > DIRECTORY_BYTES_MAX:
        raise CorruptImage(path, f"bitmap_directory_size {length} exceeds limit {DIRECTORY_BYTES_MAX}")
    if offset % header.cluster_size or offset + length > file_size:
        raise CorruptImage(path, f"bitmap_directory_offset {offset} is misaligned or past the file's end")
    bitmaps: list[Bitmap] = []
    position, end = offset, offset + length
    for number in range(count):
        if position + _ENTRY.size > end:
            raise CorruptImage(path, f"bitmap {number} passes the end of the bitmap directory")
        fixed = yield Read(position, _ENTRY.size)
        table, entries, flags, _, granularity_bits, name_size, extra_size = _ENTRY.unpack(fixed)
        name_at = position + _ENTRY.size + extra_size
        position = align_up(name_at + name_size, 8)
        if position > end:
            raise CorruptImage(path, f"bitmap {number} passes the end of the bitmap directory")
        if entries > TABLE_ENTRIES_MAX or table % header.cluster_size or table + entries * 8 > file_size:
            raise CorruptImage(path, f"bitmap {number}: table of {entries} entries at {table} is not in the file")
        name = (yield Read(name_at, name_size)) if name_size else b""
        bitmaps.append(Bitmap(table, entries, flags, granularity_bits, name.decode("utf-8", "replace")))
    return BitmapDirectory(bitmaps, offset, length)
