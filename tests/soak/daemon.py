"""The daemon under test: a process of `fleecer serve`, started, stopped, killed, and spoken to by QMP.

It runs in a mount namespace of its own, which needs no rights where the kernel lets users have namespaces: there a
small tmpfs lies over `tight/`, a scratch directory that fills up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import fleecer
from fleecer.app.rundir import NBD_SOCKET, QMP_SOCKET
from fleecer.cli.qmp_client import QmpClient
from fleecer.net.uri import unix_uri
from tests.soak.processes import send

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(Path(fleecer.__file__).parents[1]), str(Path(__file__).parents[2]))),
    "PYTHONWARNINGS": "error",
}
TIGHT_BYTES = 3 << 20
_START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
QMP_TIMEOUT_S = 60.0
_MOUNT = f'mount -t tmpfs -o size={TIGHT_BYTES} none "$0" && exec "$@"'


class UnexpectedError(Exception):
    """Something failed that must not."""


async def namespace_prefix(directory: Path) -> list[str]:
    """What to put before a command so that a small tmpfs lies over `directory` for it; [] where that is not allowed."""
    for namespaces in ("-Urm", "-m"):
        prefix = ["unshare", namespaces, "sh", "-c", _MOUNT, str(directory)]
        try:
            trial = await asyncio.create_subprocess_exec(*prefix, "true", stderr=asyncio.subprocess.DEVNULL)
        except FileNotFoundError:
            return []
        if await trial.wait() == 0:
            return prefix
    return []


class DaemonProcess:
    """One daemon at a time, started anew as often as one likes, always with the same images."""

    def __init__(self, directory: Path, images: list[str], prefix: list[str]) -> None:
        self.nbd_socket = str(directory / "run" / NBD_SOCKET)
        self.log = directory / "daemon.log"
        self._qmp_socket = str(directory / "run" / QMP_SOCKET)
        serve = [sys.executable, "-m", "fleecer", "serve", *images, "--run-dir", str(directory / "run")]
        self._command = [*prefix, *serve]
        self._disks = len(images)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The process; one must have been started."""
        assert self._process is not None
        return self._process

    def uri(self, export: str) -> str:
        """The URI of an export."""
        return unix_uri(self.nbd_socket, export)

    async def start(self) -> None:
        """Returns once every disk is served. Raises UnexpectedError with what the daemon said."""
        with self.log.open("ab") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                env=ENVIRONMENT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                for _ in range(self._disks):
                    if not await process.stdout.readline():
                        raise UnexpectedError(f"the daemon did not start:\n{self.last_words()}")
        except TimeoutError:
            raise UnexpectedError(f"the daemon was not ready after {_START_TIMEOUT_S:g} s") from None

    async def end(self, number: signal.Signals) -> int:
        """Sends a signal, and returns the exit status once the process is gone."""
        send(self.process, number)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await self.process.wait()
        except TimeoutError:
            raise UnexpectedError(f"the daemon was still there {STOP_TIMEOUT_S:g} s after {number.name}") from None

    async def destroy(self) -> None:
        """Makes sure that no process is left. Idempotent."""
        if self._process is not None:
            send(self._process, signal.SIGKILL)
            await self._process.wait()

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Runs a QMP command in a session of its own. Raises FleecerError as it comes, UnexpectedError for a hang."""

        def run() -> Any:
            with QmpClient(self._qmp_socket) as client:
                return client.execute(command, arguments)

        try:
            async with asyncio.timeout(QMP_TIMEOUT_S):
                return await asyncio.to_thread(run)
        except TimeoutError:
            raise UnexpectedError(f"{command}: no answer in {QMP_TIMEOUT_S:g} s") from None

    def last_words(self) -> str:
        """The end of what the daemon wrote to standard error."""
        return self.log.read_text(errors="replace")[-2000:]

    def resident_bytes(self) -> int:
        """The memory that the process holds; 0 if it is gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except OSError:
            return 0
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
