"""A writer: a process that changes its own sectors of every disk without a pause, and enters each step in the ledger.

The driver speaks to it by lines: "go" connects and begins, "stop" ends after a last flush; the end of standard input
ends the process. It answers "stopped", or "lost: CAUSE" once anything failed and nothing of it is in flight any more;
then it waits for "go". Whether that was to be expected is for the driver to say.

Writer 0 has one operation in flight and goes from disk to disk in turn. The last writer breaks connections: in the
midst of requests, and after half of one. What became of a request that was cut off is not known, and it may still be
under way: its sectors are left alone until the next "go".
"""

from __future__ import annotations

import argparse
import array
import asyncio
import json
import random
import sys
import time

from fleecer.errors import FleecerError, IoError, told
from fleecer.net.nbd_client import NbdClient
from fleecer.net.stream import connect_unix
from fleecer.ranges import Buffer
from fleecer.wire.nbd.constants import CMD_FLAG_FUA
from tests.soak.ledger import ABANDONED, TRIM, WRITE, ZERO, Ledger
from tests.soak.stamps import SECTOR, Layout, Stamp

DISK_NAMES = ("a", "b", "c")
DEPTHS = (1, 6, 6)
_CUT_EVERY_S = 2.0
_LONG_MAX = 512  # sectors of the longest operation


class Guest(NbdClient):
    """A client that can also misbehave, and write with FUA."""

    async def pwrite_fua(self, offset: int, data: Buffer) -> None:
        """Writes; on return the data is durable."""
        self._check()
        await self._reply(self._codec.write(offset, data, CMD_FLAG_FUA))

    def cut(self) -> None:
        """Drops the connection with all that is in flight."""
        self._stream.abort()

    def write_in_part(self, offset: int, data: Buffer, share: float) -> None:
        """Sends the first part of a write request and drops the connection."""
        self._codec.write(offset, data)
        whole = b"".join(self._codec.outgoing)
        self._codec.outgoing.clear()
        self._stream.send([whole[: int(len(whole) * share)]])
        self._stream.abort()


async def connect(socket_path: str, export: str) -> Guest:
    """Connects to an export. Raises IoError or what the server said."""
    client = await Guest.connect(await connect_unix(socket_path), export, contexts=())
    assert isinstance(client, Guest)
    return client


