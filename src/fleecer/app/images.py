"""Backing up an export and restoring an image: what `fleecer backup` and `fleecer restore` do, for any caller.

Invariants:
- An image appears under its name whole and durable, or not at all; see storage/newfile.py.
- An existing file is replaced, and a block device written to, only where `force` says so and its lock is ours.
- A restored image was read back from the device and compared with its backup before it got its name.
- What is opened is closed, and nothing is in flight, on return and on failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from typing import Literal

from fleecer.block import options as opt
from fleecer.block.edge import Edge
from fleecer.block.graph import Graph
from fleecer.block.node import Node
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import create_qcow2
from fleecer.block.opener import Opener
from fleecer.daemon.daemon import Format, format_of
from fleecer.errors import CorruptImage, FleecerError, IoError, UsageError, quoted
from fleecer.jobs import transfer
from fleecer.storage.api import Storage
from fleecer.storage.file import open_file
from fleecer.storage.newfile import NewFile, forget_cached, made_directories
from fleecer.storage.paths import file_identity

Phase = Literal["copying", "verifying"]
Report = Callable[[Phase, transfer.Progress], None]
"""Is told how far the work is: bytes of this phase."""

_SAME_TIME_MAX = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class BackedUp:
    """A backup that was made. `bytes_read` were read from the export, `bytes_written` of data are in the image."""

    path: str
    bytes_read: int
    bytes_written: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """An image that was restored and verified. `size` is the disk's; `bytes_written` is data."""

    target: str
    format: Format
    size: int
    bytes_written: int
    seconds: float


class _Bench:
    """A graph for one piece of work."""

    def __init__(self, allow_backing: tuple[str, ...] = ()) -> None:
        self.graph = Graph()
        self.opener = Opener(self.graph, allow_backing=allow_backing)
        self._edges: list[Edge] = []

    def attach(self, node: Node, role: str, *, writable: bool = False, may_grow: bool = False) -> Edge:
        """An edge that is ended with the bench, if not before."""
        edge = self.graph.attach(node, "copying", role, writable=writable, may_grow=may_grow)
        self._edges.append(edge)
        return edge

    async def close(self) -> None:
        """Closes every node, those above before those below."""
        for edge in self._edges:
            await self.graph.detach(edge)
        await self.graph.close()

    async def source(self, options: opt.BlockdevOptions) -> Edge:
        """Opens a node named "source", for reading."""
        return self.attach(await self.opener.add(options), "source")

    def reads(self, path: str) -> bool:
        """Whether the source, or any image that it is based on, is the file at `path`."""
        wanted = file_identity(path)
        names = [node.storage.name for node in self.graph.nodes() if isinstance(node, FileNode)]
        return wanted is not None and any(file_identity(name) == wanted for name in names)

    def hold(self, storage: Storage) -> None:
        """Puts a storage into the graph, under the name "file"; it is closed with the bench."""
        self.graph.add(FileNode("file", storage), named=True)

    async def make_target(self, kind: Format, size: int) -> Edge:
        """An edge to the held file as an image of `kind`, made now; for writing."""
        file = self.graph.find("file")
        if kind == "raw":
            return self.attach(file, "target", writable=True)
        edge = self.attach(file, "file", writable=True, may_grow=True)
        await create_qcow2(edge, size)
        await self.graph.detach(edge)
        return await self._qcow2_target(read_only=False)

    async def reopen_target(self, kind: Format, target: Edge) -> Edge:
        """Ends the writing edge and gives one for reading; a qcow2's tables are read again from the file."""
        await self.graph.detach(target)
        if kind == "raw":
            return self.attach(self.graph.find("file"), "target")
        await self.graph.remove("target")
        return await self._qcow2_target(read_only=True)

    async def _qcow2_target(self, *, read_only: bool) -> Edge:
        options = opt.Qcow2Options(node_name="target", file="file", backing=None, read_only=read_only)
        return self.attach(await self.opener.add(options), "target", writable=not read_only)


@contextlib.asynccontextmanager
async def _bench(allow_backing: tuple[str, ...] = ()) -> AsyncIterator[_Bench]:
    bench = _Bench(allow_backing)
    try:
        yield bench
    except BaseException:
        with contextlib.suppress(FleecerError):  # what went wrong first is what is told
            await bench.close()
        raise
    await bench.close()


async def back_up(
    socket_path: str, export: str, directory: str, stem: str, *, report: Report | None = None
) -> BackedUp:
    """Copies an NBD export served at a unix socket into a new qcow2 image, `directory`/`stem`.qcow2.

    The export must not change meanwhile. A file that exists is never touched: "-2", "-3" ... is added to the stem then.
    On return the image and its name are durable. Raises FleecerError; then there is no file, nor a new directory.
    """
    begun_s = time.monotonic()
    async with made_directories(directory), _bench() as bench:
        source = await bench.source(
            opt.NbdOptions(node_name="source", server=opt.UnixAddress(path=socket_path), export=export, read_only=True)
        )
        new = await NewFile.create(directory)
        bench.hold(new.storage)
        try:
            target = await bench.make_target("qcow2", source.size)
            done = await transfer.copy(source, target, target_is_zero=True, report=_during("copying", report))
            await target.flush()
            await bench.reopen_target("qcow2", target)
            path = await _publish_beside(new, os.path.join(directory, stem), ".qcow2")
        finally:
            await new.give_up()
    return BackedUp(path, done.read, done.written, time.monotonic() - begun_s)


