"""The driver of a soak: sets the stage, lets writers, readers, snapshots and mishaps loose, and judges what comes.

Everything runs in the daemon's despite: what fails while the daemon is being ended by us, or a snapshot dropped, is
expected and not judged; what was read before is. Anything else that fails ends the soak, and so does one wrong byte.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fleecer.errors import FleecerError, told
from fleecer.net.stream import connect_unix
from fleecer.units import KiB, MiB, format_size
from tests.soak.daemon import ENVIRONMENT, DaemonProcess, UnexpectedError, namespace_prefix
from tests.soak.judge import ZEROES, Limits, Piece, Verdict, difference, judge
from tests.soak.ledger import IN_FLIGHT, Ledger, Op
from tests.soak.processes import send
from tests.soak.readers import READERS, ReadFailedError, View, WrongError, first_reading
from tests.soak.schemes import First, Scheme, Second
from tests.soak.stamps import SECTOR, Layout
from tests.soak.writer import DEPTHS, DISK_NAMES

_SIZES = (16 * MiB, 12 * MiB + 7 * SECTOR, 8 * MiB)
_BASE_BYTES = 5 * MiB
_IMAGES = ("a.qcow2", "b.raw", "c.qcow2")
_HANG_S = 40.0
_HANG_LOOK_S = 5
_WRITER_TIMEOUT_S = 60.0
_CHILL_EVERY_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How long, from which seed, and how often what happens."""

    seconds: float
    seed: int
    snapshot_every_s: float = 2.0
    life_s: float = 7.0
    mishap_every_s: float = 8.0
    readers: int = 8


@dataclasses.dataclass(slots=True)
class Tally:
    """What was done and found."""

    snapshots: int = 0
    by_first: int = 0
    readings: int = 0
    bytes_compared: int = 0
    wrong_bytes: int = 0
    kills: int = 0
    stops: int = 0
    halts: int = 0
    flushes_verified: int = 0
    breaks_expected: int = 0
    breaks_unexpected: int = 0
    resident_max: int = 0

    def line(self) -> str:
        """All of it, in one line."""
        return (
            f"snapshots checked {self.snapshots} ({self.by_first} by scheme 1), readings {self.readings}, "
            f"bytes compared {format_size(self.bytes_compared)}, wrong bytes {self.wrong_bytes}, "
            f"restarts {self.kills + self.stops} ({self.kills} by kill -9), halts {self.halts}, "
            f"flushes verified {self.flushes_verified}, "
            f"breaks {self.breaks_expected} expected {self.breaks_unexpected} unexpected"
        )


