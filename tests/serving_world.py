"""An NBD server over a disk in memory, and clients of it, joined by streams in memory: what the serving tests share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from fleecer.block.edge import Edge
from fleecer.block.graph import Graph
from fleecer.block.nodes.fault import FaultNode
from fleecer.errors import IoError
from fleecer.export import Export, Server
from fleecer.net.nbd_client import ALLOCATION, NbdClient
from fleecer.testing.memory import MemoryNode
from fleecer.testing.streams import MemoryStream, memory_streams
from fleecer.units import KiB
from fleecer.wire.nbd import ClientCodec, ExportInfo, Reply, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd
from tests.nbd_world import Shelf, sent

SIZE = 256 * KiB


async def turns(count: int = 60) -> None:
    """Lets everything run that does not wait for something from outside."""
    for _ in range(count):
        await asyncio.sleep(0)


class Client:
    """A client that sends just what a test says, when it says so, and keeps every reply."""

    def __init__(self, stream: MemoryStream, name: str, *, contexts: Sequence[str] = (ALLOCATION,)) -> None:
        self.stream = stream
        self.codec = ClientCodec(name, contexts=contexts)
        self.replies: list[Reply] = []
        self.endings: list[IoError | None] = []
        self._changed = asyncio.Event()
        stream.begin(self)

    def receive_buffer(self) -> memoryview:
        return self.codec.receive_buffer()

    def received(self, count: int) -> None:
        self.replies += self.codec.received(count)
        self.send()
        self._changed.set()

    def sent(self) -> None:
        pass

    def closed(self, error: IoError | None) -> None:
        self.codec.eof()
        self.endings.append(error)
        self._changed.set()

    def send(self) -> None:
        """Sends what the codec holds, all in one go."""
        if self.codec.outgoing:
            self.stream.send(self.codec.outgoing)
            self.codec.outgoing.clear()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once something received, or the end, has made `condition` true."""
        while not condition():
            assert not self.endings or condition(), f"the connection ended: {self.codec.failure}"
            self._changed.clear()
            await self._changed.wait()

    async def reply(self, cookie: int) -> Reply:
        """The one reply to a request."""
        await self.until(lambda: any(reply.cookie == cookie for reply in self.replies))
        (found,) = [reply for reply in self.replies if reply.cookie == cookie]
        return found

    async def ended(self) -> None:
        """Returns once the server has closed the connection."""
        await self.until(lambda: bool(self.endings))


class OldClient:
    """A client that negotiates nothing by itself, and so gets simple replies: (error, cookie) and the bytes after."""

    def __init__(self, stream: MemoryStream) -> None:
        self.stream = stream
        self.data = bytearray()
        self._room = memoryview(bytearray(64 * KiB))
        self._changed = asyncio.Event()
        self.ended = False
        stream.begin(self)

    def receive_buffer(self) -> memoryview:
        return self._room

    def received(self, count: int) -> None:
        self.data += self._room[:count]
        self._changed.set()

    def sent(self) -> None:
        pass

    def closed(self, error: IoError | None) -> None:
        self.ended = True
        self._changed.set()

    async def take(self, count: int) -> bytes:
        """The next `count` bytes from the server."""
        while len(self.data) < count and not self.ended:
            self._changed.clear()
            await self._changed.wait()
        assert len(self.data) >= count, "the connection ended"
        taken = bytes(self.data[:count])
        del self.data[:count]
        return taken

    async def simple_reply(self) -> tuple[int, int]:
        """The next simple reply's error and cookie."""
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack(await self.take(nbd.SIMPLE_REPLY.size))
        assert magic == nbd.SIMPLE_REPLY_MAGIC
        return error, cookie

    async def until_ended(self) -> None:
        """Returns once the server has closed the connection."""
        while not self.ended:
            self._changed.clear()
            await self._changed.wait()


