"""Readers of a snapshot: foreign programs and our own client, each in its own way, each compared with the reference.

The reference is what the snapshot's first reading gave, after the ledger was asked. A reader returns how many bytes it
has compared. It raises WrongError for a difference, ReadFailedError when the snapshot could not be read; nothing of
it, process or file, is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fleecer.errors import FleecerError, told
from fleecer.net.nbd_client import ALLOCATION
from fleecer.net.stream import connect_unix
from fleecer.units import KiB, MiB
from tests.soak.judge import Piece, check_zero_runs, difference
from tests.soak.processes import send
from tests.soak.stamps import SECTOR
from tests.soak.writer import Guest

_RUN_TIMEOUT_S = 120.0
_HOLE_OR_ZERO = 3  # NBD_STATE_HOLE | NBD_STATE_ZERO


class WrongError(Exception):
    """A snapshot, or a disk, read as it must not."""

    def __init__(self, what: str, wrong_bytes: int = SECTOR) -> None:
        super().__init__(what)
        self.wrong_bytes = wrong_bytes


class ReadFailedError(Exception):
    """A reader was told of an error, or was cut off."""


class View(NamedTuple):
    """One disk of one snapshot. `reference` is its content, also in the file at `path`; `scrap` is for the reader."""

    export: str
    uri: str
    socket: str
    reference: bytes
    path: str
    scrap: Path


Reader = Callable[[View, random.Random], Awaitable[int]]


@contextlib.asynccontextmanager
async def _client(socket: str, export: str, *, whole: bool = True) -> AsyncIterator[Guest]:
    """A connection to an export; failures of what is done with it become ReadFailedError."""
    try:
        client = await Guest.connect(await connect_unix(socket), export, contexts=(ALLOCATION,) if whole else ())
    except FleecerError as error:
        raise ReadFailedError(told(error)) from error
    assert isinstance(client, Guest)
    try:
        yield client
    except FleecerError as error:
        raise ReadFailedError(told(error)) from error
    finally:
        client.cut()


async def first_reading(socket: str, export: str, disk: int, rng: random.Random, pieces: list[Piece]) -> None:
    """Reads all of an export into `pieces`, in order, some requests in flight; on a failure they are what came."""
    async with _client(socket, export, whole=False) as client:
        size, step = client.info.size, rng.choice((64 * KiB, 200 * KiB + SECTOR, MiB))
        for start in range(0, size, 4 * step):
            offsets = range(start, min(start + 4 * step, size), step)
            reads = [client.pread(offset, min(step, size - offset)) for offset in offsets]
            done = await asyncio.gather(*reads, return_exceptions=True)
            for offset, data in zip(offsets, done, strict=True):
                if isinstance(data, BaseException):
                    raise data
                pieces.append(Piece(disk, offset // SECTOR, bytes(data)))


async def random_ranges(view: View, rng: random.Random) -> int:
    """Our own client: unaligned ranges, several in flight."""
    size, total = len(view.reference), 0
    async with _client(view.socket, view.export) as client:

        async def read() -> int:
            length = rng.randint(1, rng.choice((SECTOR, 64 * KiB, MiB)))
            offset = rng.randint(0, size - length)
            data = bytes(await client.pread(offset, length))
            _compare(view, "our client", data, offset)
            return length

        for _ in range(12):
            total += sum(await asyncio.gather(*(read() for _ in range(6))))
            await asyncio.sleep(rng.random() * 0.05)
    return total


async def block_status(view: View, rng: random.Random) -> int:
    """Our own client: what is told to be a hole or zero must be zero."""
    offset, size = 0, len(view.reference)
    runs: list[tuple[int, int]] = []
    async with _client(view.socket, view.export) as client:
        while offset < size:
            length = min(rng.randint(1, 8 * MiB), size - offset)
            extents = (await client.block_status(offset, length))[ALLOCATION]
            for run, flags in extents:
                if flags & _HOLE_OR_ZERO:
                    runs.append((offset, min(run, size - offset)))
                offset += run
    _check_runs(view, "our client's block status", runs)
    return sum(length for _, length in runs)


async def dropped(view: View, rng: random.Random) -> int:
    """Our own client, which asks for much and drops the connection in the middle of the answer."""
    async with _client(view.socket, view.export) as client:
        size = len(view.reference)
        reads = [asyncio.ensure_future(client.pread(0, min(4 * MiB, size))) for _ in range(4)]
        await asyncio.wait(reads, timeout=rng.random() * 0.02)
        client.cut()
        await asyncio.gather(*reads, return_exceptions=True)
    return 0


async def nbdcopy(view: View, rng: random.Random) -> int:
    """libnbd's copier, with requests of some size."""
    requests = ("--request-size", str(rng.choice((64 * KiB, 256 * KiB, 4 * MiB))), "--requests", "16")
    return await _copied(view, ["nbdcopy", *requests, view.uri, str(view.scrap)])


