"""QMP served over unix sockets: sessions, one command after the other in each, events to all.

Invariants:
- What is no command is answered with an error in its turn, and the session goes on, whatever was sent.
- Nothing but qmp_capabilities is taken before it was given; commands of one session run in the order they came.
- Only processes of this user, or root, get a session, whatever the socket's mode.
- A client that does not read is cut off when `QUEUED_BYTES_MAX` wait for it, and delays the end of its session by no
  more than `CLOSE_GRACE_S`.
- What a client's connection holds (temporary snapshots) goes when the connection does.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable
from typing import Any

from fleecer.daemon import Daemon
from fleecer.errors import FleecerError, IoError, told
from fleecer.monitor import commands
from fleecer.monitor.registry import Context, execute
from fleecer.net.listen import Listener, listen_unix
from fleecer.net.stream import Stream
from fleecer.units import KiB, MiB
from fleecer.wire import qmp

QUEUED_BYTES_MAX = 4 * MiB
COMMANDS_QUEUED_MAX = 100
CLOSE_GRACE_S = 1.0

_log = logging.getLogger(__name__)


class MonitorServer:
    """The monitors of one daemon. `quit` is called for the command of that name."""

    def __init__(self, daemon: Daemon, quit_: Callable[[], None]) -> None:
        self._daemon = daemon
        self._quit = quit_
        self._listeners: list[Listener] = []
        self._sessions: set[_Session] = set()
        self.refusing = False
        self._unfollow = daemon.events.follow(self._announce)

    def listen_unix(self, path: str) -> Listener:
        """Takes sessions at a unix socket, mode 0600, from now on."""
        listener = listen_unix(path, self.serve, same_user_only=True)
        self._listeners.append(listener)
        return listener

    def serve(self, stream: Stream) -> None:
        """Greets a client and serves it, whatever the stream came from."""
        session = _Session(self, stream, Context(self._daemon, self._quit, {}))
        self._sessions.add(session)
        stream.begin(session)
        session.send(qmp.greeting(commands.version()))

    def refuse(self) -> None:
        """Takes no more sessions, and no more commands; events are still told."""
        for listener in self._listeners:
            listener.close()
        self.refusing = True

    async def close(self) -> None:
        """As `refuse`; lets commands that run end, and closes every session."""
        self.refuse()
        self._unfollow()
        await asyncio.gather(*(session.close() for session in list(self._sessions)))

    def forget(self, session: _Session) -> None:
        """The session has ended."""
        self._sessions.discard(session)

    def _announce(self, name: str, data: dict[str, Any]) -> None:
        message = qmp.event(name, data, time.time())
        for session in list(self._sessions):
            session.announce(message)


class _Session:
    """One client. Its commands run in one task, which exists while there are any."""

    def __init__(self, server: MonitorServer, stream: Stream, context: Context) -> None:
        self._server = server
        self._stream = stream
        self._context = context
        self._splitter = qmp.Splitter()
        self._buffer = memoryview(bytearray(64 * KiB))
        self._queue: collections.deque[qmp.Document] = collections.deque()
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._negotiated = False
        self._gone = False

    # What the stream calls.

    def receive_buffer(self) -> memoryview:
        """See `Receiver`."""
        return self._buffer

    def received(self, count: int) -> None:
        """See `Receiver`."""
        self._queue.extend(self._splitter.feed(self._buffer[:count]))
        if len(self._queue) > COMMANDS_QUEUED_MAX:
            self._stream.pause()
        if self._queue and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def sent(self) -> None:
        """See `Receiver`."""

    def closed(self, error: IoError | None) -> None:
        """See `Receiver`."""
        self._gone = True
        self._queue.clear()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    # Commands.

    async def _run(self) -> None:
        while self._queue:
            document = self._queue.popleft()
            self.send(await self._answer(document))
            if len(self._queue) <= COMMANDS_QUEUED_MAX // 2:
                self._stream.resume()
        self._task = None
        if self._gone:
            await self._end()

    async def _answer(self, document: qmp.Document) -> dict[str, Any]:
        try:
            command = qmp.decode_command(document)
        except qmp.QmpError as error:
            return qmp.failure(error, qmp.identifier(document))
        try:
            if command.execute == "qmp_capabilities":
                self._negotiated = True
                return qmp.success({}, command.id)
            if self._server.refusing:
                raise qmp.QmpError("GenericError", "the daemon is shutting down")
            if not self._negotiated:
                text = "Expecting capabilities negotiation with 'qmp_capabilities'"
                raise qmp.QmpError("CommandNotFound", text)
            return qmp.success(await execute(self._context, command.execute, command.arguments), command.id)
        except FleecerError as error:
            return qmp.failure(error, command.id)
        except Exception as error:  # noqa: BLE001 - a bug in one command must not end the daemon; it is logged
            _log.exception("command %s failed in a way it must not", command.execute)
            return qmp.failure(error, command.id)

    def announce(self, event: dict[str, Any]) -> None:
        """Tells an event, once capabilities are negotiated."""
        if self._negotiated:
            self.send(event)

    def send(self, message: dict[str, Any]) -> None:
        """Sends one document, to a client that reads."""
        if self._gone:
            return
        if self._stream.queued_bytes > QUEUED_BYTES_MAX:
            self._stream.abort()
        else:
            self._stream.send([qmp.encode(message)])

    async def close(self) -> None:
        """Lets the command that runs end, sends its answer, and closes."""
        self._queue.clear()
        if self._task is not None:
            await asyncio.shield(self._task)
        self._stream.close()
        given_up = asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self._stream.abort)
        await asyncio.shield(self._ended)
        given_up.cancel()

    async def _end(self) -> None:
        for hold in list(self._context.at_end.values()):
            try:
                await hold()
            except FleecerError as error:
                _log.warning("ending a monitor session: %s", told(error))
        self._server.forget(self)
        if not self._ended.done():
            self._ended.set_result(None)
