"""Jobs: their states, as QEMU names them, their progress, and the table of all.

    created -> running -> waiting -> pending -> concluded -> null        a job that succeeds
    created -> running -> aborting -> concluded -> null                  one that fails or is cancelled

Invariants: a state change is announced once, in order; a concluded job holds nothing of the graph, but for what waits
for requests that do not end; a job is dropped from the table when it is dismissed, or at once where `auto_dismiss` says
so.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fleecer.errors import FleecerError, JobError, NotFound, UsageError, quoted, told

_log = logging.getLogger(__name__)

Announce = Callable[[str, dict[str, Any]], None]
"""Takes an event's name and data."""


class Job(abc.ABC):
    """One job. A subclass does the work in `_work` and gives the graph back in `_clean_up`.

    `progress_current` of `progress_total` is in bytes; both may grow. `error` is what made it fail, "" otherwise.
    """

    kind = ""

    def __init__(self, job_id: str, announce: Announce, *, auto_dismiss: bool = True) -> None:
        self.job_id = job_id
        self.auto_dismiss = auto_dismiss
        self.state = "created"
        self.progress_current = 0
        self.progress_total = 0
        self.error = ""
        self.cancelled = False
        self._announce = announce
        self._task: asyncio.Task[None] | None = None
        self._table: JobTable | None = None

    @abc.abstractmethod
    async def _work(self) -> None:
        """Does it. Returns when it is done, or soon after `cancelled` was set. Raises FleecerError if it fails."""

    @abc.abstractmethod
    async def _clean_up(self) -> None:
        """Gives back all that the job holds. Runs once, whatever happened."""

    @abc.abstractmethod
    def _wake(self) -> None:
        """Makes `_work` notice `cancelled`."""

    def start(self, table: JobTable) -> None:
        """Enters the table and runs in a task of its own."""
        self._table = table
        table.add(self)
        self._enter("created")
        self._enter("running")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def cancel(self) -> None:
        """Ends the job early and returns when it has concluded. Raises JobError if it has already."""
        if self.state in ("concluded", "null"):
            raise JobError(f"job {quoted(self.job_id)} has concluded; it can only be dismissed")
        self.ask_to_cancel()
        await self.concluded()

    def ask_to_cancel(self) -> None:
        """As `cancel`, without waiting."""
        self.cancelled = True
        self._wake()

    async def concluded(self) -> None:
        """Returns when the job has ended, one way or the other."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _run(self) -> None:
        await self._try(self._work)
        cancelled = self.cancelled  # from now on it is too late for that
        for state in ("aborting",) if cancelled or self.error else ("waiting", "pending"):
            self._enter(state)
        await self._try(self._clean_up)
        self._announce_end(cancelled)
        self._enter("concluded")
        if self.auto_dismiss and self._table is not None:
            self._table.dismiss(self.job_id)

    async def _try(self, step: Callable[[], Awaitable[None]]) -> None:
        """Takes a step, and notes its failure unless one was noted before."""
        try:
            await step()
        except Exception as error:  # noqa: BLE001 - a bug must not leave the job running for ever; it is logged
            if not isinstance(error, FleecerError):
                _log.exception("job %s failed in a way it must not", self.job_id)
            self.error = self.error or told(error)

    def _announce_end(self, cancelled: bool) -> None:
        data = {
            "device": self.job_id,
            "type": self.kind,
            "len": self.progress_total,
            "offset": self.progress_current,
            "speed": 0,
        }
        if cancelled:
            self._announce("BLOCK_JOB_CANCELLED", data)
        else:
            self._announce("BLOCK_JOB_COMPLETED", data | ({"error": self.error} if self.error else {}))

    def _enter(self, state: str) -> None:
        self.state = state
        self._announce("JOB_STATUS_CHANGE", {"id": self.job_id, "status": state})


class JobTable:
    """The jobs of one daemon, by id."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def jobs(self) -> list[Job]:
        """Every job, in the order they were started."""
        return list(self._jobs.values())

    def find(self, job_id: str) -> Job:
        """The job of that id. Raises NotFound."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound("job", job_id) from None

    def check_free(self, job_id: str) -> None:
        """Raises UsageError if the id is taken."""
        if job_id in self._jobs:
            raise UsageError(f"job id {quoted(job_id)} is taken; choose another, or dismiss that job")

    def add(self, job: Job) -> None:
        """Enters a job. Raises UsageError if its id is taken."""
        self.check_free(job.job_id)
        self._jobs[job.job_id] = job

    def dismiss(self, job_id: str) -> None:
        """Forgets a concluded job. Raises NotFound, or JobError while it has not concluded."""
        job = self.find(job_id)
        if job.state != "concluded":
            raise JobError(f"job {quoted(job_id)} is {job.state}; it can be dismissed once it has concluded")
        job._enter("null")  # noqa: SLF001 - the table is the other half of a job
        del self._jobs[job_id]

    async def cancel_all(self) -> None:
        """Ends every job: for shutting down."""
        for job in self.jobs():
            if job.state not in ("concluded", "null"):
                job.ask_to_cancel()
        for job in self.jobs():
            await job.concluded()