class Writer:
    """One writer's work, from each "go" on."""

    def __init__(self, number: int, socket_path: str, ledger: Ledger, seed: int) -> None:
        self.stopping = False
        self._number = number
        self._socket_path = socket_path
        self._ledger = ledger
        self._layout = ledger.layout
        self._random = random.Random(f"{seed}/{number}")
        self._operation = 0
        self._clients: list[Guest] = []
        self._runs = [self._layout.runs(disk, number) for disk in range(len(DISK_NAMES))]
        self._busy: list[bytearray] = []
        self._turn = 0

    async def run(self) -> str:
        """Works until `stopping` or a failure; returns what to tell the driver."""
        self._busy = [bytearray(size) for size in self._layout.sectors]
        self._clients = []
        tasks: list[asyncio.Task[None]] = []
        try:
            for name in DISK_NAMES:
                self._clients.append(await connect(self._socket_path, name))
            tasks = [asyncio.create_task(self._work()) for _ in range(DEPTHS[self._number])]
            if self._number == len(DEPTHS) - 1:
                tasks.append(asyncio.create_task(self._misbehave()))
            await asyncio.gather(*tasks)
            for disk in range(len(DISK_NAMES)):
                await self._flush(disk)
            for client in self._clients:
                await client.close()
        except FleecerError as error:
            for task in tasks:
                task.cancel()
            for client in self._clients:
                client.cut()
            await asyncio.gather(*tasks, return_exceptions=True)
            return f"lost: {told(error)}"
        return "stopped"

    async def _work(self) -> None:
        rng = self._random
        while not self.stopping:
            if DEPTHS[self._number] == 1:
                self._turn += 1
                disk = self._turn % len(DISK_NAMES)
            else:
                disk = rng.randrange(len(DISK_NAMES))
            client = self._clients[disk]
            try:
                await self._step(disk, client)
            except IoError:
                if client is self._clients[disk]:
                    raise  # else we dropped that connection ourselves
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.01)

    async def _step(self, disk: int, client: Guest) -> None:
        roll = self._random.random()
        if roll < 0.003:
            await self._flush(disk)
            return
        kind = TRIM if roll < 0.04 else ZERO if roll < 0.09 else WRITE
        run = self._pick(disk, kind)
        if run is None:
            await asyncio.sleep(0.01)
            return
        first, end = run
        self._operation += 1
        number = self._operation
        self._busy[disk][first:end] = b"\1" * (end - first)
        data = self._data(disk, number, first, end) if kind == WRITE else b""
        zeroed_before = self._ledger.begin(self._number, number, kind, disk, first, end)
        try:
            if kind == TRIM:
                await self._trim(client, disk, number, first, zeroed_before)
            else:
                await self._send(client, kind, disk, number, first, end, data)
        except BaseException:
            self._ledger.acknowledge(self._number, number, ABANDONED)
            raise
        took_ns = self._ledger.acknowledge(self._number, number, time.monotonic_ns())
        self._busy[disk][first:end] = bytes(end - first)
        self._count("operations", 1)
        self._count("bytes", (end - first) * SECTOR)
        if took_ns > self._ledger.stat(self._number, "longest_ns"):
            self._ledger.set_stat(self._number, "longest_ns", took_ns)

    async def _send(self, client: Guest, kind: int, disk: int, number: int, first: int, end: int, data: bytes) -> None:
        """Writes data or zeroes, and settles what its sectors hold."""
        ledger = self._ledger
        offset, length = first * SECTOR, (end - first) * SECTOR
        if kind == ZERO:
            await client.zero(offset, length, unmap=self._random.random() < 0.5)
            ledger.settle(disk, first, end, number * 2 + 1)
        elif self._random.random() < 0.03:
            await client.pwrite_fua(offset, data)
            ledger.settle(disk, first, end, number * 2)
            for sector in range(first, end):
                ledger.durable[self._number][disk][sector] = number * 2
        else:
            await client.pwrite(offset, data)
            ledger.settle(disk, first, end, number * 2)

    async def _trim(self, client: Guest, disk: int, number: int, first: int, zeroed_before: array.array[int]) -> None:
        offset, length = first * SECTOR, len(zeroed_before) * SECTOR
        await client.trim(offset, length)
        self._ledger.settle_trim(disk, first, number, zeroed_before, await client.pread(offset, length))

    async def _flush(self, disk: int) -> None:
        """A flush covers what was acknowledged before it, on every connection, whoever wrote it."""
        covered = bytes(self._ledger.acked[disk])
        await self._clients[disk].flush()
        self._ledger.durable[self._number][disk][:] = memoryview(covered).cast("Q")
        self._count("flushes", 1)

    def _pick(self, disk: int, kind: int) -> tuple[int, int] | None:
        """A run of sectors of ours with nothing in flight; None if none is found soon."""
        rng = self._random
        for _ in range(8):
            low, high = rng.choice(self._runs[disk])
            longest = min(high - low, _LONG_MAX)
            length = (
                rng.randint(1, longest) if kind != WRITE or rng.random() < 0.1 else rng.randint(1, min(longest, 16))
            )
            first = rng.randint(low, high - length)
            if self._busy[disk].find(1, first, first + length) < 0:
                return first, first + length
        return None

    def _data(self, disk: int, number: int, first: int, end: int) -> bytes:
        stamp = Stamp(self._number, number)
        return b"".join([self._layout.stamped(disk, stamp, sector) for sector in range(first, end)])

    def _count(self, name: str, more: int) -> None:
        self._ledger.set_stat(self._number, name, self._ledger.stat(self._number, name) + more)

    async def _misbehave(self) -> None:
        while not self.stopping:
            await asyncio.sleep(self._random.random() * _CUT_EVERY_S)
            disk = self._random.randrange(len(DISK_NAMES))
            other = await connect(self._socket_path, DISK_NAMES[disk])
            if self._random.random() < 0.5:
                old, self._clients[disk] = self._clients[disk], other
                old.cut()
            else:
                self._write_in_part(disk, other)
            self._count("cuts", 1)

    def _write_in_part(self, disk: int, client: Guest) -> None:
        """Nothing of a request that was not sent whole may ever be seen: it is not in the ledger."""
        run = self._pick(disk, WRITE)
        if run is None:
            client.cut()
            return
        self._operation += 1
        client.write_in_part(run[0] * SECTOR, self._data(disk, self._operation, *run), self._random.random())


async def main() -> None:
    """Does what the driver says, until it says no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--layout", type=json.loads, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    sectors, based, writers, salt = options.layout
    layout = Layout(tuple(sectors), tuple(based), writers, salt)
    writer = Writer(options.number, options.socket, Ledger(options.ledger, layout), options.seed)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    work: set[asyncio.Task[None]] = set()

    async def go() -> None:
        print(await writer.run(), flush=True)

    while line := await reader.readline():
        writer.stopping = line == b"stop\n"
        if line == b"go\n":
            task = asyncio.create_task(go())
            work.add(task)
            task.add_done_callback(work.discard)


if __name__ == "__main__":
    asyncio.run(main())