async def restore(
    backup: str,
    target: str,
    *,
    format: Format | None = None,
    force: bool = False,
    backup_format: Format | None = None,
    allow_backing: tuple[str, ...] = (),
    report: Report | None = None,
) -> Restored:
    """Writes the image `backup` into a raw or qcow2 image at `target`, reads it back, and compares.

    The formats are told by the files' endings unless given. With `force` an existing file is replaced in one step once
    the new one is verified; a block device is overwritten in place. Raises FleecerError; then an existing file is as it
    was, a new one does not exist, and what a block device holds is undefined.
    """
    begun_s = time.monotonic()
    kind = format or format_of(target)
    existing = _what_is_at(target)
    if existing is not None and not force:
        raise UsageError(f"target {quoted(target)} exists; use --force to overwrite it")
    if existing is not None and file_identity(backup) == file_identity(target):
        raise UsageError(f"target {quoted(target)} is the backup itself; choose another")
    in_place = existing is not None and stat.S_ISBLK(existing)
    if in_place and kind != "raw":
        raise UsageError(f"target {quoted(target)} is a block device, and only --format raw can be written to one")
    async with _bench(allow_backing) as bench:
        source = await bench.source(_image_options(backup, "source", backup_format))
        if existing is not None and bench.reads(target):
            raise UsageError(f"target {quoted(target)} is a backing file of the backup; choose another")
        # Holds the lock of what is about to be overwritten until that is done.
        old = await open_file(target) if existing is not None else None
        if in_place and old is not None:
            bench.hold(old)
            if old.size < source.size:
                raise UsageError(
                    f"target {quoted(target)} has {old.size} bytes, too few for the backup's {source.size}"
                )
            written = await _write_and_verify(bench, source, target, kind, report)
        else:
            try:
                written = await _restore_file(bench, source, target, kind, replace=old is not None, report=report)
            finally:
                if old is not None:
                    await old.close()
        return Restored(target, kind, source.size, written, time.monotonic() - begun_s)


async def check_equal(image: str, socket_path: str, export: str, *, report: Report | None = None) -> None:
    """Raises CorruptImage unless the image reads, byte for byte, as an NBD export that does not change meanwhile."""
    async with _bench() as bench:
        source = await bench.source(
            opt.NbdOptions(node_name="source", server=opt.UnixAddress(path=socket_path), export=export, read_only=True)
        )
        other = bench.attach(await bench.opener.add(_image_options(image, "image")), "image")
        if other.size > source.size:
            raise CorruptImage(image, f"it has {other.size} bytes, its source {source.size}")
        await _check_same(source, other, image, _during("verifying", report))


async def _restore_file(
    bench: _Bench, source: Edge, target: str, kind: Format, *, replace: bool, report: Report | None
) -> int:
    path = _resolved(target)
    new = await NewFile.create(os.path.dirname(path))
    try:
        if kind == "raw":
            await new.storage.truncate(source.size)
        bench.hold(new.storage)
        written = await _write_and_verify(bench, source, target, kind, report, new=new)
        try:
            await new.publish(path, replace=replace)
        except IoError as error:
            if error.errno != errno.EEXIST:
                raise
            raise UsageError(f"target {quoted(target)} exists; use --force to overwrite it") from error
    finally:
        await new.give_up()
    return written


async def _write_and_verify(
    bench: _Bench, source: Edge, target: str, kind: Format, report: Report | None, *, new: NewFile | None = None
) -> int:
    """Copies into the held file, `new` or in place, flushes, compares what comes back. Returns the bytes written."""
    edge = await bench.make_target(kind, source.size)
    done = await transfer.copy(source, edge, target_is_zero=new is not None, report=_during("copying", report))
    await edge.flush()
    edge = await bench.reopen_target(kind, edge)
    await forget_cached(target if new is None else new.path)
    await _check_same(source, edge, target, _during("verifying", report))
    return done.written


async def _check_same(source: Edge, other: Edge, path: str, report: transfer.Report | None) -> None:
    if other.size < source.size:
        raise CorruptImage(path, f"it has {other.size} bytes, its source {source.size}")
    at = await transfer.compare(source, other, report=report)
    if at is not None:
        raise CorruptImage(path, f"the byte at {at} reads back otherwise than it was written; do not use this image")


async def _publish_beside(new: NewFile, stem: str, ending: str) -> str:
    """Publishes under the first name that is free: stem, stem-2, stem-3 ..."""
    for serial in range(1, _SAME_TIME_MAX):
        path = f"{stem}{ending}" if serial == 1 else f"{stem}-{serial}{ending}"
        try:
            await new.publish(path)
        except IoError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            return path
    raise UsageError(f"there are {_SAME_TIME_MAX} files {quoted(stem)}-N{ending}; choose another directory")


def _image_options(path: str, node_name: str, kind: Format | None = None) -> opt.BlockdevOptions:
    """Options to read the image at `path`, whose ending tells its format unless `kind` does."""
    file = opt.FileOptions(filename=path, read_only=True)
    if (kind or format_of(path, option="--backup-format")) == "qcow2":
        return opt.Qcow2Options(node_name=node_name, file=file, read_only=True)
    return opt.RawOptions(node_name=node_name, file=file, read_only=True)


def _resolved(path: str) -> str:
    """Where `path` leads, links followed: that is replaced, not the link."""
    return os.path.realpath(path)


def _what_is_at(path: str) -> int | None:
    """The mode of what is at `path`, links followed; None if nothing is."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IoError(error.errno or errno.EIO, path, "look at") from error


def _during(phase: Phase, report: Report | None) -> transfer.Report | None:
    return None if report is None else lambda progress: report(phase, progress)
