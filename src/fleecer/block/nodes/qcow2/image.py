"""What the parts of one open image share: its file, its header and L1 table, and whether it may be written to.

Invariants: `accepts_writes` is false before the first write has prepared the header and for ever after the first
failure of a metadata write or flush, or the first sign of corruption met by a writer; nothing is retried then.
`metadata` holds every cluster of the header, the active L1 table, the refcount structure and the active L2 tables;
none of them is ever handed to guest data.
"""

from __future__ import annotations

import errno
import struct
from array import array
from collections.abc import Callable

from fleecer.block.edge import Edge
from fleecer.block.node import Problem
from fleecer.errors import CorruptImage, FleecerError, IoError, told
from fleecer.formats.qcow2.compressed import unpack_cluster
from fleecer.formats.qcow2.header import AUTOCLEAR_FIELD, CORRUPT, INCOMPATIBLE_FIELD, Header
from fleecer.formats.qcow2.subclusters import mapping_of
from fleecer.formats.qcow2.tables import COPIED, OFFSET_MASK, Compressed
from fleecer.ranges import Buffer


class Image:
    """One open qcow2 image. `l1` is the active L1 table, `l1_dirty` what of it is not stored.

    `name` is the node's, for requests that fail; `path` what the user calls the file, for what is wrong with it.
    `on_failure` is called once, when the image is given up.
    """

    def __init__(
        self, name: str, path: str, file: Edge, header: Header, l1: array[int], refcount_table: array[int]
    ) -> None:
        self.name = name
        self.path = path
        self.file = file
        self.header = header
        self.mapping = mapping_of(header, path)
        self.l1 = l1
        self.l1_dirty: set[int] = set()
        self.refcount_table = refcount_table
        self.refcount_table_offset = header.refcount_table_offset
        self.metadata: set[int] = set()
        self.accepts_writes = False
        self.failure: FleecerError | None = None
        self.on_failure: Callable[[Problem], None] | None = None
        self._incompatible = header.incompatible_features
        # The compressed cluster read last, and where it is: small reads come one after the other.
        self._unpacked: tuple[int, bytes] = (0, b"")

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes of the file, zeroes where it has ended."""
        end = self.file.size
        if offset + length <= end:
            return await self.file.pread(offset, length)
        data = bytearray(length)
        if offset < end:
            data[: end - offset] = await self.file.pread(offset, end - offset)
        return data

    async def read_compressed(self, plan: Compressed) -> Buffer:
        """What a plan wants of a compressed cluster. None is ever written here, so what was at an offset still is."""
        host, unpacked = self._unpacked
        if host != plan.host_offset:
            packed = await self.read(plan.host_offset, plan.host_length)
            kind = self.header.compression_type
            unpacked = unpack_cluster(packed, self.header.cluster_size, kind, self.path, plan.host_offset)
            self._unpacked = (plan.host_offset, unpacked)
        return unpacked[plan.offset_in_cluster : plan.offset_in_cluster + plan.length]

    async def prepare_writing(self) -> None:
        """What must be before the first write: autoclear bits are cleared, durably, and metadata clusters are known."""
        self.check_failure("write")
        if self.header.autoclear_features:
            # Whatever they vouch for (bitmaps too) is no longer kept up to date from here on.
            await self.patch_header(AUTOCLEAR_FIELD, bytes(8))
        size, known = self.header.cluster_size, self.metadata
        l1_offset, l1_end = self.header.l1_table_offset, self.header.l1_table_offset + len(self.l1) * 8
        table_end = self.refcount_table_offset + len(self.refcount_table) * 8
        known.clear()
        known.add(0)
        known.update(range(l1_offset, l1_end, size))
        known.update(range(self.refcount_table_offset, table_end, size))
        for kind, offsets in (
            ("refcount block", [offset for offset in self.refcount_table if offset]),
            ("L2 table", [entry & OFFSET_MASK for entry in self.l1 if entry & ~COPIED]),
        ):
            for offset in offsets:
                if offset in known:
                    raise await self.corrupt(f"{kind} at {offset} lies in other metadata", (offset, size))
                known.add(offset)
        self.accepts_writes = True

    async def patch_header(self, field: int, data: bytes) -> None:
        """Overwrites header bytes, within one sector, and makes that durable. A failure poisons the image."""
        try:
            await self.file.pwrite(field, data)
            await self.file.flush()
        except FleecerError as error:
            self.poison(error)
            raise

    def poison(self, error: FleecerError, span: tuple[int, int] | None = None) -> None:
        """Refuses every write and flush from now on: what the file holds is known only after it is opened anew."""
        self.accepts_writes = False
        if self.failure is None:
            self.failure = error
            if self.on_failure is not None:
                self.on_failure(Problem(told(error), isinstance(error, CorruptImage), span))

    def check_failure(self, operation: str) -> None:
        """Raises if the image was given up."""
        failure = self.failure
        if isinstance(failure, CorruptImage):
            raise CorruptImage(self.path, f"{operation} refused: {failure.problem}")
        if failure is not None:
            detail = f"given up after an earlier failure ({told(failure)}); reopen the image"
            raise IoError(failure.errno or errno.EIO, self.name, operation, detail=detail)

    async def corrupt(self, problem: str, span: tuple[int, int] | None = None) -> CorruptImage:
        """Gives the image up as corrupt, marks it so in the file (version 3), and returns the error to raise.

        `span` is the host offset and length of what was met, where that is known.
        """
        first = self.failure is None
        error = CorruptImage(self.path, f"{problem}; repair the image with qemu-img check -r all before writing to it")
        self.poison(error, span)
        if first and self.header.version >= 3:
            self._incompatible |= CORRUPT
            try:
                await self.patch_header(INCOMPATIBLE_FIELD, struct.pack(">Q", self._incompatible))
            except FleecerError as failure:
                return CorruptImage(self.path, f"{error.problem}; marking it corrupt failed: {told(failure)}")
        return error

    async def check_overlap(self, host: int, length: int) -> None:
        """Raises, and gives the image up, if guest data was to overwrite metadata. `host` may be inside a cluster."""
        size = self.header.cluster_size
        for offset in range(host & -size, host + length, size):
            if offset in self.metadata:
                raise await self.corrupt(f"data was to be written over metadata at {offset}", (offset, size))
