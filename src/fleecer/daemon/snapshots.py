"""Snapshots of served disks: N disks, one instant, all or none; each read over NBD as the export DISK@SNAPSHOT.

A snapshot keeps its old data in one unlinked file per disk, beside the image or in a directory that is named: a crash
leaves nothing behind. A disk's snapshots share one filter and one copy of what is overwritten.

Invariants:
- Making and deleting are done one at a time. What fails half-way is undone before the error is raised.
- The moment told as `created` is read in the step that makes the cut.
- A snapshot that breaks gives its scratch back at once, keeps its cause for whoever asks, and is announced.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleecer.block.copier import CLUSTER_SIZE_BYTES, TIMEOUT_S, OnError, Snapshot
from fleecer.block.fleecing import Fleece, Plan, cut, release_scratch, uncut
from fleecer.block.graph import DRAIN_TIMEOUT_S, SNAPSHOT_ROLE
from fleecer.block.node import Node
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.errors import FleecerError, NotFound, UsageError, quoted, told
from fleecer.export import Export
from fleecer.storage.file import open_unlinked

if TYPE_CHECKING:
    from fleecer.block.edge import Edge
    from fleecer.daemon.daemon import Daemon

PRESERVED_CONTEXT = "fleecer:preserved"
"""Metadata context of a snapshot's export: flag 1 where the old data is in its scratch, 0 where still on the disk."""

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")


@dataclasses.dataclass(slots=True)
class SnapshotPart:
    """One disk's part of a snapshot. `access` reads it in this process, `export` over NBD."""

    disk: str
    size: int
    fleece: Fleece
    access: SnapshotAccessNode
    export: Export

    @property
    def bytes_preserved(self) -> int:
        """Old data in this snapshot's own scratch; a later snapshot of the disk may hold more that this one reads."""
        return self.fleece.copier.preserved_bytes(self.fleece.snapshot)

    @property
    def cause(self) -> str:
        """Why it broke; "" while it is whole."""
        broken = self.fleece.snapshot.broken
        return broken.cause if broken is not None else ""


@dataclasses.dataclass(slots=True)
class SnapshotSet:
    """A snapshot of one or more disks, all of the instant `created` (UTC)."""

    name: str
    created: datetime.datetime
    parts: list[SnapshotPart]


