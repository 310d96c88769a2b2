"""A daemon with a monitor, and QMP clients of it over streams in memory: what the monitor's tests share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleecer.daemon import Daemon
from fleecer.errors import IoError
from fleecer.monitor import MonitorServer
from fleecer.net.nbd_client import ALLOCATION, NbdClient
from fleecer.storage.pool import running_pool
from fleecer.testing.streams import MemoryStream, memory_streams
from fleecer.units import KiB
from fleecer.wire import qmp
from tests.serving_world import turns


class QmpClient:
    """A client that says what a test says, and keeps what it hears, in order."""

    def __init__(self, stream: MemoryStream) -> None:
        self.stream = stream
        self.heard: list[dict[str, Any]] = []
        self.ended = False
        self._splitter = qmp.Splitter()
        self._room = memoryview(bytearray(64 * KiB))
        self._changed = asyncio.Event()
        self._serial = 0
        stream.begin(self)

    def receive_buffer(self) -> memoryview:
        return self._room

    def received(self, count: int) -> None:
        for document in self._splitter.feed(self._room[:count]):
            assert isinstance(document, bytes), f"the server sent what is no JSON: {document}"
            self.heard.append(json.loads(document))
        self._changed.set()

    def sent(self) -> None:
        pass

    def closed(self, error: IoError | None) -> None:
        self.ended = True
        self._changed.set()

    def say(self, text: str | bytes) -> None:
        """Sends bytes as they are."""
        self.stream.send([text.encode() if isinstance(text, str) else text])

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.ended, f"the session ended: {self.heard[-3:]}"
            self._changed.clear()
            await self._changed.wait()

    async def until_ended(self) -> None:
        while not self.ended:
            self._changed.clear()
            await self._changed.wait()

    async def message(self, at: int) -> dict[str, Any]:
        """The `at`th thing heard, from 0; the greeting is the first."""
        await self.until(lambda: len(self.heard) > at)
        return self.heard[at]

    async def ask(self, execute: str, **arguments: Any) -> dict[str, Any]:
        """The whole answer to a command; underscores in arguments stand for dashes."""
        self._serial += 1
        number = self._serial
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.say(json.dumps({"execute": execute, "arguments": given, "id": number}))
        await self.until(lambda: any(message.get("id") == number for message in self.heard))
        (answer,) = [message for message in self.heard if message.get("id") == number]
        return answer

    async def run(self, execute: str, **arguments: Any) -> Any:
        """What a command returns, which must succeed."""
        answer = await self.ask(execute, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    async def fail(self, execute: str, **arguments: Any) -> str:
        """The text of the error of a command, which must fail."""
        answer = await self.ask(execute, **arguments)
        assert "error" in answer, answer
        assert "\n" not in answer["error"]["desc"]
        return str(answer["error"]["desc"])

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The data of the events heard so far, of one name or all."""
        return [m["data"] for m in self.heard if "event" in m and name in (None, m["event"])]

    def statuses(self, job_id: str) -> list[str]:
        return [data["status"] for data in self.events("JOB_STATUS_CHANGE") if data["id"] == job_id]


class Monitored:
    """A daemon and its monitor; `directory` is where its images are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemon = Daemon(raise_internal_errors=True)
        self.quits = 0
        self.monitor = MonitorServer(self.daemon, self._quit)
        self.internal_errors: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.internal_errors.append(context))

    def _quit(self) -> None:
        self.quits += 1

    def raw_client(self, *, piece_bytes: int = 1 << 30, buffer_bytes: int = 64 * KiB) -> QmpClient:
        """A client that has not negotiated."""
        ours, theirs = memory_streams(piece_bytes=piece_bytes, buffer_bytes=buffer_bytes)
        self.server_stream = theirs
        self.monitor.serve(theirs)
        return QmpClient(ours)

    async def client(self, **more: int) -> QmpClient:
        """A client that may give commands."""
        client = self.raw_client(**more)
        assert await client.run("qmp_capabilities") == {}
        return client

    async def nbd(self, name: str, *, contexts: tuple[str, ...] = (ALLOCATION,)) -> NbdClient:
        """An NBD client of an export."""
        ours, theirs = memory_streams()
        self.daemon.server.serve(theirs)
        return await NbdClient.connect(ours, name, contexts=contexts)

    async def close(self) -> None:
        """Ends it all, and checks that nothing is left and nothing went wrong unseen."""
        self.monitor.refuse()
        await self.daemon.close()
        await self.monitor.close()
        await turns()
        assert not self.daemon.graph.nodes()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks were left: {left}"
        await running_pool().close()
        assert not self.internal_errors, self.internal_errors
