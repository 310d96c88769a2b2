"""The qcow2 header: parsed, checked against limits, and packed (qcow2.rst, "Header", "Header extensions").

Invariants: what `parse_header` returns is within every limit named here, so that whoever takes memory by it takes a
bounded amount; each offset is aligned and its table starts inside the file. Bytes we do not know (fields, extensions,
feature bits) are kept as they are.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Final, NamedTuple

from fleecer.errors import CorruptImage, UnsupportedFormat, quoted
from fleecer.ranges import align_up
from fleecer.units import KiB, MiB

MAGIC: Final = 0x514649FB
SECTOR_BYTES: Final = 512
CLUSTER_BITS_MIN: Final = 9
CLUSTER_BITS_MAX: Final = 21
EXTENDED_CLUSTER_BITS_MIN: Final = 14
"""With extended L2 entries: a subcluster has a sector at least."""
L1_BYTES_MAX: Final = 32 * MiB
L1_ENTRIES_MAX: Final = L1_BYTES_MAX // 8
REFCOUNT_TABLE_BYTES_MAX: Final = 8 * MiB
SNAPSHOTS_MAX: Final = 65536
BACKING_NAME_BYTES_MAX: Final = 1023
REFCOUNT_ORDER_MAX: Final = 6

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
EXTERNAL_DATA: Final = 1 << 2
COMPRESSION_TYPE: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
INCOMPATIBLE_SUPPORTED: Final = DIRTY | CORRUPT | COMPRESSION_TYPE | EXTENDED_L2
LAZY_REFCOUNTS: Final = 1 << 0
"""Compatible feature: a writer may set DIRTY and postpone refcounts."""

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_DISK_SIZE: Final = 0x666C737A
"""Fleecer's own, for others to ignore: the disk's size in bytes (8, big-endian), where that is no multiple of 512."""
_ONCE = (EXTENSION_BACKING_FORMAT, EXTENSION_FEATURE_NAMES, EXTENSION_BITMAPS)

COMPRESSION_DEFLATE: Final = 0
COMPRESSION_ZSTD: Final = 1

_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
V2_HEADER_BYTES: Final = 72
V3_HEADER_BYTES: Final = 104
_HEADER_LENGTH_NOW: Final = 112

REFCOUNT_TABLE_FIELD: Final = 48
"""Where refcount_table_offset (8 bytes) and refcount_table_clusters (4 bytes) stand."""
INCOMPATIBLE_FIELD: Final = 72
AUTOCLEAR_FIELD: Final = 88


class Extension(NamedTuple):
    """A header extension: its type and its data without padding."""

    kind: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A qcow2 header. Fields have the names of the format document; version 2 reads as version 3 with its defaults.

    `backing_file` is the name as stored, UTF-8 with surrogate escapes; it is the image's claim, never to be opened
    unchecked. `extra` is what the header holds beyond the fields known here.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    compression_type: int = COMPRESSION_DEFLATE
    backing_file: str | None = None
    extensions: tuple[Extension, ...] = ()
    extra: bytes = b""

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def subcluster_size(self) -> int:
        """Bytes that are allocated, or read as zeroes, on their own: a cluster, but for extended L2 entries."""
        return self.cluster_size >> (5 if self.extended_l2 else 0)

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table, which is one cluster."""
        return 1 << (l1_reach_bits(self.cluster_bits, extended_l2=self.extended_l2) - self.cluster_bits)

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are extended: with a bitmap of subclusters."""
        return bool(self.incompatible_features & EXTENDED_L2)

    @property
    def refcounts_per_block(self) -> int:
        """Clusters that one refcount block counts."""
        return 1 << (self.cluster_bits + 3 - self.refcount_order)

    @property
    def disk_size(self) -> int:
        """Bytes of the disk: `size`, which QEMU takes for a multiple of 512, less what was added to make it one.

        A record that `size` contradicts, because somebody resized the image since, does not count.
        """
        record = self.extension(EXTENSION_DISK_SIZE)
        if record is not None and len(record) == 8:
            recorded = int.from_bytes(record, "big")
            if 0 <= self.size - recorded < SECTOR_BYTES:
                return recorded
        return self.size

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be wrong (lazy refcounts, not closed)."""
        return bool(self.incompatible_features & DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether the image was found to be damaged and must not be written to."""
        return bool(self.incompatible_features & CORRUPT)

    @property
    def backing_format(self) -> str | None:
        """Name of the backing file's format as recorded, None where none is."""
        data = self.extension(EXTENSION_BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def extension(self, kind: int) -> bytes | None:
        """Data of the first extension of that type, or None."""
        return next((extension.data for extension in self.extensions if extension.kind == kind), None)

    def pack(self) -> bytes:
        """The header, its extensions and the backing file's name, as they stand at the start of the file.

        The caller sees to it that it fits in the first cluster.
        """
        fixed = b""
        if self.version >= 3:
            length = max(align_up(V3_HEADER_BYTES + 1 + len(self.extra), 8), _HEADER_LENGTH_NOW)
            fixed = _V3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                length,
            )
            fixed += (bytes([self.compression_type]) + self.extra).ljust(length - V3_HEADER_BYTES, b"\0")
        for kind, data in (*self.extensions, Extension(EXTENSION_END, b"")):
            fixed += _EXTENSION.pack(kind, len(data)) + data.ljust(align_up(len(data), 8), b"\0")
        name = b"" if self.backing_file is None else self.backing_file.encode("utf-8", "surrogateescape")
        start = _V2.pack(
            MAGIC,
            self.version,
            V2_HEADER_BYTES + len(fixed) if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            0,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        return start + fixed + name


class _Fixed(NamedTuple):
    """The 72 bytes that both versions share."""

    magic: int
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int


def _fixed(data: bytes, path: str) -> _Fixed:
    if len(data) < V2_HEADER_BYTES:
        raise CorruptImage(path, f"{len(data)} bytes are too few for a qcow2 header of {V2_HEADER_BYTES}")
    fixed = _Fixed._make(_V2.unpack_from(data))
    if fixed.magic != MAGIC:
        raise CorruptImage(path, f"magic number {fixed.magic:#010x} is not that of qcow2, {MAGIC:#010x}")
    if fixed.version not in (2, 3):
        raise UnsupportedFormat(path, f"qcow2 version {fixed.version} is neither 2 nor 3")
    bits = fixed.cluster_bits
    if not CLUSTER_BITS_MIN <= bits <= CLUSTER_BITS_MAX:
        raise UnsupportedFormat(path, f"cluster_bits {bits} is outside {CLUSTER_BITS_MIN} to {CLUSTER_BITS_MAX}")
    return fixed


def header_area_bytes(start: bytes, path: str) -> int:
    """How many bytes from the file's start `parse_header` wants, given at least the first 72: one cluster."""
    return 1 << _fixed(start, path).cluster_bits


def parse_header(data: bytes, file_size: int, path: str) -> Header:
    """The header in `data`, the file's first cluster (or all of it where the file is shorter).

    `path` names the image in messages. Raises UnsupportedFormat for what is sound but beyond us, CorruptImage for what
    contradicts the format or its limits.
    """
    fixed = _fixed(data, path)
    if fixed.crypt_method:
        raise UnsupportedFormat(
            path, f"it is encrypted (crypt_method {fixed.crypt_method}); encryption is not supported"
        )
    incompatible = compatible = autoclear = compression = 0
    refcount_order, header_length, extra = 4, V2_HEADER_BYTES, b""
    if fixed.version >= 3:
        if len(data) < V3_HEADER_BYTES:
            raise CorruptImage(path, f"{len(data)} bytes are too few for a version 3 header of {V3_HEADER_BYTES}")
        incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(data, V2_HEADER_BYTES)
        limit = min(1 << fixed.cluster_bits, len(data))
        if header_length % 8 or not V3_HEADER_BYTES <= header_length <= limit:
            problem = f"header_length {header_length} is not a multiple of 8 from {V3_HEADER_BYTES} to {limit}"
            raise CorruptImage(path, problem)
        if header_length > V3_HEADER_BYTES:
            compression, extra = data[V3_HEADER_BYTES], data[V3_HEADER_BYTES + 1 : header_length]
    if refcount_order > REFCOUNT_ORDER_MAX:
        raise CorruptImage(path, f"refcount_order {refcount_order} exceeds limit {REFCOUNT_ORDER_MAX}")
    extensions = _extensions(data, header_length, fixed, path)
    header = Header(
        version=fixed.version,
        cluster_bits=fixed.cluster_bits,
        size=fixed.size,
        l1_size=fixed.l1_size,
        l1_table_offset=fixed.l1_table_offset,
        refcount_table_offset=fixed.refcount_table_offset,
        refcount_table_clusters=fixed.refcount_table_clusters,
        nb_snapshots=fixed.nb_snapshots,
        snapshots_offset=fixed.snapshots_offset,
        incompatible_features=incompatible,
        compatible_features=compatible,
        autoclear_features=autoclear,
        refcount_order=refcount_order,
        compression_type=compression,
        backing_file=_backing_file(data, fixed, header_length, path),
        extensions=extensions,
        extra=extra.rstrip(b"\0"),
    )
    _check_features(header, path)
    _check_tables(header, file_size, path)
    return header


def _backing_file(data: bytes, fixed: _Fixed, header_length: int, path: str) -> str | None:
    offset, size = fixed.backing_file_offset, fixed.backing_file_size
    if not offset:
        return None
    if size > BACKING_NAME_BYTES_MAX:
        raise CorruptImage(path, f"backing_file_size {size} exceeds limit {BACKING_NAME_BYTES_MAX}")
    area = min(1 << fixed.cluster_bits, len(data))
    if offset < header_length or offset + size > area:
        problem = f"backing_file_offset {offset} with {size} bytes is not between the header and byte {area}"
        raise CorruptImage(path, problem)
    return data[offset : offset + size].decode("utf-8", "surrogateescape") or None


def _extensions(data: bytes, start: int, fixed: _Fixed, path: str) -> tuple[Extension, ...]:
    area = min(1 << fixed.cluster_bits, len(data))
    if fixed.backing_file_offset:
        area = min(area, fixed.backing_file_offset)
    found: list[Extension] = []
    while start + _EXTENSION.size <= area:
        kind, length = _EXTENSION.unpack_from(data, start)
        if kind == EXTENSION_END:
            break
        start += _EXTENSION.size
        if length > area - start:
            raise CorruptImage(path, f"header extension {kind:#010x} of {length} bytes exceeds limit {area - start}")
        if kind in _ONCE and any(extension.kind == kind for extension in found):
            raise CorruptImage(path, f"header extension {kind:#010x} appears twice")
        found.append(Extension(kind, data[start : start + length]))
        start += align_up(length, 8)
    return tuple(found)


def _feature_name(header: Header, bit: int) -> str:
    table = header.extension(EXTENSION_FEATURE_NAMES) or b""
    for at in range(0, len(table) - 47, 48):
        if table[at] == 0 and table[at + 1] == bit:
            name = table[at + 2 : at + 48].rstrip(b"\0").decode("utf-8", "replace")
            return f"{quoted(name)} (bit {bit})"
    return f"bit {bit}"


def _check_features(header: Header, path: str) -> None:
    features = header.incompatible_features
    if features & EXTERNAL_DATA:
        raise UnsupportedFormat(path, "it keeps its data in an external data file, which is not supported")
    if features & EXTENDED_L2 and header.cluster_bits < EXTENDED_CLUSTER_BITS_MIN:
        limit = f"limit {EXTENDED_CLUSTER_BITS_MIN} with extended L2 entries"
        raise CorruptImage(path, f"cluster_bits {header.cluster_bits} is below {limit}")
    unknown = features & ~INCOMPATIBLE_SUPPORTED
    if unknown:
        names = ", ".join(_feature_name(header, bit) for bit in range(64) if unknown >> bit & 1)
        raise UnsupportedFormat(path, f"it uses unknown incompatible features: {names}")
    kind = header.compression_type
    if bool(features & COMPRESSION_TYPE) != bool(kind):
        raise CorruptImage(path, f"compression_type {kind} contradicts incompatible_features {features:#x}")
    if kind not in (COMPRESSION_DEFLATE, COMPRESSION_ZSTD):
        raise UnsupportedFormat(path, f"compression_type {kind} is neither 0 (deflate) nor 1 (zstd)")


def l1_reach_bits(cluster_bits: int, *, extended_l2: bool) -> int:
    """An L1 entry, which is an L2 table of one cluster, maps 1 << so many bytes of the disk."""
    return 2 * cluster_bits - (4 if extended_l2 else 3)


def l1_entries_needed(size: int, cluster_bits: int, *, extended_l2: bool) -> int:
    """L1 entries that map `size` bytes."""
    return -(-size >> l1_reach_bits(cluster_bits, extended_l2=extended_l2))


def _check_tables(header: Header, file_size: int, path: str) -> None:
    if header.l1_size > L1_ENTRIES_MAX:
        raise CorruptImage(path, f"l1_size {header.l1_size} exceeds limit {L1_ENTRIES_MAX}")
    needed = l1_entries_needed(header.size, header.cluster_bits, extended_l2=header.extended_l2)
    if needed > header.l1_size:
        problem = f"l1_size {header.l1_size} is too small for size {header.size}, which needs {needed} entries"
        raise CorruptImage(path, problem)
    clusters_max = max(REFCOUNT_TABLE_BYTES_MAX >> header.cluster_bits, 1)
    clusters = header.refcount_table_clusters
    if not 1 <= clusters <= clusters_max:
        raise CorruptImage(path, f"refcount_table_clusters {clusters} is outside 1 to {clusters_max}")
    if header.nb_snapshots > SNAPSHOTS_MAX:
        raise CorruptImage(path, f"nb_snapshots {header.nb_snapshots} exceeds limit {SNAPSHOTS_MAX}")
    tables = [("refcount_table_offset", header.refcount_table_offset, 1)]
    if header.l1_size:
        tables.append(("l1_table_offset", header.l1_table_offset, header.l1_size * 8))
    if header.nb_snapshots:
        tables.append(("snapshots_offset", header.snapshots_offset, 40))
    for field, offset, length in tables:
        if offset % header.cluster_size or offset < header.cluster_size:
            problem = f"{field} {offset} is not a multiple of the cluster size {header.cluster_size} above 0"
            raise CorruptImage(path, problem)
        if offset + length > file_size:
            raise CorruptImage(path, f"{field} {offset} with {length} bytes passes the file's end at {file_size}")
    l1_end = header.l1_table_offset + header.l1_size * 8
    table_end = header.refcount_table_offset + clusters * header.cluster_size
    if header.refcount_table_offset < l1_end and header.l1_table_offset < table_end and header.l1_size:
        raise CorruptImage(path, f"l1_table_offset {header.l1_table_offset} lies in or across the refcount table")


HEADER_START_BYTES: Final = 4 * KiB
"""A first read of this many bytes finds the whole header of nearly every image."""