class Snapshots:
    """The snapshots of one daemon, by name."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._sets: dict[str, SnapshotSet] = {}
        self._changing = asyncio.Lock()
        self._releasing: set[asyncio.Task[None]] = set()

    def sets(self) -> list[SnapshotSet]:
        """Every snapshot, oldest first."""
        return list(self._sets.values())

    def find(self, name: str) -> SnapshotSet:
        """The snapshot of that name. Raises NotFound."""
        try:
            return self._sets[name]
        except KeyError:
            raise NotFound("snapshot", name) from None

    async def create(
        self,
        disks: Sequence[str] = (),
        *,
        name: str | None = None,
        scratch_directory: str | None = None,
        on_error: OnError = "break-snapshot",
        copy_timeout_s: float = TIMEOUT_S,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
        cluster_size_bytes: int = CLUSTER_SIZE_BYTES,
    ) -> SnapshotSet:
        """Cuts the disks named (default: all that are served) at one instant, and exports each.

        Raises before anything is changed, or after undoing it: NotFound or UsageError for names, IoError where a
        scratch cannot be made or a disk does not come to rest in `drain_timeout_s`.
        """
        async with self._changing:
            name = self._free_name(name)
            exports = self._disks(disks)
            scratches: list[Edge] = []
            try:
                for export in exports:
                    scratch = await self._scratch(export, name, scratch_directory)
                    scratches.append(scratch)
                plans = [
                    Plan(
                        export.edge.node,
                        scratch,
                        f"{export.name}@{name}",
                        fresh=True,
                        share=True,
                        on_error=on_error,
                        timeout_s=copy_timeout_s,
                        cluster_size_bytes=cluster_size_bytes,
                    )
                    for export, scratch in zip(exports, scratches, strict=True)
                ]
                fleeces = await cut(self._daemon.graph, plans, timeout_s=drain_timeout_s)
            except BaseException:
                for scratch in scratches:
                    await self._daemon.graph.detach(scratch)
                raise
            created = datetime.datetime.now(datetime.UTC)
            taken = SnapshotSet(name, created, [])
            try:
                for export, fleece in zip(exports, fleeces, strict=True):
                    taken.parts.append(await self._publish(export, name, fleece))
            except BaseException:
                for part in taken.parts:
                    await self._withdraw(part)
                for fleece in fleeces[len(taken.parts) :]:
                    await uncut(self._daemon.graph, fleece)
                raise
            self._sets[name] = taken
        return taken

    async def delete(self, name: str) -> None:
        """Ends a snapshot: its readers' requests in flight end, they are cut off, its scratch is given back.

        Raises NotFound, or what kept a filter in place (the snapshot is gone all the same).
        """
        async with self._changing:
            await self._delete(self.find(name))

    async def delete_all(self) -> None:
        """Ends every snapshot, also one being made, and gives the scratches of broken ones back: for shutting down.

        Raises the first failure after all has been tried.
        """
        failure: FleecerError | None = None
        async with self._changing:
            for taken in self.sets():
                try:
                    await self._delete(taken)
                except FleecerError as error:
                    failure = failure or error
        await asyncio.gather(*self._releasing)
        if failure is not None:
            raise failure

    async def _delete(self, taken: SnapshotSet) -> None:
        del self._sets[taken.name]
        failure: FleecerError | None = None
        for part in taken.parts:
            try:
                await self._withdraw(part)
            except FleecerError as error:
                failure = failure or error
        self._daemon.events.announce("SNAPSHOT_DELETED", {"name": taken.name})
        if failure is not None:
            raise failure

    def _free_name(self, name: str | None) -> str:
        if name is None:
            stem = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
            serial = 1
            name = stem
            while name in self._sets:
                serial += 1
                name = f"{stem}-{serial}"
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"snapshot name {quoted(name)} must be up to 128 letters, digits and . _ : + -, and begin "
                "with a letter or digit"
            )
        if name in self._sets:
            raise UsageError(f"snapshot name {quoted(name)} is taken; delete that one or choose another")
        return name

    def _disks(self, names: Sequence[str]) -> list[Export]:
        served = {export.name: export for export in self._daemon.disks()}
        for name in names:
            if name not in served:
                raise NotFound("disk", name)
        chosen = [served[name] for name in dict.fromkeys(names)] or list(served.values())
        if not chosen:
            raise UsageError("no disk is served, so there is nothing to take a snapshot of")
        return chosen

    async def _scratch(self, export: Export, snapshot: str, directory: str | None) -> Edge:
        node = export.edge.node
        storage = await open_unlinked(directory or _image_directory(export.name, node))
        graph = self._daemon.graph
        try:
            await storage.truncate(node.size)
            scratch = FileNode(graph.fresh_name(), storage)
            graph.add(scratch, named=False)
        except BaseException:
            await storage.close()
            raise
        return graph.attach(scratch, f"snapshot {quoted(snapshot)} of {export.name}", "scratch", writable=True)

    async def _publish(self, disk: Export, name: str, fleece: Fleece) -> SnapshotPart:
        graph, server = self._daemon.graph, self._daemon.server
        label = f"{disk.name}@{name}"
        filter_edge = graph.attach(fleece.filter, f"snapshot {quoted(label)}", SNAPSHOT_ROLE)
        access = SnapshotAccessNode(graph.fresh_name(), filter_edge, fleece.copier, fleece.snapshot)
        graph.add(access, named=False)
        edge = graph.attach(access, f"export {quoted(label)}", "nbd")
        export = Export(
            label,
            label,
            edge,
            description=f"snapshot of {disk.name}",
            contexts={PRESERVED_CONTEXT: access.preserved_status},
            snapshot_of=disk.name,
        )
        try:
            server.add(export)
        except FleecerError:
            await graph.detach(edge)  # and with it what it led to
            raise
        part = SnapshotPart(disk.name, access.size, fleece, access, export)
        fleece.snapshot.on_broken = lambda snapshot: self._broken(name, part, snapshot)
        return part

    async def _withdraw(self, part: SnapshotPart) -> None:
        part.fleece.snapshot.on_broken = None
        await self._daemon.server.remove(part.export.export_id, hard=True)
        await self._daemon.graph.drain_and_detach(part.export.edge)
        await uncut(self._daemon.graph, part.fleece)

    def _broken(self, name: str, part: SnapshotPart, snapshot: Snapshot) -> None:
        _log.warning("snapshot %s is broken: %s", part.export.name, part.cause)
        self._daemon.events.announce("SNAPSHOT_BROKEN", {"name": name, "disk": part.disk, "cause": part.cause})
        task = asyncio.get_running_loop().create_task(self._release(part))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, part: SnapshotPart) -> None:
        try:
            await release_scratch(self._daemon.graph, part.fleece)
        except FleecerError as error:
            _log.warning("giving back the scratch of snapshot %s: %s", part.export.name, told(error))


def _image_directory(disk: str, node: Node) -> str:
    """Where the disk's image is: the place for its scratch unless another is named."""
    while node.children:
        node = node.children[0].node
    if isinstance(node, FileNode) and not node.storage.is_block_device:
        return os.path.dirname(os.path.realpath(node.storage.name))
    raise UsageError(f"disk {quoted(disk)} is no local image file, so name a place for its scratch: --scratch-dir")