class ScriptedServer:
    """A server that does with each request what a test says; by default it keeps silent."""

    def __init__(self, stream: MemoryStream, info: ExportInfo) -> None:
        self.stream = stream
        self.codec = ServerCodec(Shelf(info))
        self.requests: list[Request] = []
        self.on_request: Callable[[Request], None] = lambda request: None
        self.ended = False
        self.receives = 0
        stream.begin(self)
        self.send()

    def receive_buffer(self) -> memoryview:
        return self.codec.receive_buffer()

    def received(self, count: int) -> None:
        self.receives += 1
        for request in self.codec.received(count):
            self.requests.append(request)
            self.on_request(request)
        self.send()

    def send(self) -> None:
        self.stream.send([sent(self.codec)])

    def sent(self) -> None:
        pass

    def closed(self, error: IoError | None) -> None:
        self.ended = True


async def scripted(info: ExportInfo | None = None) -> tuple[NbdClient, ScriptedServer]:
    """A client of a scripted server."""
    ours, theirs = memory_streams()
    server = ScriptedServer(theirs, info or ExportInfo(name="disk", size=SIZE, contexts=("base:allocation",)))
    return await NbdClient.connect(ours, "disk"), server


class Serving:
    """A server with one disk: memory below a fault node, exported as "disk". `internal_errors` are the server's."""

    def __init__(self, size: int = SIZE, *, connections_max: int = 1024, strict: bool = True) -> None:
        self.graph = Graph()
        self.clock: Callable[[], float] = lambda: 0.0
        self.server = Server(connections_max=connections_max, raise_internal_errors=strict, clock=self.turn_clock)
        memory = MemoryNode("memory", random.Random(7).randbytes(size))
        self.data = memory.data
        self.graph.add(memory, named=True)
        self.fault = FaultNode("disk", self.graph.attach(memory, "node 'disk'", "file", writable=True))
        self.graph.add(self.fault, named=True)
        self.export = self.offer("disk")
        self.internal_errors: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(self._note)

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        self.internal_errors.append(error if isinstance(error, BaseException) else RuntimeError(str(context)))

    def turn_clock(self) -> float:
        """What measures the server's turns; a test may put something else in the place of `clock`."""
        return self.clock()

    def offer(self, name: str, *, writable: bool = True) -> Export:
        """One more export of the disk."""
        export = Export(name, name, self.attach(f"export '{name}'", writable=writable))
        self.server.add(export)
        return export

    def attach(self, parent: str, *, writable: bool = True) -> Edge:
        """One more edge to the disk."""
        return self.graph.attach(self.fault, parent, "nbd", writable=writable)

    def stream(self, *, buffer_bytes: int = 64 * KiB, piece_bytes: int = 1 << 30) -> MemoryStream:
        """The client's end of a new connection."""
        ours, theirs = memory_streams(buffer_bytes=buffer_bytes, piece_bytes=piece_bytes)
        self.server_stream = theirs
        self.server.serve(theirs)
        return ours

    async def client(
        self,
        name: str = "disk",
        *,
        contexts: Sequence[str] = (ALLOCATION,),
        buffer_bytes: int = 64 * KiB,
        piece_bytes: int = 1 << 30,
    ) -> Client:
        """A client that a test drives by hand, in transmission."""
        client = Client(self.stream(buffer_bytes=buffer_bytes, piece_bytes=piece_bytes), name, contexts=contexts)
        await client.until(lambda: client.codec.ready)
        return client

    async def connect(self, name: str = "disk", *, contexts: Sequence[str] = (ALLOCATION,)) -> NbdClient:
        """A client proper."""
        return await NbdClient.connect(self.stream(), name, contexts=contexts)

    async def close(self) -> None:
        """Stops the server and checks that nothing is left: no request, no connection, no task, no bug."""
        await self.server.stop()
        for export in self.server.exports():
            assert export.edge.busy == 0, f"{export.edge.busy} requests were left in flight"
        assert not self.server.clients(), "a connection was left"
        await turns()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks were left: {left}"
        assert not self.internal_errors, self.internal_errors