async def nbdcopy_halted(view: View, rng: random.Random) -> int:
    """libnbd's copier, stopped for a while with requests in flight."""
    return await _copied(view, ["nbdcopy", view.uri, str(view.scrap)], halt_s=0.2 + rng.random() * 2)


async def nbdcopy_killed(view: View, rng: random.Random) -> int:
    """libnbd's copier, killed on its way."""
    with _scrap(view):
        await _run(["nbdcopy", view.uri, str(view.scrap)], kill_after_s=rng.random() * 0.1)
    return 0


async def nbdinfo_map(view: View, rng: random.Random) -> int:
    """libnbd's map of the export."""
    entries = json.loads(await _run(["nbdinfo", "--map", "--json", view.uri]))
    runs = [(entry["offset"], entry["length"]) for entry in entries if entry["type"] & _HOLE_OR_ZERO]
    _check_runs(view, "nbdinfo --map", runs)
    return sum(length for _, length in runs)


async def qemu_convert(view: View, rng: random.Random) -> int:
    """qemu-img's copier, which asks for block status first."""
    return await _copied(view, ["qemu-img", "convert", "-f", "raw", "-O", "raw", view.uri, str(view.scrap)])


async def qemu_compare(view: View, rng: random.Random) -> int:
    """qemu-img's comparison with the reference; its status 1 means that they differ."""
    told_by_qemu = await _run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", view.uri, view.path], fine=(0, 1), status_first=True
    )
    if told_by_qemu.startswith(b"1 "):
        raise WrongError(f"{view.export}: qemu-img compare: {told_by_qemu[2:].decode(errors='replace').strip()}")
    return len(view.reference)


async def qemu_io(view: View, rng: random.Random) -> int:
    """qemu-io, which shows what it reads in hexadecimal."""
    length = 4 * KiB
    offsets = [rng.randrange(0, len(view.reference) - length, SECTOR) for _ in range(8)]
    commands = [word for offset in offsets for word in ("-c", f"read -v {offset} {length}")]
    shown = await _run(["qemu-io", "-r", "-f", "raw", *commands, view.uri])
    rows = [line.split(b":", 1)[1][:49] for line in shown.splitlines() if line[8:10] == b": "]
    data = bytes.fromhex(b"".join(rows).decode())
    if b"failed" in shown or len(data) != length * len(offsets):
        raise ReadFailedError(f"qemu-io: {shown[-200:].decode(errors='replace')}")
    for index, offset in enumerate(offsets):
        _compare(view, "qemu-io", data[index * length : (index + 1) * length], offset)
    return len(data)


READERS: tuple[Reader, ...] = (
    random_ranges,
    nbdcopy,
    qemu_compare,
    block_status,
    qemu_io,
    nbdinfo_map,
    qemu_convert,
    nbdcopy_halted,
    dropped,
    nbdcopy_killed,
)
PROGRAMS = ("nbdcopy", "nbdinfo", "qemu-img", "qemu-io")


def missing_programs() -> list[str]:
    """The foreign programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _compare(view: View, by: str, data: bytes, offset: int = 0) -> None:
    if fault := difference(view.reference, data, offset):
        raise WrongError(f"{view.export}, read by {by} at {offset}: {fault}")


def _check_runs(view: View, by: str, runs: list[tuple[int, int]]) -> None:
    if fault := check_zero_runs(view.reference, runs):
        raise WrongError(f"{view.export}: {by}: {fault}")


@contextlib.contextmanager
def _scrap(view: View) -> Iterator[None]:
    try:
        yield
    finally:
        view.scrap.unlink(missing_ok=True)


async def _copied(view: View, command: list[str], halt_s: float = 0.0) -> int:
    """Runs a program that copies the export to `view.scrap`, and compares."""
    with _scrap(view):
        await _run(command, halt_s=halt_s)
        content = await asyncio.to_thread(view.scrap.read_bytes)
    _compare(view, command[0], content)
    return len(content)


async def _run(
    command: list[str],
    *,
    fine: tuple[int, ...] = (0,),
    halt_s: float = 0.0,
    kill_after_s: float | None = None,
    status_first: bool = False,
) -> bytes:
    """Runs a program and returns its output. Raises ReadFailedError for a status that is not `fine`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        if halt_s:
            await asyncio.sleep(halt_s / 20)
            send(process, signal.SIGSTOP)
            await asyncio.sleep(halt_s)
            send(process, signal.SIGCONT)
        if kill_after_s is not None:
            await asyncio.sleep(kill_after_s)
            send(process, signal.SIGKILL)
            await process.wait()
            return b""
        async with asyncio.timeout(_RUN_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise ReadFailedError(f"{command[0]}: still running after {_RUN_TIMEOUT_S:g} s") from None
    finally:
        send(process, signal.SIGKILL)
        await process.wait()
    if process.returncode not in fine:
        words = output.decode(errors="replace").strip()[-300:]
        raise ReadFailedError(f"{command[0]}: status {process.returncode}: {words}")
    return b"%d %s" % (process.returncode, output) if status_first else output
