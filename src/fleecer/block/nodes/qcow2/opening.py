"""Opening, creating and checking qcow2 images over an edge to the file that holds them."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from array import array
from typing import TypeVar

from fleecer.block.edge import Edge
from fleecer.block.nodes.qcow2.image import Image
from fleecer.block.nodes.qcow2.node import Qcow2Node
from fleecer.block.nodes.qcow2.subclusters import ExtendedQcow2Node
from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.check import CheckReport, check, rebuild
from fleecer.formats.qcow2.create import create_image
from fleecer.formats.qcow2.header import (
    DIRTY,
    HEADER_START_BYTES,
    INCOMPATIBLE_FIELD,
    REFCOUNT_TABLE_FIELD,
    Header,
    header_area_bytes,
    parse_header,
)
from fleecer.formats.qcow2.steps import Steps, Write
from fleecer.formats.qcow2.tables import decode_table
from fleecer.formats.qcow2.truncation import check_not_cut
from fleecer.ranges import Buffer
from fleecer.units import KiB, MiB

T = TypeVar("T")

L2_CACHE_BYTES = 32 * MiB
REFCOUNT_CACHE_BYTES = 4 * MiB
_BYTES_BETWEEN_TURNS = 64 * KiB


async def read_header(file: Edge, name: str) -> Header:
    """The checked header of the image in `file`; `name` stands for it in messages. Raises FormatError or IoError."""
    size = file.size
    start = bytes(await file.pread(0, min(HEADER_START_BYTES, size))) if size else b""
    area = min(header_area_bytes(start, name), size)
    if area > len(start):
        start += await file.pread(len(start), area - len(start))
    return parse_header(start[:area], size, name)


async def open_qcow2(
    file: Edge,
    *,
    name: str,
    header: Header,
    backing: Edge | None,
    read_only: bool,
    path: str | None = None,
    l2_cache_bytes: int = L2_CACHE_BYTES,
    refcount_cache_bytes: int = REFCOUNT_CACHE_BYTES,
    discard_freed: bool = False,
    serialise: bool = True,
) -> Qcow2Node:
    """The node for an image whose header was read before, over `backing` (None: unallocated clusters are zeroes).

    The edge to the file must allow growth, and writing unless `read_only`. An image whose file was cut short is
    refused (truncation.py). One marked dirty has its refcounts rebuilt first, unless it is opened read-only; one marked
    corrupt is refused then. `path` is what the user calls the file, in messages about it (default: `name`).
    `discard_freed` passes freed clusters on to the file as discards. `serialise` is for tests (inflight.py). Raises
    FormatError or IoError; the file was then not changed, or is still marked dirty.
    """
    path = name if path is None else path
    table = array("Q")
    if not read_only and header.corrupt:
        raise CorruptImage(path, "it is marked corrupt; open it read-only, or repair it with qemu-img check -r all")
    await _carry_out(check_not_cut(header, file.size, path), file)
    if not read_only:
        if header.dirty:
            header = await _rebuild(file, path, header)
        length = header.refcount_table_clusters << header.cluster_bits
        table = decode_table(await _read_padded(file, header.refcount_table_offset, length))
    l1 = array("Q")
    if header.l1_size:
        l1 = decode_table(await file.pread(header.l1_table_offset, header.l1_size * 8))
    kind = ExtendedQcow2Node if header.extended_l2 else Qcow2Node
    return kind(
        Image(name, path, file, header, l1, table),
        backing,
        read_only=read_only,
        l2_cache_bytes=l2_cache_bytes,
        refcount_cache_bytes=refcount_cache_bytes,
        discard_freed=discard_freed,
        serialise=serialise,
    )


async def create_qcow2(
    file: Edge,
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
) -> Header:
    """Writes a new image of `size` bytes into an empty file; it is durable on return. See `create_image`.

    The header comes last: after a failure or a power cut there is a whole image or none.
    """
    image = create_image(
        size,
        cluster_size=cluster_size,
        version=version,
        backing_file=backing_file,
        backing_format=backing_format,
        refcount_bits=refcount_bits,
        lazy_refcounts=lazy_refcounts,
        compression=compression,
        extended_l2=extended_l2,
    )
    for offset, data in image.pieces:
        if not offset:
            await file.flush()
        await file.pwrite(offset, data)
    await file.flush()
    return image.header


async def check_qcow2(file: Edge, name: str) -> CheckReport:
    """Checks the image in `file`, which nobody writes to meanwhile. Raises FormatError if its header is not usable."""
    header = await read_header(file, name)
    return await _carry_out(check(header, file.size, name), file)


async def _rebuild(file: Edge, name: str, header: Header) -> Header:
    """Rebuilds the refcounts of a dirty image and clears its dirty bit; both are durable on return."""
    rebuilt = await _carry_out(rebuild(header, file.size, name), file)
    await file.flush()
    # One write within one sector: the new table is named and the bit cleared together, or not at all.
    start = bytearray(await file.pread(0, 512))
    struct.pack_into(">QI", start, REFCOUNT_TABLE_FIELD, rebuilt.table_offset, rebuilt.table_clusters)
    struct.pack_into(">Q", start, INCOMPATIBLE_FIELD, header.incompatible_features & ~DIRTY)
    await file.pwrite(0, start)
    await file.flush()
    return dataclasses.replace(
        header,
        refcount_table_offset=rebuilt.table_offset,
        refcount_table_clusters=rebuilt.table_clusters,
        incompatible_features=header.incompatible_features & ~DIRTY,
    )


async def _carry_out(steps: Steps[T], file: Edge) -> T:
    """Drives a walk over the image. It may be long, so the loop gets its turns."""
    answer: bytes | None = None
    bytes_to_turn = _BYTES_BETWEEN_TURNS
    while True:
        try:
            step = next(steps) if answer is None else steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if isinstance(step, Write):
            await file.pwrite(step.offset, step.data)
            answer = b""
        else:
            answer = bytes(await _read_padded(file, step.offset, step.length))
            bytes_to_turn -= step.length
            if bytes_to_turn <= 0:
                bytes_to_turn = _BYTES_BETWEEN_TURNS
                await asyncio.sleep(0)


async def _read_padded(file: Edge, offset: int, length: int) -> Buffer:
    """Bytes of the file, zeroes where it has ended."""
    present = max(0, min(length, file.size - offset))
    data = await file.pread(offset, present) if present else b""
    return data if present == length else b"".join((data, bytes(length - present)))
