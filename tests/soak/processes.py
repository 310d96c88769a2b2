"""Signals for processes that asyncio watches."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal


def send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended by itself; then nothing happens.

    asyncio's own `send_signal`, `kill` and `terminate` ask whether the process still runs, in a way that takes its
    status out of the kernel's hands. Where it has just ended, the watcher then finds no such child, and tells of
    status 255 whatever it was.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
