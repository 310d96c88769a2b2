"""The NBD server: the exports there are, the sockets listened at, the clients connected.

Invariants:
- A client counts against `connections_max`; one that has not entered an export after `HANDSHAKE_TIMEOUT_S` is dropped.
- An export in use by a client is removed only "hard": its clients' requests in flight end, then they are cut off.
- Messages about dropped clients are limited in rate: peers cannot fill a log.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Iterable

from fleecer.errors import InUse, NotFound, UsageError, quoted
from fleecer.export.connection import TURN_BYTES, Connection
from fleecer.export.export import Export
from fleecer.net.listen import Listener, listen_tcp, listen_unix
from fleecer.net.stream import Stream
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ExportInfo

CONNECTIONS_MAX = 1024
HANDSHAKE_TIMEOUT_S = 10.0
LONG_TURN_BYTES = 1 * MiB
SHARE = 2
"""Long turns may take so many times the time of others: a guest that writes as fast as it can, to a slow file above
all, would leave a copy next to nothing."""
TURNS_MAX = 4
"""Turns at once, whatever time others took."""
SHORT_TURNS = 64
"""After others asked for a little: some 10 ms of turns."""
WAY_TURN_BYTES = 32 * KiB
WAY_TURNS = 128
"""After `make_way`: with a busy guest some 20 ms, too little to slow it down for anybody to see."""
HURRY_REQUESTS = 8
"""Who asks for more than this from one turn to the next is kept busy by the answers."""
_NOTE_INTERVAL_S = 10.0

_log = logging.getLogger(__name__)


class _Catalogue:
    """The exports as one connection sees them."""

    def __init__(self, server: Server, connection: Connection) -> None:
        self._server = server
        self._connection = connection

    def names(self) -> Iterable[tuple[str, str]]:
        return [(export.name, export.description) for export in self._server.exports()]

    def find(self, name: str) -> ExportInfo | None:
        export = self._server.export_named(name)
        return export.info(can_multi_conn=True) if export is not None else None

    def enter(self, name: str) -> ExportInfo | None:
        export = self._server.export_named(name)
        if export is None:
            return None
        self._connection.export = export
        self._server.entered(self._connection)
        return export.info(can_multi_conn=True)


class Server:
    """All NBD serving of one daemon. Its parts are added and removed while it runs.

    `raise_internal_errors` gives a bug in answering a request to the loop's exception handler, besides the answer EIO:
    for tests. `clock` counts seconds.
    """

    def __init__(
        self,
        *,
        connections_max: int = CONNECTIONS_MAX,
        raise_internal_errors: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.raise_internal_errors = raise_internal_errors
        self.listeners: list[Listener] = []
        self.connections_max = connections_max
        self._clock = clock
        self._exports: dict[str, Export] = {}  # by id
        self._by_name: dict[str, Export] = {}
        self._connections: dict[Connection, asyncio.TimerHandle | None] = {}
        self.turn_bytes = TURN_BYTES  # how much of replies is a turn, as it is now
        self._little_asked: dict[Connection, int] = {}  # requests, since the last turn, of those who needed none
        self._turns: collections.deque[Connection] = collections.deque()  # who goes on, a few in each turn of the loop
        self._turned_s = 0.0  # when the last turn ended, or somebody began to wait for one
        self._shared_turns = 0  # how many more are taken as if somebody asked for little in between
        self._short_turns = 0  # how many more are kept short
        self._way_turns = 0  # how many more are kept shorter still
        self._notes_suppressed = 0
        self._note_at = 0.0

    # Exports.

    def exports(self) -> list[Export]:
        """Every export, in the order they were added."""
        return list(self._exports.values())

    def export(self, export_id: str) -> Export:
        """The export of that id. Raises NotFound."""
        try:
            return self._exports[export_id]
        except KeyError:
            raise NotFound("export", export_id) from None

    def export_named(self, name: str) -> Export | None:
        """What clients get for `name`; the empty name stands for the only disk there is."""
        if name:
            return self._by_name.get(name)
        disks = [export for export in self._exports.values() if not export.snapshot_of]
        return self._by_name.get("") or (disks[0] if len(disks) == 1 else None)

    def check_free(self, export_id: str, name: str) -> None:
        """Raises UsageError unless an export of that id and name may be added."""
        if export_id in self._exports:
            raise UsageError(f"export id {quoted(export_id)} is taken; choose another")
        if name in self._by_name:
            raise UsageError(f"export name {quoted(name)} is taken; choose another")

    def add(self, export: Export) -> None:
        """Offers an export to clients from now on. Raises UsageError if its id or name is taken, or unfit for NBD."""
        self.check_free(export.export_id, export.name)
        export.info(can_multi_conn=True)
        self._exports[export.export_id] = export
        self._by_name[export.name] = export

    def clients(self, export: Export | None = None) -> list[Connection]:
        """The connections to one export, or all."""
        return [c for c in self._connections if export is None or c.export is export]

    async def remove(self, export_id: str, *, hard: bool = False) -> Export:
        """Withdraws an export. Its requests in flight have ended on return; its edge is the caller's again.

        Raises NotFound; InUse if clients are connected and not `hard`, which disconnects them.
        """
        export = self.export(export_id)
        clients = self.clients(export)
        if clients and not hard:
            raise InUse(f"export {quoted(export_id)} has {len(clients)} clients; disconnect them, or remove it hard")
        del self._exports[export_id]
        del self._by_name[export.name]
        await asyncio.gather(*(client.stop() for client in clients))
        return export

    def await_turn(self, connection: Connection) -> None:
        """Has `connection` go on once those have that asked before, and whoever asks for little."""
        self._turns.append(connection)
        if len(self._turns) == 1:
            self._turned_s = self._clock()
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """Has one go on, or so many as make up for the time that others took since the last turn."""
        self.note_turn()
        until_s = now_s = self._clock()
        if self.turn_bytes >= LONG_TURN_BYTES:
            until_s += SHARE * (now_s - self._turned_s)
        try:
            self._have_turns(until_s)
        finally:
            self._turned_s = self._clock()
            if self._turns:
                asyncio.get_running_loop().call_soon(self._next_turn)

    def _have_turns(self, until_s: float) -> None:
        for _ in range(TURNS_MAX):
            try:
                self._turns[0].have_turn()
            finally:
                self._turns.popleft()
            if not self._turns or self._clock() >= until_s:
                return

    def note_little(self, connection: Connection, count: int) -> None:
        """A connection asked for less than a turn, by `count` requests."""
        self._little_asked[connection] = self._little_asked.get(connection, 0) + count

    def note_turn(self) -> None:
        """Somebody asked for a turn or more: finds out how long turns may be.

        Long turns cost less for each byte, the reader too, who wakes less often. But who asks for a little now and then
        waits for them to end. Who asks for as much as can be answered waits for himself anyway.
        """
        if self._little_asked:
            self._short_turns = SHORT_TURNS if min(self._little_asked.values()) <= HURRY_REQUESTS else 0
            self._shared_turns = SHORT_TURNS
            self._little_asked.clear()
        elif self._shared_turns:
            self._shared_turns -= 1
        if self._way_turns:
            self._way_turns -= 1
            self.turn_bytes = WAY_TURN_BYTES
            return
        self.turn_bytes = TURN_BYTES if self._short_turns else LONG_TURN_BYTES
        self._short_turns = max(0, self._short_turns - 1)

    @property
    def may_send_aside(self) -> bool:
        """Whether a worker of the kernel's may send, while there is more to do here.

        Where somebody else asks for little, it could be his processor that the worker takes for so long.
        """
        return self.turn_bytes >= LONG_TURN_BYTES and not self._shared_turns

    def make_way(self) -> None:
        """Keeps the next turns very short, for somebody who needs several, one after the other, to get one thing done.

        A snapshot is such a thing: with turns as guests have them otherwise, it would mostly wait for those to end.
        """
        self._way_turns = WAY_TURNS
        self.turn_bytes = WAY_TURN_BYTES

    # Sockets.

    def listen_unix(self, path: str) -> Listener:
        """Serves at a unix socket, mode 0600, from now on."""
        return self._listening(listen_unix(path, self._accept))

    def listen_tcp(self, host: str, port: int) -> Listener:
        """Serves at a TCP address from now on. No TLS and no password: whoever reaches it may read and write."""
        return self._listening(listen_tcp(host, port, self._accept))

    def _listening(self, listener: Listener) -> Listener:
        self.listeners.append(listener)
        return listener

    async def stop(self) -> None:
        """Stops listening, refuses new requests, ends and answers those in flight, and closes every connection."""
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        await asyncio.gather(*(connection.stop() for connection in list(self._connections)))

    # Connections.

    def catalogue(self, connection: Connection) -> _Catalogue:
        """What `connection` may see of the exports."""
        return _Catalogue(self, connection)

    def serve(self, stream: Stream) -> Connection | None:
        """Serves one connected stream, whatever it came from. None if there are too many; it is closed then."""
        if len(self._connections) >= self.connections_max and not self._evict():
            stream.abort()
            self.note_drop(stream.peer, f"there are {self.connections_max} connections, which is the limit")
            return None
        connection = Connection(self, stream)
        loop = asyncio.get_running_loop()
        self._connections[connection] = loop.call_later(HANDSHAKE_TIMEOUT_S, self._too_slow, connection)
        connection.begin()
        return connection

    def _accept(self, stream: Stream) -> None:
        self.serve(stream)

    def entered(self, connection: Connection) -> None:
        """The client has chosen an export: its handshake ended in time."""
        handle = self._connections.get(connection)
        if handle is not None:
            handle.cancel()
            self._connections[connection] = None

    def forget(self, connection: Connection) -> None:
        """The connection has ended."""
        self._little_asked.pop(connection, None)
        handle = self._connections.pop(connection, None)
        if handle is not None:
            handle.cancel()

    def _evict(self) -> bool:
        """Drops the oldest client that has not entered an export, to make room."""
        for connection, handle in list(self._connections.items()):
            if handle is not None:
                self.forget(connection)
                connection.drop()
                return True
        return False

    def _too_slow(self, connection: Connection) -> None:
        self.note_drop(connection.stream.peer, f"it entered no export in {HANDSHAKE_TIMEOUT_S:g} s")
        connection.drop()

    def note_drop(self, peer: str, reason: str) -> None:
        """Logs why a client was dropped, at most once in ten seconds, with the number of those not told."""
        now = asyncio.get_running_loop().time()
        if now < self._note_at:
            self._notes_suppressed += 1
            return
        more = f" ({self._notes_suppressed} more since the last such line)" if self._notes_suppressed else ""
        self._notes_suppressed, self._note_at = 0, now + _NOTE_INTERVAL_S
        _log.warning("dropped NBD client %s: %s%s", peer, reason, more)
