"""The backup job: keeps or copies the past of a disk in a target node (QEMU's blockdev-backup).

    sync=none   copies only what is about to be overwritten, until cancelled: the target, whose backing is the disk,
                reads as the disk was when the job started (the first fleecing scheme)
    sync=full   the same, and copies all the rest besides; done when the target holds the whole disk of that instant

Jobs started together share one instant. Where the disk is in the target's backing chain, the target answers reads only
while the job is whole: afterwards it would show the disk's present, so it gives errors instead, unless it has got the
whole disk.

A target that does not answer holds up neither a cancel nor the end of a job: what is in flight on it is left to end by
itself, and the target cannot be removed before.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Literal

from fleecer.block.copier import TIMEOUT_S, OnError, Snapshot
from fleecer.block.fleecing import Fleece, Plan, cut, uncut
from fleecer.block.graph import LEAVE_TIMEOUT_S, Graph
from fleecer.block.node import ZERO, Node
from fleecer.errors import UsageError, quoted
from fleecer.jobs.job import Announce, Job, JobTable
from fleecer.units import MiB

_STEP_BYTES = 1 * MiB
_STEPS_AT_ONCE = 4


@dataclasses.dataclass(slots=True)
class BackupRequest:
    """What one backup is asked for. `fresh` says that the target was never written and reads as zeroes.

    `cluster_size_bytes` is the unit of copying, or that of the target, if it is larger; None leaves it to what disk and
    target are (see `Plan`).
    """

    job_id: str
    device: Node
    target: Node
    sync: Literal["none", "full"]
    filter_name: str | None = None
    on_error: OnError = "break-snapshot"
    timeout_s: float = TIMEOUT_S
    auto_dismiss: bool = True
    fresh: bool = False
    cluster_size_bytes: int | None = None


class BackupJob(Job):
    """One running backup. Made by `start_backups`."""

    kind = "backup"

    def __init__(self, request: BackupRequest, graph: Graph, fleece: Fleece, announce: Announce) -> None:
        super().__init__(request.job_id, announce, auto_dismiss=request.auto_dismiss)
        self.fleece = fleece
        self.sync = request.sync
        self._graph = graph
        self._complete = False
        self._failure: Exception | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.progress_total = request.device.size
        fleece.snapshot.on_broken = self._broken

    def _broken(self, _snapshot: Snapshot) -> None:
        self._wake()

    def _wake(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    async def _work(self) -> None:
        snapshot = self.fleece.snapshot
        if self.sync == "none":
            await self._over
            snapshot.check()
            return
        await self._while_wanted(self._copy_all())
        await self._while_wanted(snapshot.scratch.flush())
        self._complete = not self._over.done()

    async def _while_wanted(self, work: Coroutine[Any, Any, None]) -> None:
        """Returns when `work` is done, or as soon as the job is over: what is under way then is left to itself.

        Raises what made the job fail. Does nothing where it is over already.
        """
        if not self._over.done():
            task = self._graph.keep(self._noting_failure(work))
            await asyncio.wait({task, self._over}, return_when=asyncio.FIRST_COMPLETED)
        else:
            work.close()
        if self.cancelled:
            return
        self.fleece.snapshot.check()
        if self._failure is not None:
            raise self._failure

    async def _noting_failure(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the first is raised in `_while_wanted`, and ends the job
            self._failure = self._failure or error
            self._wake()

    async def _copy_all(self) -> None:
        """Copies whatever no write has caused to be copied yet, a few steps at a time, until the job is over."""
        starts = iter(range(0, self.progress_total, _STEP_BYTES))
        await asyncio.gather(*(self._noting_failure(self._copy_steps(starts)) for _ in range(_STEPS_AT_ONCE)))

    async def _copy_steps(self, starts: Iterator[int]) -> None:
        copier = self.fleece.copier
        for start in starts:
            if self._over.done():
                return
            length = min(_STEP_BYTES, self.progress_total - start)
            position = start
            for extent in await copier.source.block_status(start, length):
                if extent.flags & ZERO:
                    copier.settle_zeroes(position, extent.length)
                position += extent.length
            await copier.copy(start, length)
            if not self._over.done():
                self.progress_current += length

    async def _clean_up(self) -> None:
        snapshot = self.fleece.snapshot
        snapshot.on_broken = None
        if snapshot.serialising and self._complete:
            self.fleece.check_reads_by(_whole)
        elif snapshot.serialising:
            self.fleece.copier.break_snapshot(snapshot, f"fleecing job {quoted(self.job_id)} has ended")
        await uncut(self._graph, self.fleece, leave_timeout_s=LEAVE_TIMEOUT_S)


def _whole() -> None:
    """The check of a target that has the whole disk: nothing that happens to the disk makes it untrue any more."""


def _check_ids(table: JobTable, requests: Sequence[BackupRequest]) -> None:
    ids = [request.job_id for request in requests]
    for job_id in ids:
        table.check_free(job_id)
        if ids.count(job_id) > 1:
            raise UsageError(f"job id {quoted(job_id)} is used twice; choose another")


async def start_backups(
    graph: Graph, table: JobTable, requests: Sequence[BackupRequest], announce: Announce
) -> list[BackupJob]:
    """Starts every backup asked for, all of the same instant. Raises, with nothing changed, if one cannot be.

    Being cancelled leaves nothing behind either, or else every job running.
    """
    _check_ids(table, requests)
    plans: list[Plan] = []
    try:
        for request in requests:
            label = f"job {quoted(request.job_id)}"
            scratch = graph.attach(request.target, label, "target", writable=True, shares_write=False)
            plans.append(
                Plan(
                    request.device,
                    scratch,
                    request.job_id,
                    fresh=request.fresh,
                    filter_name=request.filter_name,
                    on_error=request.on_error,
                    timeout_s=request.timeout_s,
                    cluster_size_bytes=request.cluster_size_bytes,
                )
            )
        fleeces = await cut(graph, plans)
    except BaseException:
        for plan in plans:
            graph.let_go(plan.scratch)
        raise
    try:
        _check_ids(table, requests)  # somebody may have taken one while we waited for the disks
    except UsageError as error:
        for fleece in fleeces:
            fleece.copier.break_snapshot(fleece.snapshot, str(error))
        for fleece in fleeces:  # broken before anything was copied, so the targets are as they were
            fleece.check_reads_by(None)
        await asyncio.gather(*(uncut(graph, fleece, leave_timeout_s=LEAVE_TIMEOUT_S) for fleece in fleeces))
        raise
    jobs = [BackupJob(request, graph, fleece, announce) for request, fleece in zip(requests, fleeces, strict=True)]
    for job in jobs:
        job.start(table)
    return jobs
