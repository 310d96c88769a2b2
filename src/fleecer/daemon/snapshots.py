"""Snapshots of served disks: N disks, one instant, all or none; each read over NBD as the export DISK@SNAPSHOT.

A snapshot keeps its old data in one unlinked file per disk, beside the image or in a directory that is named: a crash
leaves nothing behind. A disk's snapshots share one filter and one copy of what is overwritten.

Invariants:
- A snapshot is there whole or not at all. What fails half-way, or is cancelled, is undone; nothing is awaited between
  the cut and the moment when it is there. Once begun, an end goes on, also if whoever asked for it is gone.
- Makers and enders wait for nobody but the graph's drains, which are bounded: a scratch or a reader that never answers
  holds up no other snapshot. What has to wait for such is done in tasks of its own, and given up by nobody.
- A name is taken from the moment it is asked for until the last export under it is gone.
- The moment told as `created` is read in the step that makes the cut.
- Readers' requests in flight end before their snapshot does, if they do within `READERS_TIMEOUT_S`; else they get
  errors.
- A snapshot that breaks gives its scratch back at once, keeps its cause for whoever asks, and is announced.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import errno
import logging
import re
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fleecer.block.copier import TIMEOUT_S, OnError, Snapshot
from fleecer.block.fleecing import CUT_TIMEOUT_S, Fleece, Plan, cut, release_scratch, uncut
from fleecer.block.graph import LEAVE_TIMEOUT_S, SNAPSHOT_ROLE
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.daemon.scratches import Scratches
from fleecer.errors import FleecerError, IoError, NotFound, UsageError, quoted
from fleecer.export import Export
from fleecer.storage.api import Storage
from fleecer.storage.file import FileStorage

if TYPE_CHECKING:
    from fleecer.block.edge import Edge
    from fleecer.daemon.daemon import Daemon

PRESERVED_CONTEXT = "fleecer:preserved"
"""Metadata context of a snapshot's export: flag 1 where the old data is in its scratch, 0 where still on the disk."""

READERS_TIMEOUT_S = 10.0
"""How long the end of a snapshot waits for its readers' requests in flight, and that of the daemon for its makers."""

