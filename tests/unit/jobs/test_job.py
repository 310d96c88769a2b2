"""Jobs: their states in order, how they are ended, and the table."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.serving_world import turns

from fleecer.errors import IoError, JobError, NotFound, UsageError
from fleecer.jobs import Job, JobTable


class Scripted(Job):
    """A job that does what a test says."""

    kind = "test"

    def __init__(self, job_id: str, **more: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        super().__init__(job_id, lambda name, data: self.events.append((name, data)), **more)
        self.go = asyncio.Event()
        self.cleaned = 0
        self.on_work: Callable[[], None] = lambda: None
        self.on_clean_up: Callable[[], Awaitable[None]] | None = None

    async def _work(self) -> None:
        await self.go.wait()
        self.on_work()

    async def _clean_up(self) -> None:
        self.cleaned += 1
        if self.on_clean_up is not None:
            await self.on_clean_up()

    def _wake(self) -> None:
        self.go.set()

    def statuses(self) -> list[str]:
        return [data["status"] for name, data in self.events if name == "JOB_STATUS_CHANGE"]

    def endings(self) -> list[tuple[str, str | None]]:
        return [(name, data.get("error")) for name, data in self.events if name != "JOB_STATUS_CHANGE"]


def fail() -> None:
    raise IoError(5, "disk", "read", 0, 512)


def bug() -> None:
    raise ZeroDivisionError("division by zero")


async def test_a_job_that_succeeds_goes_through_its_states_in_order() -> None:
    table, job = JobTable(), Scripted("one")
    job.start(table)
    assert table.find("one") is job
    assert table.jobs() == [job]
    await turns()
    assert job.state == "running"
    job.go.set()
    await job.concluded()
    assert job.statuses() == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert job.endings() == [("BLOCK_JOB_COMPLETED", None)]
    assert job.events[-3][0] == "BLOCK_JOB_COMPLETED", "the end is told before the job has concluded"
    assert not table.jobs()
    assert job.cleaned == 1


async def test_a_job_that_fails_tells_why() -> None:
    table, job = JobTable(), Scripted("one", auto_dismiss=False)
    job.on_work = fail
    job.start(table)
    job.go.set()
    await job.concluded()
    assert job.statuses() == ["created", "running", "aborting", "concluded"]
    assert job.endings() == [("BLOCK_JOB_COMPLETED", "read of 512 bytes at 0 on 'disk': Input/output error")]
    assert job.cleaned == 1


async def test_a_cancelled_job_concludes_before_cancel_returns() -> None:
    table, job = JobTable(), Scripted("one", auto_dismiss=False)
    job.start(table)
    await job.cancel()
    assert job.statuses() == ["created", "running", "aborting", "concluded"]
    assert job.endings() == [("BLOCK_JOB_CANCELLED", None)]
    with pytest.raises(JobError, match=r"^job 'one' has concluded; it can only be dismissed$"):
        await job.cancel()
    table.dismiss("one")
    assert job.statuses()[-1] == "null"
    with pytest.raises(NotFound, match=r"^job 'one' does not exist$"):
        table.dismiss("one")


async def test_a_job_that_has_succeeded_cannot_be_cancelled_while_it_cleans_up() -> None:
    table, job = JobTable(), Scripted("one", auto_dismiss=False)
    cleaning, clean = asyncio.Event(), asyncio.Event()

    async def clean_up() -> None:
        cleaning.set()
        await clean.wait()

    job.on_clean_up = clean_up
    job.start(table)
    job.go.set()
    await cleaning.wait()
    job.ask_to_cancel()
    clean.set()
    await job.concluded()
    assert job.statuses() == ["created", "running", "waiting", "pending", "concluded"]
    assert job.endings() == [("BLOCK_JOB_COMPLETED", None)]


@pytest.mark.parametrize("where", ["work", "clean up"])
async def test_a_bug_in_a_job_ends_it_and_is_logged(where: str, caplog: pytest.LogCaptureFixture) -> None:
    table, job = JobTable(), Scripted("one", auto_dismiss=False)

    async def clean_up() -> None:
        bug()

    if where == "work":
        job.on_work = bug
    else:
        job.on_clean_up = clean_up
    job.start(table)
    job.go.set()
    await job.concluded()
    assert job.state == "concluded"
    assert job.error == "division by zero"
    assert job.cleaned == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_the_first_failure_is_the_one_that_is_told() -> None:
    table, job = JobTable(), Scripted("one", auto_dismiss=False)

    async def clean_up() -> None:
        raise IoError(28, "target", "close")

    job.on_work, job.on_clean_up = fail, clean_up
    job.start(table)
    job.go.set()
    await job.concluded()
    assert "Input/output error" in job.error


async def test_the_table_keeps_ids_apart_and_jobs_until_they_have_concluded() -> None:
    table, job = JobTable(), Scripted("one", auto_dismiss=False)
    job.start(table)
    with pytest.raises(UsageError, match=r"^job id 'one' is taken; choose another, or dismiss that job$"):
        Scripted("one").start(table)
    with pytest.raises(JobError, match=r"^job 'one' is running; it can be dismissed once it has concluded$"):
        table.dismiss("one")
    await table.cancel_all()
    assert job.state == "concluded"
    await table.cancel_all()
