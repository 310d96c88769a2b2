"""A new, empty qcow2 image, as pieces to be written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fleecer.errors import UsageError, quoted
from fleecer.formats.qcow2.header import (
    BACKING_NAME_BYTES_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    COMPRESSION_DEFLATE,
    COMPRESSION_TYPE,
    COMPRESSION_ZSTD,
    EXTENDED_CLUSTER_BITS_MIN,
    EXTENDED_L2,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DISK_SIZE,
    L1_ENTRIES_MAX,
    LAZY_REFCOUNTS,
    SECTOR_BYTES,
    Extension,
    Header,
    l1_entries_needed,
    l1_reach_bits,
)
from fleecer.formats.qcow2.refcounts import References, lay_out_refcounts
from fleecer.ranges import align_up, is_power_of_two
from fleecer.units import KiB, MiB

_COMPRESSIONS = {"deflate": COMPRESSION_DEFLATE, "zstd": COMPRESSION_ZSTD}


class NewImage(NamedTuple):
    """An image to be written into an empty file.

    `pieces` are (offset, bytes), in order of writing: everything but the header, and then the header at offset 0, which
    belongs into the file only when the rest is durable.
    """

    header: Header
    pieces: Iterator[tuple[int, bytes]]


def create_image(
    size: int,
    *,
    cluster_size: int = 64 * KiB,
    version: int = 3,
    backing_file: str | None = None,
    backing_format: str | None = None,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    compression: str = "deflate",
    extended_l2: bool = False,
) -> NewImage:
    """An image of `size` bytes that reads as its backing file, or as zeroes.

    The header's size is rounded up to a multiple of 512, as QEMU would round it down; the true one is recorded too.

    `backing_file` is recorded as given, with its format, which is required: a format must never be guessed. Raises
    UsageError for what the format does not allow.
    """
    bits = _checked_cluster_bits(size, cluster_size, extended_l2)
    _check_features(version, refcount_bits, lazy_refcounts, compression, extended_l2)
    _check_backing(backing_file, backing_format)
    virtual_size = align_up(size, SECTOR_BYTES)
    l1_size = max(l1_entries_needed(size, bits, extended_l2=extended_l2), 1)
    l1_clusters = align_up(l1_size * 8, cluster_size) >> bits
    references = References()
    references.add(0, 1 + l1_clusters)
    layout = lay_out_refcounts(references, refcount_bits.bit_length() - 1, bits, 1 + l1_clusters, "new image")
    extensions: list[Extension] = []
    if backing_format is not None:
        extensions.append(Extension(EXTENSION_BACKING_FORMAT, backing_format.encode()))
    if virtual_size != size:
        extensions.append(Extension(EXTENSION_DISK_SIZE, size.to_bytes(8, "big")))
    header = Header(
        version=version,
        cluster_bits=bits,
        size=virtual_size,
        l1_size=l1_size,
        l1_table_offset=cluster_size,
        refcount_table_offset=layout.table_offset,
        refcount_table_clusters=layout.table_clusters,
        incompatible_features=(COMPRESSION_TYPE if compression == "zstd" else 0) | (EXTENDED_L2 if extended_l2 else 0),
        compatible_features=LAZY_REFCOUNTS if lazy_refcounts else 0,
        refcount_order=refcount_bits.bit_length() - 1,
        compression_type=_COMPRESSIONS[compression],
        backing_file=backing_file,
        extensions=tuple(extensions),
    )
    packed = header.pack()
    if len(packed) > cluster_size:
        raise UsageError(
            f"header and backing file name take {len(packed)} bytes, more than a cluster of {cluster_size}"
        )

    def pieces() -> Iterator[tuple[int, bytes]]:
        for start in range(0, l1_clusters << bits, MiB):
            yield cluster_size + start, bytes(min(MiB, (l1_clusters << bits) - start))
        yield from layout.pieces
        yield 0, packed.ljust(cluster_size, b"\0")

    return NewImage(header, pieces())


def _check_backing(backing_file: str | None, backing_format: str | None) -> None:
    if (backing_file is None) != (backing_format is None):
        given, missing = ("file", "format") if backing_format is None else ("format", "file")
        raise UsageError(f"a backing {given} is given without a backing {missing}; a format is never guessed")
    if backing_file is not None:
        length = len(backing_file.encode("utf-8", "surrogateescape"))
        if not 1 <= length <= BACKING_NAME_BYTES_MAX:
            raise UsageError(f"backing file name of {length} bytes is outside 1 to {BACKING_NAME_BYTES_MAX}")


def _checked_cluster_bits(size: int, cluster_size: int, extended_l2: bool) -> int:
    bits = cluster_size.bit_length() - 1
    bits_min = EXTENDED_CLUSTER_BITS_MIN if extended_l2 else CLUSTER_BITS_MIN
    if not is_power_of_two(cluster_size) or not bits_min <= bits <= CLUSTER_BITS_MAX:
        low, high = 1 << bits_min, 1 << CLUSTER_BITS_MAX
        where = " with extended L2 entries" if extended_l2 else ""
        raise UsageError(f"cluster size {cluster_size} is not a power of two from {low} to {high}{where}")
    if size < 0 or l1_entries_needed(size, bits, extended_l2=extended_l2) > L1_ENTRIES_MAX:
        most = L1_ENTRIES_MAX << l1_reach_bits(bits, extended_l2=extended_l2)
        raise UsageError(f"image size {size} is outside 0 to {most}, the limit with clusters of {cluster_size} bytes")
    return bits


def _check_features(
    version: int, refcount_bits: int, lazy_refcounts: bool, compression: str, extended_l2: bool
) -> None:
    if version not in (2, 3):
        raise UsageError(f"qcow2 version {version} is neither 2 nor 3")
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise UsageError(f"refcount_bits {refcount_bits} is not a power of two from 1 to 64")
    if version == 2 and (refcount_bits != 16 or lazy_refcounts or compression != "deflate" or extended_l2):
        raise UsageError(
            "qcow2 version 2 has 16 refcount bits, deflate, no lazy refcounts, no extended L2 entries; use version 3"
        )
    if compression not in _COMPRESSIONS:
        raise UsageError(f"compression {quoted(compression)} is neither 'deflate' nor 'zstd'")