class Soak:
    """One soak in `directory`, which must be empty; see `run`."""

    def __init__(self, settings: Settings, directory: Path, report: Callable[[str], None]) -> None:
        self.tally = Tally()
        self._settings = settings
        self._directory = directory
        self._report = report
        self._random = random.Random(settings.seed)
        base = tuple(_BASE_BYTES // SECTOR if name == "c" else 0 for name in DISK_NAMES)
        sectors = tuple(size // SECTOR for size in _SIZES)
        self._layout = Layout(sectors, base, len(DEPTHS), settings.seed & 0xFFFFFFFF)
        self._ledger = Ledger(str(directory / "ledger"), self._layout)
        self._images = directory / "images"
        self._scratch = directory / "scratch"
        self._tight = directory / "tight"
        self._tight_works = False
        self._writers: list[asyncio.subprocess.Process] = []
        self._answers: list[asyncio.Task[str]] = []
        self._slots = asyncio.Semaphore(settings.readers)
        self._numbers = itertools.count(1)
        self._live: set[Scheme] = set()
        self._up = asyncio.Event()
        self._epoch = 0
        self._begun_s = time.monotonic()
        self._flushes_seen = 0
        self._daemon: DaemonProcess

    async def run(self) -> None:
        """Soaks. Raises WrongError or UnexpectedError; whatever happens, no process is left."""
        try:
            await self._set_the_stage()
            deadline_s = self._begun_s + self._settings.seconds
            async with asyncio.TaskGroup() as group:
                background: list[asyncio.Task[None]] = [
                    group.create_task(self._live_line()),
                    group.create_task(self._bad_company()),
                    group.create_task(self._chill()),
                    group.create_task(self._watch_for_hangs()),
                ]
                await self._until(deadline_s, group)
                for watcher in background:
                    watcher.cancel()
            await self._finish()
        except* (WrongError, UnexpectedError) as group_error:
            raise _first_of(group_error) from group_error
        finally:
            for writer in self._writers:
                send(writer, signal.SIGKILL)
                await writer.wait()
            for task in self._answers:
                task.cancel()
            await asyncio.gather(*self._answers, return_exceptions=True)
            if hasattr(self, "_daemon"):
                await self._daemon.destroy()

    async def _until(self, deadline_s: float, group: asyncio.TaskGroup) -> None:
        """Takes snapshots and makes mishaps until the deadline; returns when the last snapshot has ended."""
        async with asyncio.TaskGroup() as snapshots:
            mishaps = group.create_task(self._mishaps(deadline_s))
            while time.monotonic() < deadline_s:
                await self._up.wait()
                number = next(self._numbers)
                # No randomness in the first few: a short run must have them all.
                starved = number % 8 in (3, 4)
                snapshots.create_task(self._snapshot(number, number % 2 == 0, starved, deadline_s))
                await asyncio.sleep(self._settings.snapshot_every_s * (0.5 + self._random.random()))
            await mishaps

    # The stage.

    async def _set_the_stage(self) -> None:
        for directory in (self._images, self._scratch, self._tight):
            directory.mkdir()
        (self._images / "base.raw").write_bytes(self._layout.base(DISK_NAMES.index("c")))
        await self._qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", str(_SIZES[0]))
        await self._qemu_img("create", "-q", "-f", "raw", "b.raw", str(_SIZES[1]))
        backing = ("-b", "base.raw", "-F", "raw", "-o", "extended_l2=on")
        await self._qemu_img("create", "-q", "-f", "qcow2", *backing, "c.qcow2", str(_SIZES[2]))
        prefix = await namespace_prefix(self._tight)
        self._tight_works = bool(prefix)
        if not prefix:
            self._report("no namespaces here for a small tmpfs: scratch fills up in scheme 1 only, by a fault node")
        images = [f"{name}={self._images / image}" for name, image in zip(DISK_NAMES, _IMAGES, strict=True)]
        self._daemon = DaemonProcess(self._directory, images, prefix)
        await self._daemon.start()
        self._nodes = await self._node_names()
        for number in range(len(DEPTHS)):
            command = [
                *(sys.executable, "-m", "tests.soak.writer", "--number", str(number)),
                *("--socket", self._daemon.nbd_socket, "--ledger", str(self._directory / "ledger")),
                *("--layout", json.dumps(self._layout), "--seed", str(self._settings.seed)),
            ]
            with (self._directory / f"writer{number}.log").open("wb") as log:
                pipe = asyncio.subprocess.PIPE
                self._writers.append(
                    await asyncio.create_subprocess_exec(
                        *command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=log, start_new_session=True
                    )
                )
        self._let_go()

    async def _qemu_img(self, *arguments: str, fine: tuple[int, ...] = (0,)) -> None:
        process = await asyncio.create_subprocess_exec(
            *("qemu-img", *arguments),
            cwd=self._images,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        output, _ = await process.communicate()
        if process.returncode not in fine:
            words = output.decode(errors="replace").strip()
            raise UnexpectedError(f"qemu-img {' '.join(arguments)}: status {process.returncode}: {words}")

    async def _node_names(self) -> list[str]:
        return sorted(node["drv"] for node in await self._daemon.execute("query-named-block-nodes"))

    # Writers.

    def _let_go(self) -> None:
        self._tell("go")
        self._answers = [asyncio.ensure_future(self._answer(number)) for number in range(len(self._writers))]
        self._up.set()

    def _tell(self, word: str) -> None:
        for writer in self._writers:
            assert writer.stdin is not None
            writer.stdin.write(f"{word}\n".encode())

    async def _answer(self, number: int) -> str:
        stdout = self._writers[number].stdout
        assert stdout is not None
        answer = (await stdout.readline()).decode().strip()
        if not answer:
            log = (self._directory / f"writer{number}.log").read_text(errors="replace")
            raise UnexpectedError(f"writer {number} has ended:\n{log[-2000:]}")
        return answer

    async def _rest(self) -> list[str]:
        """Waits until every writer rests; returns their answers."""
        try:
            async with asyncio.timeout(_WRITER_TIMEOUT_S):
                return list(await asyncio.gather(*self._answers))
        except TimeoutError:
            raise UnexpectedError(f"a writer did not come to rest in {_WRITER_TIMEOUT_S:g} s") from None

    async def _watch_for_hangs(self) -> None:
        """Ends the soak when a writer has failed though nobody ended the daemon, or a request takes for ever."""
        for second in itertools.count(1):
            await asyncio.sleep(1.0)
            for number, task in enumerate(self._answers):
                if task.done() and self._up.is_set():
                    raise UnexpectedError(f"writer {number} failed: {task.result()}")
            if second % _HANG_LOOK_S or not self._up.is_set():
                continue
            now_ns = time.monotonic_ns()
            for number in range(len(self._writers)):
                for op in self._ledger.operations(number):
                    if op.acknowledged_ns == IN_FLIGHT and now_ns - op.sent_ns > _HANG_S * 1e9:
                        raise UnexpectedError(f"{op} has been in flight for more than {_HANG_S:g} s")

    # Snapshots.

    async def _snapshot(self, number: int, by_first: bool, starved: bool, deadline_s: float) -> None:
        """One snapshot from its instant to its end."""
        if not self._up.is_set():  # the daemon was ended between our making and our first step
            return
        epoch = self._epoch
        name = f"s{number}"
        rng = random.Random(f"{self._settings.seed}/{name}")
        disks = [disk for disk in DISK_NAMES if rng.random() < 0.8] or list(DISK_NAMES)
        scheme: Scheme
        if by_first:
            scheme = First(self._daemon, name, disks, self._scratch, starved=starved)
        else:
            tight = starved and self._tight_works
            place = self._tight if tight else rng.choice((None, self._scratch))
            scheme = Second(self._daemon, name, disks, place, starved=tight)
        self._live.add(scheme)
        try:
            await self._live_through(scheme, name, disks, rng, deadline_s)
        except (FleecerError, ReadFailedError) as error:
            if self._epoch == epoch:
                self.tally.breaks_unexpected += 1
                raise UnexpectedError(f"snapshot {name}: {told(error)}") from error
        finally:
            self._live.discard(scheme)
            scheme.clean_up()
            for path in self._scratch.glob(f"{name}-*.ref"):
                path.unlink()

    async def _live_through(
        self, scheme: Scheme, name: str, disks: list[str], rng: random.Random, deadline_s: float
    ) -> None:
        await scheme.prepare()
        before = self._ledger.before()
        await scheme.create()
        after = self._ledger.after(before)
        await scheme.publish()
        pieces: dict[str, list[Piece]] = {disk: [] for disk in disks}
        failure: ReadFailedError | None = None
        for disk in disks:
            at = DISK_NAMES.index(disk)
            try:
                await first_reading(self._daemon.nbd_socket, scheme.export(disk), at, rng, pieces[disk])
            except ReadFailedError as error:
                failure = error
        limits = Limits(before.acked, after.submitted, after.zeroed)
        everything = [piece for disk in disks for piece in pieces[disk]]
        await self._judged(f"snapshot {name}", limits, everything, after.operations)
        if failure is not None:
            await self._expect_broken(scheme, name, failure)
            await self._drop(scheme)
            return
        self.tally.snapshots += 1
        self.tally.by_first += isinstance(scheme, First)
        until_s = min(time.monotonic() + self._settings.life_s * (0.5 + rng.random()), deadline_s)
        views = [self._view(scheme, disk, name, pieces[disk]) for disk in disks]
        dropped = asyncio.Event()
        readings = [asyncio.ensure_future(self._readings(scheme, name, v, rng, until_s, dropped)) for v in views]
        try:
            await asyncio.wait(readings, timeout=until_s - time.monotonic(), return_when=asyncio.FIRST_EXCEPTION)
            if rng.random() < 0.5:  # else the readers that are still at work find it gone
                await asyncio.gather(*readings)
            if any(not self._may_break(scheme, cause) for cause in (await scheme.broken()).values()):
                raise ReadFailedError(f"it is broken: {await scheme.broken()}")
            dropped.set()
            await self._drop(scheme)
            await asyncio.gather(*readings)
        finally:
            for task in readings:
                task.cancel()
            await asyncio.gather(*readings, return_exceptions=True)

    async def _drop(self, scheme: Scheme) -> None:
        if await scheme.broken():
            self.tally.breaks_expected += 1
        await scheme.drop()

    def _view(self, scheme: Scheme, disk: str, name: str, pieces: list[Piece]) -> View:
        reference = b"".join(piece.content for piece in pieces)
        if len(reference) != self._layout.sectors[DISK_NAMES.index(disk)] * SECTOR:
            raise WrongError(f"snapshot {name} of disk {disk} has {len(reference)} bytes")
        path = self._scratch / f"{name}-{disk}.ref"
        path.write_bytes(reference)
        export = scheme.export(disk)
        return View(export, self._daemon.uri(export), self._daemon.nbd_socket, reference, str(path), path)

    async def _readings(
        self, scheme: Scheme, name: str, view: View, rng: random.Random, until_s: float, dropped: asyncio.Event
    ) -> None:
        """Reads one disk's part in every way, until the snapshot's time is over or it is gone."""
        order = list(READERS)
        rng.shuffle(order)
        for turn, reader in enumerate(itertools.cycle(order)):
            if time.monotonic() > until_s or dropped.is_set():
                return
            scrap = self._scratch / f"{view.export}.{turn}.out"
            try:
                async with self._slots:
                    self.tally.bytes_compared += await reader(view._replace(scrap=scrap), rng)
                    self.tally.readings += 1
            except ReadFailedError as error:
                if dropped.is_set():
                    return
                await self._expect_broken(scheme, name, error)
                return
            except WrongError as error:
                self.tally.wrong_bytes += error.wrong_bytes
                raise

    def _may_break(self, scheme: Scheme, cause: str) -> bool:
        """Whether a snapshot was to break: it had too little room, or shared the copies of a later one that had."""
        return scheme.starved or str(self._tight) in cause

    async def _expect_broken(self, scheme: Scheme, name: str, error: ReadFailedError) -> None:
        """Reads may fail only of a snapshot that was to break, and then it must say that it is broken."""
        causes = (await scheme.broken()).values()
        if not causes or not all(self._may_break(scheme, cause) for cause in causes):
            raise ReadFailedError(f"snapshot {name} cannot be read: {error}") from error

    async def _judged(self, what: str, limits: Limits, pieces: list[Piece], operations: list[Op]) -> Verdict:
        """The judge's verdict, if it is good; else what was read is kept in files, and WrongError tells of it."""
        verdict = await asyncio.to_thread(judge, self._layout, limits, pieces, operations)
        if verdict.wrong:
            for piece in pieces:
                (self._directory / f"read-{piece.disk}-{piece.first:08}").write_bytes(piece.content)
        self._check(verdict.wrong_bytes, f"{what}: {verdict.told()}")
        self.tally.bytes_compared += sum(len(piece.content) for piece in pieces)
        return verdict

    def _check(self, wrong_bytes: int, what: str) -> None:
        self.tally.wrong_bytes += wrong_bytes
        if wrong_bytes:
            raise WrongError(what, wrong_bytes)

    # Mishaps.

    async def _mishaps(self, deadline_s: float) -> None:
        order = [self._halt, self._kill, self._halt, self._kill, self._stop]
        for mishap in itertools.cycle(order):
            wait_s = self._settings.mishap_every_s * (0.5 + self._random.random())
            if time.monotonic() + wait_s > deadline_s:
                return
            await asyncio.sleep(wait_s)
            await mishap()

    async def _halt(self) -> None:
        send(self._daemon.process, signal.SIGSTOP)
        await asyncio.sleep(0.1 + self._random.random() * 2)
        send(self._daemon.process, signal.SIGCONT)
        self.tally.halts += 1

    async def _kill(self) -> None:
        """kill -9: everything that a flush had covered must be there after a restart."""
        await self._end_daemon(signal.SIGKILL)
        limits = [self._ledger.floor(disk) for disk in range(len(DISK_NAMES))]
        await self._restart("after kill -9", limits)
        self.tally.kills += 1
        flushes = self._ledger.total("flushes")
        self.tally.flushes_verified += flushes - self._flushes_seen
        self._flushes_seen = flushes

    async def _stop(self) -> None:
        """SIGTERM: everything that was acknowledged must be there."""
        # A target that cannot be written to makes the last flush fail, which the status must tell.
        fine = (0, 1) if any(scheme.starved and isinstance(scheme, First) for scheme in self._live) else (0,)
        status = await self._end_daemon(signal.SIGTERM)
        if status not in fine:
            raise UnexpectedError(f"SIGTERM ended the daemon with status {status}:\n{self._daemon.last_words()}")
        await self._restart("after SIGTERM", self._ledger.before().acked)
        self.tally.stops += 1

    async def _end_daemon(self, number: signal.Signals) -> int:
        self._epoch += 1
        self._up.clear()
        status = await self._daemon.end(number)
        await self._rest()
        while self._live:  # their readers notice, and clean up
            await asyncio.sleep(0.02)
        return status

    async def _restart(self, when: str, low: list[array.array[int]]) -> None:
        """Judges the images as QEMU reads them, starts the daemon, and compares what it serves."""
        await self._check_images(when)
        contents = [await self._converted(disk) for disk in range(len(DISK_NAMES))]
        limits = Limits(low, *(self._ledger.after(self._ledger.before())[:2]))
        await self._judge_disks(when, limits, contents)
        await self._daemon.start()
        if found := await self._daemon.execute("query-snapshots"):
            raise UnexpectedError(f"{when} there are snapshots: {found}")
        if await self._node_names() != self._nodes:
            raise UnexpectedError(f"{when} the nodes are {await self._node_names()}, at first {self._nodes}")
        await self._compare_disks(f"{when} and a restart", contents)
        self._let_go()

    async def _check_images(self, when: str) -> None:
        """Nothing is left beside the images, and they are sound: leaks are no corruption (status 3)."""
        left = set(os.listdir(self._images)) - {*_IMAGES, "base.raw"}
        if left:
            raise UnexpectedError(f"{when} there is left beside the images: {sorted(left)}")
        for image in _IMAGES:
            if image.endswith(".qcow2"):
                await self._qemu_img("check", "-f", "qcow2", image, fine=(0, 3))

    async def _converted(self, disk: int) -> bytes:
        """A disk's content as qemu-img reads its image."""
        raw = self._scratch / "converted.raw"
        kind = "qcow2" if _IMAGES[disk].endswith(".qcow2") else "raw"
        await self._qemu_img("convert", "-f", kind, "-O", "raw", _IMAGES[disk], str(raw))
        content = raw.read_bytes()
        raw.unlink()
        return content

    async def _judge_disks(self, when: str, limits: Limits, contents: list[bytes]) -> None:
        """Judges disks at rest, and enters what they hold into the ledger."""
        pieces = [Piece(disk, 0, content) for disk, content in enumerate(contents)]
        verdict = await self._judged(when, limits, pieces, [])
        self._ledger.enter_contents([_states(*both) for both in zip(verdict.found, limits.zeroed, strict=True)])

    async def _compare_disks(self, when: str, contents: list[bytes]) -> None:
        for disk, name in enumerate(DISK_NAMES):
            pieces: list[Piece] = []
            try:
                await first_reading(self._daemon.nbd_socket, name, disk, self._random, pieces)
            except ReadFailedError as error:
                raise UnexpectedError(f"{when} disk {name} cannot be read: {error}") from error
            served = b"".join(piece.content for piece in pieces)
            if fault := difference(contents[disk], served):
                self._check(SECTOR, f"{when} disk {name} is not what qemu-img reads: {fault}")
            self.tally.bytes_compared += len(served)

    async def _bad_company(self) -> None:
        """Connections that say nothing, or nonsense, and go."""
        while True:
            await self._up.wait()
            with contextlib.suppress(FleecerError):
                async with self._stranger():
                    await asyncio.sleep(self._random.random() * 3)

    async def _chill(self) -> None:
        """Drops the images from the page cache, again and again: reads then wait, and others come in between."""
        while True:
            await asyncio.sleep(self._random.random() * _CHILL_EVERY_S)
            await asyncio.to_thread(_forget_cached, [str(self._images / image) for image in _IMAGES])

    @contextlib.asynccontextmanager
    async def _stranger(self) -> AsyncIterator[None]:
        stream = await connect_unix(self._daemon.nbd_socket)
        stream.begin(_Deaf())
        try:
            if self._random.random() < 0.5:
                stream.send([self._random.randbytes(self._random.randint(1, 100))])
            yield
        finally:
            stream.abort()

    # Reports and the end.

    async def _live_line(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            resident = self._daemon.resident_bytes()
            self.tally.resident_max = max(self.tally.resident_max, resident)
            self._report(
                f"{time.monotonic() - self._begun_s:.0f}/{self._settings.seconds:.0f} s, live {len(self._live)}, "
                f"{self.tally.line()}, {self._ledger.total('operations')} writes, "
                f"{self._ledger.total('cuts')} cuts, daemon {format_size(resident)}"
            )

    def longest_s(self) -> float:
        """How long the slowest request of a writer took, halts included."""
        return max(self._ledger.stat(number, "longest_ns") for number in range(len(DEPTHS))) / 1e9

    def totals(self) -> str:
        """What the writers did."""
        done = format_size(self._ledger.total("bytes"))
        return (
            f"{self._ledger.total('operations')} operations on {done}, {self._ledger.total('flushes')} flushes, "
            f"{self._ledger.total('cuts')} connections cut, slowest request {self.longest_s():.2f} s, "
            f"daemon {format_size(self.tally.resident_max)} at most"
        )

    async def _finish(self) -> None:
        """Lets the writers end; nothing may be left in the daemon, and everything acknowledged in the images."""
        self._up.clear()
        self._tell("stop")
        for number, answer in enumerate(await self._rest()):
            if answer != "stopped":
                raise UnexpectedError(f"writer {number} failed: {answer}")
        if await self._node_names() != self._nodes:
            raise UnexpectedError(f"at the end the nodes are {await self._node_names()}, at first {self._nodes}")
        status = await self._daemon.end(signal.SIGTERM)
        if status:
            raise UnexpectedError(f"at the end the daemon's status was {status}:\n{self._daemon.last_words()}")
        await self._check_images("at the end")
        contents = [await self._converted(disk) for disk in range(len(DISK_NAMES))]
        before = self._ledger.before()
        await self._judge_disks("at the end", Limits(before.acked, *self._ledger.after(before)[:2]), contents)
        log = self._daemon.log.read_text(errors="replace")
        if "Traceback" in log:
            raise UnexpectedError(f"the daemon's log tells of a bug:\n{log[log.index('Traceback') :][:2000]}")


class _Deaf:
    """Reads what a server says, and makes nothing of it."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(4 * KiB))

    def receive_buffer(self) -> memoryview:
        """See `Receiver`."""
        return self._buffer

    def received(self, count: int) -> None:
        """See `Receiver`."""

    def sent(self) -> None:
        """See `Receiver`."""

    def closed(self, error: object) -> None:
        """See `Receiver`."""


def _states(held: list[int], zeroed: array.array[int]) -> array.array[int]:
    """The states of sectors as they were found."""
    return array.array(
        "Q",
        [
            (zeroed[sector] * 2 + 1 if zeroed[sector] else 0) if number == ZEROES else number * 2
            for sector, number in enumerate(held)
        ],
    )


def _forget_cached(paths: list[str]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The gravest of what went wrong at once: a wrong byte, else whatever came first."""
    flat: list[BaseException] = []
    heap: list[BaseException] = [group]
    while heap:
        error = heap.pop(0)
        if isinstance(error, BaseExceptionGroup):
            heap += error.exceptions
        else:
            flat.append(error)
    return next((error for error in flat if isinstance(error, WrongError)), flat[0])
