"""The qcow2 header: round trips, limits, and what each refusal says."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from fleecer.errors import CorruptImage, FormatError, UnsupportedFormat, UsageError
from fleecer.formats.qcow2.create import create_image
from fleecer.formats.qcow2.header import (
    COMPRESSION_TYPE,
    EXTENSION_FEATURE_NAMES,
    Extension,
    Header,
    header_area_bytes,
    parse_header,
)
from fleecer.units import GiB, KiB, TiB

FILE_SIZE = 1 << 20
HEADER = Header(
    version=3,
    cluster_bits=16,
    size=GiB,
    l1_size=2,
    l1_table_offset=65536,
    refcount_table_offset=131072,
    refcount_table_clusters=1,
)


def parsed(header: Header, file_size: int = FILE_SIZE) -> Header:
    return parse_header(header.pack().ljust(header.cluster_size, b"\0"), file_size, "disk.qcow2")


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        dataclasses.replace(HEADER, version=2),
        dataclasses.replace(HEADER, backing_file="base \udcff\u00e9.raw", extensions=(Extension(0xE2792ACA, b"raw"),)),
        dataclasses.replace(
            HEADER,
            extensions=(Extension(0x12345678, b"unknown, 13 B"), Extension(0x12345678, b""), Extension(7, b"\0" * 9)),
            autoclear_features=1 << 63,
            compatible_features=1 << 40 | 1,
        ),
        dataclasses.replace(
            HEADER, compression_type=1, incompatible_features=COMPRESSION_TYPE | 3, extra=b"later field"
        ),
    ],
)
def test_a_header_packed_and_parsed_is_the_same_with_all_that_is_unknown(header: Header) -> None:
    assert parsed(header) == header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster_bits": 22}, "cluster_bits 22 is outside 9 to 21"),
        ({"cluster_bits": 8}, "cluster_bits 8 is outside 9 to 21"),
        ({"l1_size": 0xFFFFFFFF}, "l1_size 4294967295 exceeds limit 4194304"),
        ({"l1_size": 1}, "l1_size 1 is too small for size 1073741824, which needs 2 entries"),
        (
            {"size": (1 << 64) - 1},
            "l1_size 2 is too small for size 18446744073709551615, which needs 34359738368 entries",
        ),
        ({"l1_table_offset": 65537}, "l1_table_offset 65537 is not a multiple of the cluster size 65536 above 0"),
        ({"l1_table_offset": 0}, "l1_table_offset 0 is not a multiple of the cluster size 65536 above 0"),
        ({"l1_table_offset": 1 << 40}, "l1_table_offset 1099511627776 with 16 bytes passes the file's end at 1048576"),
        ({"l1_table_offset": 131072}, "l1_table_offset 131072 lies in or across the refcount table"),
        ({"refcount_table_clusters": 0}, "refcount_table_clusters 0 is outside 1 to 128"),
        ({"refcount_table_clusters": 129}, "refcount_table_clusters 129 is outside 1 to 128"),
        ({"refcount_order": 7}, "refcount_order 7 exceeds limit 6"),
        ({"nb_snapshots": 65537}, "nb_snapshots 65537 exceeds limit 65536"),
        ({"nb_snapshots": 1, "snapshots_offset": 512}, "snapshots_offset 512 is not a multiple"),
        ({"backing_file": "x" * 1024}, "backing_file_size 1024 exceeds limit 1023"),
        ({"incompatible_features": 4}, "it keeps its data in an external data file, which is not supported"),
        (
            {"incompatible_features": 16, "cluster_bits": 13},
            "cluster_bits 13 is below limit 14 with extended L2 entries",
        ),
        ({"incompatible_features": 1 << 5}, "it uses unknown incompatible features: bit 5"),
        ({"incompatible_features": 8}, "compression_type 0 contradicts incompatible_features 0x8"),
        ({"compression_type": 1}, "compression_type 1 contradicts incompatible_features 0x0"),
        ({"compression_type": 2, "incompatible_features": 8}, "compression_type 2 is neither 0"),
        ({"extensions": (Extension(0xE2792ACA, b"raw"),) * 2}, "header extension 0xe2792aca appears twice"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_field_value_and_limit(change: dict[str, object], message: str) -> None:
    data = dataclasses.replace(HEADER, **change).pack().ljust(65536, b"\0")  # type: ignore[arg-type]
    with pytest.raises(FormatError) as caught:
        parse_header(data, FILE_SIZE, "disk.qcow2")
    assert str(caught.value).startswith("image 'disk.qcow2': ")
    assert message in str(caught.value)


def test_an_unknown_feature_is_named_by_the_images_own_table() -> None:
    name = b"\0\x3f" + b"time\ntravel".ljust(46, b"\0")
    header = dataclasses.replace(
        HEADER, incompatible_features=1 << 63, extensions=(Extension(EXTENSION_FEATURE_NAMES, name),)
    )
    with pytest.raises(UnsupportedFormat, match=r"'time\\ntravel' \(bit 63\)"):
        parsed(header)


@pytest.mark.parametrize("method", [1, 2, 77])
def test_an_encrypted_image_is_refused(method: int) -> None:
    data = bytearray(HEADER.pack().ljust(65536, b"\0"))
    struct.pack_into(">I", data, 32, method)
    with pytest.raises(UnsupportedFormat, match="encrypted"):
        parse_header(bytes(data), FILE_SIZE, "disk")


@pytest.mark.parametrize("length", [0, 72, 96, 103, 105, 65544, 0xFFFFFFF8])
def test_a_header_length_that_cannot_be_is_refused(length: int) -> None:
    data = bytearray(HEADER.pack().ljust(65536, b"\0"))
    struct.pack_into(">I", data, 100, length)
    with pytest.raises(CorruptImage, match=f"header_length {length} "):
        parse_header(bytes(data), FILE_SIZE, "disk")


def test_an_extension_longer_than_its_room_is_refused() -> None:
    data = bytearray(HEADER.pack().ljust(65536, b"\0"))
    struct.pack_into(">II", data, 112, 0x1234, 0xFFFFFFFF)
    with pytest.raises(CorruptImage, match="header extension 0x00001234 of 4294967295 bytes exceeds limit 65416"):
        parse_header(bytes(data), FILE_SIZE, "disk")


def test_a_backing_file_name_outside_the_first_cluster_is_refused() -> None:
    data = bytearray(HEADER.pack().ljust(65536, b"\0"))
    for offset in (8, 65530, 1 << 40):
        struct.pack_into(">QI", data, 8, offset, 10)
        with pytest.raises(CorruptImage, match=f"backing_file_offset {offset} with 10 bytes"):
            parse_header(bytes(data), FILE_SIZE, "disk")


def test_too_few_bytes_and_other_formats_are_refused() -> None:
    with pytest.raises(CorruptImage, match="too few"):
        header_area_bytes(b"QFI\xfb", "disk")
    with pytest.raises(CorruptImage, match="magic"):
        header_area_bytes(bytes(512), "disk")
    with pytest.raises(UnsupportedFormat, match="version 1 is neither"):
        header_area_bytes(b"QFI\xfb\0\0\0\1".ljust(512, b"\0"), "disk")
    with pytest.raises(CorruptImage, match="are too few"):
        parse_header(HEADER.pack()[:80], 80, "disk")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_size": 1000}, "cluster size 1000 is not a power of two from 512 to 2097152"),
        ({"cluster_size": 4 << 20}, "cluster size 4194304 is not a power of two"),
        ({"cluster_size": 512, "size": TiB}, "image size 1099511627776 is outside 0 to 137438953472"),
        ({"size": -1}, "image size -1 is outside"),
        ({"version": 4}, "version 4"),
        ({"refcount_bits": 3}, "refcount_bits 3"),
        ({"version": 2, "refcount_bits": 8}, "version 2 has 16 refcount bits"),
        ({"compression": "lz4"}, "'lz4' is neither"),
        ({"backing_file": "base"}, "without a backing format"),
        ({"backing_format": "raw"}, "without a backing file"),
        ({"backing_file": "x" * 1024, "backing_format": "raw"}, "1024 bytes is outside 1 to 1023"),
        ({"backing_file": "x" * 500, "backing_format": "raw", "cluster_size": 512}, "more than a cluster of 512"),
    ],
)
def test_an_image_that_cannot_be_is_not_created(options: dict[str, object], message: str) -> None:
    size = options.pop("size", 64 * KiB)
    with pytest.raises(UsageError, match=message):
        create_image(size, **options)  # type: ignore[arg-type]