T = TypeVar("T")

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
        """Old data kept for it; a later one may hold more that it reads. See `Copier.preserved_bytes`."""
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
        self._names: set[str] = set()  # also those of snapshots being made, or being ended
        self._making: set[asyncio.Future[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._kept: set[asyncio.Future[Any]] = set()
        self._refusing = False
        self._scratches = Scratches(daemon.disks, self._watch, self._keep)

    def keep_scratches_ready(self) -> None:
        """Has scratches opened before a snapshot needs them: for who serves disks for long. See `Scratches`."""
        self._scratches.keep_ready()

    def forget_disk(self, disk: Export) -> None:
        """A disk is no longer served; nothing that was opened for it stays open."""
        self._scratches.forget(disk)

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
        drain_timeout_s: float = CUT_TIMEOUT_S,
        cluster_size_bytes: int | None = None,
    ) -> SnapshotSet:
        """Cuts the disks named (default: all that are served) at one instant, and exports each.

        `on_error` and `copy_timeout_s` are this snapshot's own; the unit of copying is shared by all of a disk. While
        the disks come to rest, their requests wait behind the slowest in flight, `drain_timeout_s` at most.

        Raises before anything is changed, or after undoing it: NotFound or UsageError for names or a cluster size,
        IoError where a scratch cannot be made or a disk does not come to rest. Being cancelled undoes it too.
        """
        name = self._free_name(name)
        exports = self._disks(disks)
        self._names.add(name)
        made = asyncio.get_running_loop().create_future()
        self._making.add(made)
        storages: dict[Export, FileStorage] = {}
        scratches: list[Edge] = []
        self._daemon.server.make_way()
        try:
            storages = await self._scratches.open(exports, scratch_directory)
            for export in exports:
                scratches.append(self._attach_scratch(export, name, storages[export]))
                del storages[export]
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
            fleeces = await self._cut(plans, drain_timeout_s)
            scratches.clear()
            # Nothing is awaited from here on, unless it fails.
            taken = SnapshotSet(name, datetime.datetime.now(datetime.UTC), [])
            await self._publish_all(taken, exports, fleeces)
            self._sets[name] = taken
        finally:
            for storage in storages.values():
                self._keep(storage.close())
            for scratch in scratches:
                self._daemon.graph.let_go(scratch)
            if name not in self._sets:
                self._names.discard(name)
            self._making.discard(made)
            made.set_result(None)
        return taken

    async def _cut(self, plans: list[Plan], timeout_s: float) -> list[Fleece]:
        try:
            return await cut(self._daemon.graph, plans, timeout_s=timeout_s)
        except IoError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            detail = f"{error.detail}, so no snapshot was taken; try again, or allow it more by drain-timeout"
            raise IoError(error.errno, error.node, error.operation, detail=detail) from error

    async def _publish_all(self, taken: SnapshotSet, exports: list[Export], fleeces: list[Fleece]) -> None:
        """Makes the parts of a snapshot. Takes the whole cut back if one cannot be; only then it waits."""
        try:
            if self._refusing:
                raise UsageError("the daemon is shutting down; no snapshot is taken any more")
            for export, fleece in zip(exports, fleeces, strict=True):
                taken.parts.append(self._publish(export, taken.name, fleece))
        except FleecerError:
            rest = fleeces[len(taken.parts) :]
            ends = [self._keep(self._withdraw(part)) for part in taken.parts]
            ends += [self._keep(uncut(self._daemon.graph, one, leave_timeout_s=LEAVE_TIMEOUT_S)) for one in rest]
            await asyncio.shield(asyncio.gather(*ends, return_exceptions=True))
            raise

    async def delete(self, name: str) -> None:
        """Ends a snapshot: its readers' requests in flight end, they are cut off, its scratch is given back.

        Raises NotFound, or what kept a filter in place (the snapshot is gone all the same). A scratch or a reader that
        does not answer is waited for within bounds; see `READERS_TIMEOUT_S` and `fleecing.uncut`.
        """
        await asyncio.shield(self._end(self.find(name)))

    async def delete_all(self) -> None:
        """Ends every snapshot, also one being made, and gives the scratches of broken ones back: for shutting down.

        Raises the first failure after all has been tried. What does not answer is waited for within bounds.
        """
        if self._making:
            await asyncio.wait(self._making, timeout=READERS_TIMEOUT_S)
        self._refusing = True
        self._scratches.close()
        under_way = list(self._ending)
        ends = [self._end(taken) for taken in self.sets()]
        outcomes = await asyncio.gather(*ends, return_exceptions=True)
        await asyncio.gather(*under_way, return_exceptions=True)  # whoever asked for those hears of them
        if self._kept:
            await asyncio.wait(self._kept, timeout=LEAVE_TIMEOUT_S)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _end(self, taken: SnapshotSet) -> asyncio.Task[None]:
        del self._sets[taken.name]
        task = self._keep(self._withdraw_all(taken))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def _withdraw_all(self, taken: SnapshotSet) -> None:
        ends = [self._keep(self._withdraw(part)) for part in taken.parts]
        outcomes = await asyncio.gather(*ends, return_exceptions=True)
        self._names.discard(taken.name)
        self._daemon.events.announce("SNAPSHOT_DELETED", {"name": taken.name})
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs `work` in a task of its own, which ends whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(work)
        self._watch(task)
        return task

    def _watch(self, work: asyncio.Future[T]) -> asyncio.Future[T]:
        """Shutting down waits for it, within bounds."""
        self._kept.add(work)
        work.add_done_callback(self._kept.discard)
        return work

    def _free_name(self, name: str | None) -> str:
        if name is None:
            stem = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
            serial = 1
            name = stem
            while name in self._names:
                serial += 1
                name = f"{stem}-{serial}"
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"snapshot name {quoted(name)} must be up to 128 letters, digits and . _ : + -, and begin "
                "with a letter or digit"
            )
        if name in self._names:
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

    def _attach_scratch(self, export: Export, snapshot: str, storage: Storage) -> Edge:
        """Raises with the storage still the caller's."""
        graph = self._daemon.graph
        scratch = FileNode(graph.fresh_name(), storage)
        graph.add(scratch, named=False)
        return graph.attach(scratch, f"snapshot {quoted(snapshot)} of {export.name}", "scratch", writable=True)

    def _publish(self, disk: Export, name: str, fleece: Fleece) -> SnapshotPart:
        graph, server = self._daemon.graph, self._daemon.server
        label = f"{disk.name}@{name}"
        server.check_free(label, label)
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
            graph.let_go(edge)  # and with it what it led to
            raise
        part = SnapshotPart(disk.name, access.size, fleece, access, export)
        fleece.snapshot.on_broken = lambda snapshot: self._broken(name, part, snapshot)
        return part

    async def _withdraw(self, part: SnapshotPart) -> None:
        """Ends one disk's part: first its readers, then the snapshot, last what was used for it."""
        graph, name = self._daemon.graph, part.export.name
        part.fleece.snapshot.on_broken = None
        cutting_off = self._keep(self._cut_off(part.export))
        if not await graph.left([cutting_off], timeout_s=READERS_TIMEOUT_S):
            _log.warning("snapshot %s ends while its readers wait: they get errors", name)
        reading = graph.let_go(part.export.edge)
        await uncut(graph, part.fleece, leave_timeout_s=LEAVE_TIMEOUT_S)
        await graph.left([reading], timeout_s=LEAVE_TIMEOUT_S)

    async def _cut_off(self, export: Export) -> None:
        await self._daemon.server.remove(export.export_id, hard=True)

    def _broken(self, name: str, part: SnapshotPart, snapshot: Snapshot) -> None:
        _log.warning("snapshot %s is broken: %s", part.export.name, part.cause)
        self._daemon.events.announce("SNAPSHOT_BROKEN", {"name": name, "disk": part.disk, "cause": part.cause})
        self._keep(release_scratch(self._daemon.graph, part.fleece))
