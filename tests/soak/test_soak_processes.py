"""Signals for processes that asyncio watches."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from tests.soak.processes import send


@pytest.fixture
async def event_loop_watches() -> AsyncIterator[None]:
    """Children are watched by the event loop, so that none is waited for before the test awaits."""
    if sys.version_info >= (3, 12):
        yield  # by default, as the kernel has pidfds
        return
    policy = asyncio.get_event_loop_policy()
    before = policy.get_child_watcher()
    watcher = asyncio.PidfdChildWatcher()
    watcher.attach_loop(asyncio.get_running_loop())
    policy.set_child_watcher(watcher)
    yield
    policy.set_child_watcher(before)


@pytest.mark.usefixtures("event_loop_watches")
async def test_a_signal_to_a_process_that_has_just_ended_leaves_its_status_alone() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(3)")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.returncode is None, "the event loop knows already: nothing is tried here"
    send(process, signal.SIGSTOP)
    assert await process.wait() == 3
    send(process, signal.SIGSTOP)


async def test_a_signal_reaches_a_process_that_runs() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    with contextlib.closing(process._transport):  # type: ignore[attr-defined]
        send(process, signal.SIGTERM)
        assert await process.wait() == -signal.SIGTERM
