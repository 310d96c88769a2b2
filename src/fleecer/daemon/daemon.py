"""The daemon's parts, put together: open images, export them, cut snapshots, run jobs, shut down in order.

This is also the programming interface of `import fleecer`: everything a monitor can do is a method here or on a part.

Invariants: on return of `close` every request that was in flight has ended, all that was written is durable, and no
descriptor, lock, task or socket is left; except for scratches and backup targets that do not answer, which a warning
names. What fails leaves the daemon as it was.
"""

from __future__ import annotations

import asyncio
import os
import types
from collections.abc import Awaitable, Mapping, Sequence
from typing import Literal, Self

from fleecer import eager
from fleecer.block import options as opt
from fleecer.block.graph import LEAVE_TIMEOUT_S, Graph
from fleecer.block.node import Node
from fleecer.block.opener import Opener
from fleecer.daemon.events import Events
from fleecer.daemon.problems import Problems
from fleecer.daemon.snapshots import Snapshots
from fleecer.errors import FleecerError, InUse, UsageError, quoted
from fleecer.export import Export, Server
from fleecer.jobs import BackupJob, BackupRequest, JobTable, start_backups

Format = Literal["raw", "qcow2"]

ENDINGS: dict[str, Format] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}
"""Endings of file names that tell the format."""


def format_of(path: str, *, option: str = "--format") -> Format:
    """The format that an image's ending tells; contents are never looked at.

    Raises UsageError where it tells none, with the `option` that would.
    """
    try:
        return ENDINGS[os.path.splitext(path)[1].lower()]
    except KeyError:
        raise UsageError(
            f"image {quoted(path)}: format not given, and its ending tells none; refusing to guess, because a guest "
            f"can forge a header. Use {option} raw or {option} qcow2"
        ) from None


class Daemon:
    """One set of disks and all that is done with them. An async context manager: leaving it closes it.

    `allow_backing` names directories in which backing files may lie, beside that of the image that names them.
    """

    def __init__(self, *, allow_backing: Sequence[str] = (), raise_internal_errors: bool = False) -> None:
        self.events = Events()
        self.graph = Graph()
        self.opener = Opener(self.graph, allow_backing=allow_backing)
        self.server = Server(raise_internal_errors=raise_internal_errors)
        self.jobs = JobTable()
        self.snapshots = Snapshots(self)
        self.problems = Problems(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        await self.close()

    async def serve_image(
        self, name: str, path: str, *, format: Format | None = None, read_only: bool = False
    ) -> Export:
        """Opens an image and exports it under `name`. The format is told by the ending unless given, never guessed.

        Raises FormatError, IoError, PermissionConflict (another process holds it), UsageError; nothing is left open.
        """
        kind = format or format_of(path)
        file = opt.FileOptions(filename=path, read_only=read_only)
        options: opt.BlockdevOptions
        if kind == "qcow2":
            options = opt.Qcow2Options(node_name=name, file=file, read_only=read_only)
        else:
            options = opt.RawOptions(node_name=name, file=file, read_only=read_only)
        self.server.check_free(name, name)
        node = await self.opener.add(options)
        try:
            return self.export(node, name, writable=not read_only)
        except FleecerError:
            await self.graph.remove(name)
            raise

    async def open(self, options: Mapping[str, object] | opt.BlockdevOptions) -> Node:
        """Opens a node from the options of `blockdev-add`: a mapping as in JSON, or typed. It needs a "node-name".

        Raises UsageError that names the option at fault, or what kept the node from being opened; nothing is left then.
        """
        typed = opt.parse_options(options) if isinstance(options, Mapping) else options
        return await self.opener.add(typed)

    async def start_backups(self, requests: Sequence[BackupRequest]) -> list[BackupJob]:
        """Starts backup jobs, all of the same instant, or none; see fleecer.jobs.backup."""
        self.server.make_way()
        return await start_backups(self.graph, self.jobs, requests, self.events.announce)

    def export(
        self, node: Node, name: str, *, export_id: str | None = None, writable: bool = False, description: str = ""
    ) -> Export:
        """Offers a node to NBD clients. A node that a filter protects is reached through the filter.

        Raises UsageError if name or id is taken or unfit, PermissionConflict if the node may not be written to.
        """
        export_id = export_id or name
        self.server.check_free(export_id, name)
        edge = self.graph.attach(self.graph.top(node), f"export {quoted(name)}", "nbd", writable=writable)
        export = Export(export_id, name, edge, description=description)
        try:
            self.server.add(export)
        except FleecerError:
            self.graph.forget(edge)
            raise
        self.problems.watch(export)
        return export

    async def remove_export(self, export_id: str, *, hard: bool = False) -> None:
        """Withdraws an export; see `Server.remove`. What was written through it is flushed. Announced when done.

        Raises InUse for a snapshot's export, which goes with its snapshot.
        """
        if self.server.export(export_id).snapshot_of:
            raise InUse(f"export {quoted(export_id)} belongs to a snapshot and goes with it; delete the snapshot")
        export = await self.server.remove(export_id, hard=hard)
        try:
            if export.edge.writable:
                await export.edge.flush()
        finally:
            self.problems.forget(export)
            self.snapshots.forget_disk(export)
            await self.graph.drain_and_detach(export.edge)
            self.events.announce("BLOCK_EXPORT_DELETED", {"id": export_id})

    def disks(self) -> list[Export]:
        """The exports that are disks, not snapshots of disks."""
        return [export for export in self.server.exports() if not export.snapshot_of]

    async def close(self) -> None:
        """Refuses new requests, ends those in flight, ends jobs and snapshots, flushes and closes every node.

        A disk's requests are waited for whatever they take; those of scratches and backup targets, and of whoever reads
        them, within bounds. Raises the first failure after all has been tried.
        """
        failures: list[FleecerError] = []
        stopping = await self._stop_serving()
        exports = [export.export_id for export in self.disks()]
        steps: list[Awaitable[None]] = [
            self.jobs.cancel_all(),
            self.snapshots.delete_all(),
            *(self.remove_export(export_id) for export_id in exports),
            self._flush_all(),
            self.graph.close(),
        ]
        for step in steps:
            try:
                await step
            except FleecerError as error:
                failures.append(error)
        await self.graph.left([stopping], timeout_s=LEAVE_TIMEOUT_S)
        if failures:
            raise failures[0]

    async def _stop_serving(self) -> asyncio.Task[None] | None:
        """Takes no new client and no new request. Returns once the disks' have ended, with what waits for all others.

        A reader of a snapshot may never end, where the scratch does not answer: to end the snapshot cuts it off.
        """
        stopping = eager.start(self.server.stop())
        clients = [client for client in self.server.clients() if client.export is None or not client.export.snapshot_of]
        await asyncio.gather(*(client.stop() for client in clients))
        return stopping

    async def _flush_all(self) -> None:
        """Flushes every node, also those written to otherwise than by an export. Raises the first failure.

        What still has requests in flight is a scratch or target that does not answer: to flush it would not end.
        """
        failures: list[FleecerError] = []
        for node in self.graph.nodes():
            if not node.read_only and not any(edge.busy for edge in self.graph.parents(node)):
                try:
                    await node.flush()
                except FleecerError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
