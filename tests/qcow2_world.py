"""qcow2 images in memory, and random work on them: what the qcow2 tests share."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from fleecer.block.edge import Edge
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import Qcow2Node, check_qcow2, create_qcow2, open_qcow2, read_header
from fleecer.formats.qcow2.check import CheckReport
from fleecer.ranges import Buffer
from fleecer.storage.api import Storage
from fleecer.testing.memory import MemoryStorage


def file_edge(storage: Storage, *, writable: bool = True) -> Edge:
    """The edge by which a qcow2 node holds its file."""
    return Edge(FileNode(storage.name, storage), "node 'disk'", "file", writable=writable, may_grow=writable)


async def new_image(size: int, storage: MemoryStorage | None = None, **options: Any) -> MemoryStorage:
    """A new image of `size` bytes; `options` as for `create_qcow2`."""
    storage = MemoryStorage(0, name="image") if storage is None else storage
    await create_qcow2(file_edge(storage), size, **options)
    return storage


async def open_image(
    storage: Storage, *, backing: Storage | None = None, read_only: bool = False, **options: Any
) -> Qcow2Node:
    """The node over an image, as `open_qcow2` makes it."""
    file = file_edge(storage, writable=not read_only)
    below = None if backing is None else Edge(FileNode("backing", backing), "node 'disk'", "backing")
    header = await read_header(file, "disk")
    return await open_qcow2(file, name="disk", header=header, backing=below, read_only=read_only, **options)


def guest(node: Qcow2Node) -> Edge:
    """The edge of one who uses the disk."""
    return Edge(node, "guest", "disk", writable=not node.read_only)


async def checked(storage: MemoryStorage) -> CheckReport:
    """Our own check of what the file holds now."""
    return await check_qcow2(file_edge(MemoryStorage(bytes(storage.data)), writable=False), "disk")


def qemu_check(data: bytes | bytearray, directory: Path) -> tuple[int, int]:
    """Corruptions and leaks in an image, as qemu-img sees them."""
    path = directory / "checked.qcow2"
    path.write_bytes(data)
    done = subprocess.run(["qemu-img", "check", "--output=json", path], capture_output=True, text=True)
    assert done.returncode in (0, 2, 3), done.stderr
    report = json.loads(done.stdout)
    return report.get("corruptions", 0) + report["check-errors"], report.get("leaks", 0)


class Hold:
    """One operation of a `HeldStorage` that is stopped before it does anything."""

    def __init__(self, operation: str, start: int, end: int) -> None:
        self.operation = operation
        self.start = start
        self.end = end
        self.reached = asyncio.Event()
        self.released = asyncio.Event()


class HeldStorage(MemoryStorage):
    """A storage whose next read, write or flush of a range can be stopped. `counts` tells how many of each it saw."""

    def __init__(self, content: int | bytes, **options: Any) -> None:
        super().__init__(content, **options)
        self.holds: list[Hold] = []
        self.counts = {"read": 0, "write": 0, "flush": 0, "discard": 0}
        self.written: list[tuple[int, int]] = []

    def hold(self, operation: str, start: int = 0, end: int = 1 << 62) -> Hold:
        """Stops the next such operation that touches the range, until `released` is set."""
        self.holds.append(Hold(operation, start, end))
        return self.holds[-1]

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        return False

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return False

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._stop("read", offset, length)
        return await super().pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._stop("write", offset, len(data))
        self.written.append((offset, len(data)))
        await super().pwrite(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        await self._stop("discard", offset, length)
        await super().discard(offset, length)

    async def sync(self) -> None:
        await self._stop("flush", 0, 1)
        await super().sync()

    async def _stop(self, operation: str, offset: int, length: int) -> None:
        self.counts[operation] += 1
        for hold in self.holds:
            if hold.operation == operation and hold.start < offset + length and offset < hold.end:
                self.holds.remove(hold)
                hold.reached.set()
                await hold.released.wait()
                return


async def settle() -> None:
    """Lets everything run that does not wait for a hold."""
    for _ in range(60):
        await asyncio.sleep(0)


class Model:
    """What a disk must read as, and random requests on it.

    Requests of one round run at the same time. They may overlap only if none of them changes anything there, so that
    what must be read is certain.
    """

    def __init__(self, content: bytes, seed: int, *, unit: int = 512) -> None:
        self.content = bytearray(content)
        self.random = random.Random(seed)
        self.unit = unit

    async def round(self, edge: Edge, requests: int, longest: int) -> None:
        """Some requests at the same time, and perhaps a flush among them."""
        taken: list[tuple[int, int, bool]] = []
        work = []
        for _ in range(requests):
            length = self.random.randint(1, longest) if self.random.random() < 0.5 else self.unit
            offset = self.random.randrange(0, len(self.content))
            if self.random.random() < 0.6:
                offset -= offset % self.unit
            length = min(length, len(self.content) - offset)
            kind = self.random.choice(("read", "write", "write", "zero", "discard", "status", "flush"))
            changes = kind in ("write", "zero", "discard")
            if any(offset < end and start < offset + length and (changes or other) for start, end, other in taken):
                continue
            taken.append((offset, offset + length, changes))
            work.append(self._request(edge, kind, offset, length))
        await asyncio.gather(*work)

    async def _request(self, edge: Edge, kind: str, offset: int, length: int) -> None:
        stop = offset + length
        if kind == "read":
            assert await edge.pread(offset, length) == self.content[offset:stop], f"wrong data in {offset}..{stop}"
        elif kind == "write":
            data = self.random.randbytes(length)
            await edge.pwrite(offset, data, serialising=self.random.random() < 0.2)
            self.content[offset:stop] = data
        elif kind == "zero":
            await edge.zero(offset, length, unmap=self.random.random() < 0.5)
            self.content[offset:stop] = bytes(length)
        elif kind == "discard":
            await edge.discard(offset, length)
            found = await edge.pread(offset, length)
            for at in range(length):
                assert found[at] in (0, self.content[offset + at]), f"discard left new bytes at {offset + at}"
            self.content[offset:stop] = found
        elif kind == "status":
            for extent in await edge.block_status(offset, length):
                if extent.flags & 2:
                    assert not any(self.content[offset : offset + extent.length]), f"{offset} is not zero as told"
                offset += extent.length
            assert offset <= stop
        else:
            await edge.flush()

    async def compare(self, edge: Edge) -> None:
        """Reads the whole disk."""
        assert bytes(await edge.pread(0, len(self.content))) == bytes(self.content)
