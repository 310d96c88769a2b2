"""The ring: what it reads, its limits and order, cancelled waiters, its end, and when there is none.

Each rule is tried on a stand-in for the kernel, which a test can hold up, and where possible on the kernel itself.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.storage_world import read_at_once, without_nowait

from fleecer.block.nodes.file import FileNode
from fleecer.errors import IoError
from fleecer.storage.file import RING_MAX_BYTES, SKIPS_MAX, FileStorage, create_file
from fleecer.storage.lanes import Lane
from fleecer.storage.pool import Pool, running_pool
from fleecer.storage.ring import READS_MAX, SWITCH_VARIABLE, Disk, Ring

SIZE = 1 << 20


class Completion:
    def __init__(self, request: Any, res: int) -> None:
        self.res = res
        self._request = request

    def take_user_data(self) -> Any:
        return self._request


class StandIn:
    """Behaves as `uring_api.Ring`; while `held` it completes nothing. `answer` makes a result another one."""

    def __init__(self, *_: int) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.closed = False
        self.held = False
        self.answer: Callable[[int], int] = lambda res: res
        self.prepared: list[tuple[int, Any, int, Any]] = []
        self.submitted: list[tuple[int, Any, int, Any]] = []
        self.batches: list[int] = []

    def prepare_read(self, fd: int, buffer: Any, offset: int, request: Any) -> None:
        self.prepared.append((fd, buffer, offset, request))

    def wait(self, timeout: float) -> list[Completion] | None:
        assert timeout == 0
        if self.prepared:
            self.batches.append(len(self.prepared))
        self.submitted += self.prepared
        self.prepared.clear()
        if self.held or not self.submitted:
            return None
        completions = [self._read(*read) for read in self.submitted]
        self.submitted.clear()
        return completions

    def _read(self, fd: int, buffer: Any, offset: int, request: Any) -> Completion:
        try:
            res = os.preadv(fd, [buffer], offset)
        except OSError as error:
            res = -(error.errno or errno.EIO)
        return Completion(request, self.answer(res))

    def release(self) -> None:
        self.held = False
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        os.close(self.fd)


def kernels_own() -> Any:
    """A real ring, or a skip that says why there is none here."""
    import uring_api

    try:
        return uring_api.Ring(256, uring_api.IORING_SETUP_COOP_TASKRUN)
    except OSError as error:
        pytest.skip(f"this kernel gives no io_uring: {error}")


@pytest.fixture(params=[StandIn, kernels_own])
async def ring(request: pytest.FixtureRequest) -> AsyncIterator[Ring]:
    made = Ring(request.param())
    yield made
    await made.idle()
    made.close()


@pytest.fixture
async def held() -> AsyncIterator[tuple[Ring, StandIn]]:
    """A ring whose kernel completes nothing until told."""
    kernel = StandIn()
    kernel.held = True
    made = Ring(kernel)
    yield made, kernel
    kernel.release()
    await made.idle()
    made.close()
    made.close()  # nothing more


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk0"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def forget_cached(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def reading(ring: Ring, disk: Disk, fd: int, buffer: bytearray, offset: int) -> asyncio.Future[int]:
    """Begins a read; the future has what the ring told of its end."""
    count: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    ring.read(disk, fd, buffer, offset, count.set_result)
    return count


async def test_it_reads_what_is_there_and_tells_how_much(ring: Ring, file: int) -> None:
    disk, expected = Disk(), os.pread(file, SIZE, 0)
    forget_cached(file)
    offsets = random.Random(2).sample(range(0, SIZE - 4096, 512), 300)
    buffers = [bytearray(4096) for _ in offsets]
    reads = [reading(ring, disk, file, buffer, offset) for buffer, offset in zip(buffers, offsets, strict=True)]
    assert await asyncio.gather(*reads) == [4096] * 300
    for buffer, offset in zip(buffers, offsets, strict=True):
        assert buffer == expected[offset : offset + 4096]
    assert await reading(ring, disk, file, bytearray(4096), SIZE - 100) == 100
    assert await reading(ring, disk, file, bytearray(4096), SIZE) == 0
    closed = os.dup(file)
    os.close(closed)
    assert await reading(ring, disk, closed, bytearray(1), 0) == -errno.EBADF
    assert disk.running == 0


async def test_a_disk_has_no_more_than_its_limit_under_way_and_the_rest_in_order(
    held: tuple[Ring, StandIn], file: int
) -> None:
    ring, kernel = held
    disk, done = Disk(), list[int]()

    async def read(number: int) -> None:
        await reading(ring, disk, file, bytearray(1), number)
        done.append(number)

    tasks = [asyncio.create_task(read(number)) for number in range(READS_MAX + 8)]
    await turns(3)
    assert [offset for _, _, offset, _ in kernel.submitted] == list(range(READS_MAX))
    reading(ring, Disk(), file, bytearray(1), 999)
    assert [offset for _, _, offset, _ in kernel.prepared] == [999], "another disk has its own share"
    kernel.release()
    await asyncio.gather(*tasks)
    assert done == list(range(READS_MAX + 8))
    assert disk.running == 0


async def test_what_is_asked_in_one_turn_of_the_loop_is_one_call(held: tuple[Ring, StandIn], file: int) -> None:
    ring, kernel = held
    for count in (1, 16, 20):
        for _ in range(count):
            reading(ring, Disk(), file, bytearray(1), 0)
        await turns(3)
    assert kernel.batches == [1, 16, 20]


async def test_a_read_that_the_kernel_does_not_take_is_answered_with_an_error_number(
    held: tuple[Ring, StandIn], file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, kernel = held
    disk = Disk()
    reads = [reading(ring, disk, file, bytearray(1), 0) for _ in range(3 * READS_MAX)]  # most of them wait
    await turns(3)

    def full(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(kernel, "prepare_read", full)
    assert await reading(ring, Disk(), file, bytearray(1), 0) == -errno.EAGAIN
    kernel.release()
    assert await asyncio.gather(*reads) == [1] * READS_MAX + [-errno.EAGAIN] * 2 * READS_MAX
    assert disk.running == 0


async def test_a_kernel_that_is_busy_is_asked_again(
    held: tuple[Ring, StandIn], file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, kernel = held
    kernel.held = False
    asked: list[float] = []
    real = kernel.wait

    def busy(timeout: float) -> list[Completion] | None:
        asked.append(timeout)
        if len(asked) < 4:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(timeout)

    monkeypatch.setattr(kernel, "wait", busy)
    assert await reading(ring, Disk(), file, bytearray(1), 0) == 1
    assert len(asked) >= 4


async def test_a_bug_in_one_who_is_told_does_not_cost_the_others_their_end(
    held: tuple[Ring, StandIn], file: int
) -> None:
    ring, kernel = held
    bugs: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: bugs.append(context))
    disk = Disk()

    def broken(count: int) -> None:
        raise ZeroDivisionError(count)

    ring.read(disk, file, bytearray(1), 0, broken)
    others = [reading(ring, disk, file, bytearray(1), 0) for _ in range(2 * READS_MAX)]
    await turns(3)
    kernel.release()
    assert await asyncio.gather(*others) == [1] * 2 * READS_MAX
    assert [type(bug["exception"]) for bug in bugs] == [ZeroDivisionError]
    assert disk.running == 0


async def test_idle_waits_for_what_is_under_way_and_closing_before_that_is_a_bug(
    held: tuple[Ring, StandIn], file: int
) -> None:
    ring, kernel = held
    reads = [reading(ring, Disk(), file, bytearray(1), 0) for _ in range(3)]
    waiting = [asyncio.create_task(ring.idle()) for _ in range(2)]
    await turns(5)
    assert not any(task.done() for task in waiting)
    with pytest.raises(AssertionError):
        ring.close()
    kernel.release()
    await asyncio.gather(*waiting)
    assert all(read.done() for read in reads)


# The pool's ring.


async def rings(pool: Pool) -> Ring | None:
    """The pool's ring, once it had time to be loaded."""
    pool.ring()
    while pool._running:
        await asyncio.sleep(0)
    await turns(3)
    return pool.ring()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    yield running_pool()
    await running_pool().close()


class StandInModule:
    """Takes the place of uring_api; `made` are the rings."""

    IORING_SETUP_COOP_TASKRUN = 256

    def __init__(self) -> None:
        self.made: list[StandIn] = []
        self.refusal: OSError | None = None

    def Ring(self, *arguments: int) -> StandIn:  # noqa: N802 - the name of what it stands for
        if self.refusal is not None:
            raise self.refusal
        self.made.append(StandIn(*arguments))
        return self.made[-1]


@pytest.fixture
def uring_api(monkeypatch: pytest.MonkeyPatch) -> StandInModule:
    module = StandInModule()
    monkeypatch.delenv(SWITCH_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "uring_api", module)
    return module


async def test_a_pool_has_one_ring_and_closes_it(uring_api: StandInModule, file: int) -> None:
    pool = Pool()
    assert pool.ring() is None, "nobody waits for it to be loaded"
    ring = await rings(pool)
    assert ring is not None
    assert await rings(pool) is ring
    (kernel,) = uring_api.made
    kernel.held = True
    read = reading(ring, Disk(), file, bytearray(1), 0)
    closing = asyncio.create_task(pool.close())
    await turns(5)
    assert not closing.done()
    kernel.release()
    await closing
    assert read.done()
    assert kernel.closed
    await pool.close()


async def test_a_pool_that_is_closed_while_its_ring_is_loaded_gets_none(uring_api: StandInModule) -> None:
    pool = Pool()
    pool.ring()
    await pool.close()
    await turns(5)
    assert all(kernel.closed for kernel in uring_api.made)


@pytest.mark.parametrize("why", ["switched off", "not installed", "forbidden", "old kernel"])
async def test_where_there_can_be_no_ring_there_is_none(
    why: str, uring_api: StandInModule, monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    match why:
        case "switched off":
            monkeypatch.setenv(SWITCH_VARIABLE, "off")
        case "not installed":
            monkeypatch.setitem(sys.modules, "uring_api", None)
        case "forbidden":
            uring_api.refusal = PermissionError(errno.EPERM, "Operation not permitted")
        case "old kernel":
            uring_api.refusal = OSError(errno.EINVAL, "Invalid argument")
    assert await rings(pool) is None
    assert not uring_api.made


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_loop_that_goes_without_closing_takes_its_ring_along(
    run: Callable[[Coroutine[Any, Any, Any]], Any], uring_api: StandInModule
) -> None:
    async def main() -> weakref.ref[Pool]:
        assert await rings(running_pool()) is not None
        return weakref.ref(running_pool())

    gone = run(main())
    gc.collect()
    assert gone() is None
    os.close(uring_api.made[0].fd)


# Files.


@pytest.fixture(params=["stand-in", "kernel"])
async def disk(
    request: pytest.FixtureRequest, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FileStorage]:
    """A file that the loop's ring reads where it is not cached, and none of it is, says preadv."""
    monkeypatch.delenv(SWITCH_VARIABLE, raising=False)
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "uring_api", StandInModule())
    else:
        kernels_own().close()
    assert await rings(pool) is not None
    storage = await create_file(str(tmp_path / "disk0"), size=SIZE)
    await storage.pwrite(0, random.Random(3).randbytes(SIZE))
    storage._inline_read_flags = os.RWF_NOWAIT
    storage._has_missed = True
    yield storage
    await storage.close()


@pytest.fixture
async def empty(uring_api: StandInModule, tmp_path: Path, pool: Pool) -> AsyncIterator[FileStorage]:
    """A file of zeroes in a loop with a ring, of which reads are tried inline."""
    assert await rings(pool) is not None
    storage = await create_file(str(tmp_path / "empty"), size=SIZE)
    storage._inline_read_flags = os.RWF_NOWAIT
    yield storage
    await storage.close()


class Tries:
    """Counts inline reads; says of all that they are not `cached`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.cached = False
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            self.count += 1
            if not self.cached:
                raise BlockingIOError(errno.EAGAIN, "would block")
        return self._real(fd, buffers, offset)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    return Tries(monkeypatch)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of the reads that went to a thread."""
    offsets: list[int] = []
    real = FileStorage._pread

    def noted(storage: FileStorage, offset: int, length: int, size: int) -> Any:
        offsets.append(offset)
        return real(storage, offset, length, size)

    monkeypatch.setattr(FileStorage, "_pread", noted)
    return offsets


async def test_what_is_not_cached_is_read_by_the_ring(disk: FileStorage, tries: Tries, threads: list[int]) -> None:
    expected = random.Random(3).randbytes(SIZE)
    for offset in range(0, SIZE, 4096):
        assert read_at_once(disk, offset, 4096) is None
        assert await disk.pread(offset, 4096) == expected[offset : offset + 4096]
    assert not threads
    assert await disk.pread(0, RING_MAX_BYTES + 1) == expected[: RING_MAX_BYTES + 1]
    assert threads == [0], "long reads are for threads"


async def test_a_read_that_was_begun_tells_its_end_once_and_later(
    disk: FileStorage, tries: Tries, threads: list[int]
) -> None:
    expected = random.Random(3).randbytes(SIZE)
    told: list[tuple[bytes, Exception | None]] = []
    for offset in (0, 4096, SIZE - 100):
        assert disk.begin_pread(offset, 4096, lambda data, error: told.append((bytes(data), error)))
    assert not disk.begin_pread(0, RING_MAX_BYTES + 1, lambda *_: told.append((b"", None))), "that is for threads"
    assert not told
    while len(told) < 3:
        await asyncio.sleep(0)
    await turns(5)
    assert told == [
        (expected[:4096], None),
        (expected[4096:8192], None),
        (expected[-100:] + bytes(3996), None),
    ]
    assert threads == [SIZE - 100], "what passes the end"
    os.truncate(disk._fd, SIZE - 4096)
    assert disk.begin_pread(SIZE - 4096, 4096, lambda data, error: told.append((bytes(data), error)))
    while len(told) < 4:
        await asyncio.sleep(0)
    assert "cut short" in str(told[-1][1])


async def test_a_cancelled_waiter_is_told_only_when_the_kernel_has_let_go(
    uring_api: StandInModule, empty: FileStorage, tries: Tries
) -> None:
    (kernel,) = uring_api.made
    kernel.held = True
    assert read_at_once(empty, 0, 4096) is None
    waiter = asyncio.create_task(empty.pread(0, 4096))
    await turns(3)
    waiter.cancel()
    await turns(10)
    assert not waiter.done()
    kernel.release()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_a_file_says_that_its_reads_wait_while_none_would_be_tried(disk: FileStorage, tries: Tries) -> None:
    assert not disk.reads_wait
    for _ in range(40):
        waits, before = disk.reads_wait, tries.count
        assert read_at_once(disk, 0, 4096) is None
        assert waits is (tries.count == before)
        await disk.pread(0, 4096)
    assert tries.count < 10
    disk._skips = 0
    for may_try in (False, True):
        disk._disk.may_try = may_try
        assert disk.reads_wait is not may_try


async def test_where_nothing_is_cached_few_reads_are_tried_inline_until_one_is(disk: FileStorage, tries: Tries) -> None:
    async def read() -> None:
        for _ in range(3):  # as many hands as a read goes through
            if read_at_once(disk, 0, 4096) is not None:
                return
        await disk.pread(0, 4096)

    for _ in range(200):
        await read()
    assert 200 // (SKIPS_MAX + 1) <= tries.count <= 200 // (SKIPS_MAX + 1) + 6
    tries.cached = True
    tries.count = 0
    for _ in range(100):
        await read()
    assert tries.count >= 100 - SKIPS_MAX
    tries.cached = False
    assert read_at_once(disk, 0, 4096) is None
    await disk.pread(0, 4096)
    tries.cached = True
    assert read_at_once(disk, 0, 4096) is not None, "one miss says nothing of the next read"


@pytest.mark.parametrize("switch", ["", "off"])
async def test_a_disk_that_hangs_is_not_asked_more_than_it_takes(
    switch: str,
    uring_api: StandInModule,
    tmp_path: Path,
    pool: Pool,
    tries: Tries,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, switch)
    assert (await rings(pool) is None) is bool(switch)
    files = [await create_file(str(tmp_path / f"disk{number}"), size=SIZE) for number in range(3)]
    for storage in files:
        storage._inline_read_flags = os.RWF_NOWAIT
    go_on = threading.Event()
    if switch:
        real = FileStorage._pread

        def hang(storage: FileStorage, offset: int, length: int, size: int) -> Any:
            assert go_on.wait(60)
            return real(storage, offset, length, size)

        monkeypatch.setattr(FileStorage, "_pread", hang)
    else:
        uring_api.made[0].held = True

    async def read(storage: FileStorage, offset: int) -> None:
        assert read_at_once(storage, offset, 4096) is None
        assert await storage.pread(offset, 4096) == bytes(4096)

    reads = [asyncio.create_task(read(files[number % 3], number % 200 * 4096)) for number in range(2000)]
    await turns(5)
    tried = tries.count
    go_on.set()
    for kernel in uring_api.made:
        kernel.release()
    await asyncio.gather(*reads)
    assert tried <= READS_MAX + 1
    for storage in files:
        await storage.close()


async def test_reads_are_tried_inline_again_while_many_go_on_to_end(empty: FileStorage, tries: Tries) -> None:
    at_once = 0

    async def reader() -> None:
        nonlocal at_once
        for _ in range(300):
            if read_at_once(empty, 0, 4096) is None:
                await empty.pread(0, 4096)
            else:
                at_once += 1
                await asyncio.sleep(0)

    readers = [asyncio.create_task(reader()) for _ in range(4 * READS_MAX)]
    while not tries.count or empty._disk.may_try:
        await asyncio.sleep(0)
    tries.cached = True  # all at once, while more than enough are under way
    await asyncio.gather(*readers)
    assert at_once > 150 * len(readers)


async def test_what_was_not_seen_to_be_read_with_nowait_is_not_for_the_ring(
    uring_api: StandInModule, tmp_path: Path, pool: Pool, threads: list[int]
) -> None:
    assert await rings(pool) is not None
    storage = await create_file(str(tmp_path / "disk0"), size=SIZE)
    await storage.pread(0, 4096)
    assert threads == [0]
    assert not uring_api.made[0].batches
    await storage.close()


async def test_a_pool_ends_what_goes_on_in_the_ring_once_a_thread_is_done(
    uring_api: StandInModule, tmp_path: Path
) -> None:
    pool = Pool()
    ring = await rings(pool)
    assert ring is not None
    path = tmp_path / "disk0"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)
    go_on = threading.Event()

    async def both() -> int:
        await pool.submit(Lane(), go_on.wait, 60)
        return await reading(ring, Disk(), fd, bytearray(4096), 0)

    waiter = asyncio.create_task(both())
    await turns(3)
    closing = asyncio.create_task(pool.close())
    await turns(3)
    go_on.set()
    await closing
    assert await waiter == 4096
    assert uring_api.made[0].closed
    os.close(fd)


async def test_what_the_ring_cannot_read_a_thread_explains(disk: FileStorage, tries: Tries, threads: list[int]) -> None:
    data = await disk.pread(SIZE - 100, 4096)
    assert data == random.Random(3).randbytes(SIZE)[-100:] + bytes(3996)
    os.ftruncate(disk._fd, 4096)
    with pytest.raises(IoError, match="the file ends at byte 4096 but had 1048576 bytes: it was cut short"):
        await disk.pread(8192, 4096)
    assert threads == [SIZE - 100, 8192]


async def test_an_error_of_the_ring_is_left_to_a_thread(
    uring_api: StandInModule, tmp_path: Path, pool: Pool, threads: list[int]
) -> None:
    assert await rings(pool) is not None
    uring_api.made[0].answer = lambda res: -errno.EAGAIN
    storage = await create_file(str(tmp_path / "disk0"), size=SIZE)
    storage._has_missed = True
    assert await storage.pread(0, 4096) == bytes(4096)
    assert threads == [0]
    await storage.close()


@pytest.mark.parametrize("in_memory", [True, False])
async def test_files_in_memory_and_those_without_nowait_are_not_for_the_ring(
    in_memory: bool, uring_api: StandInModule, empty: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_nowait(monkeypatch)
    empty._is_in_memory = in_memory
    for offset in (0, SIZE):  # there, and past the end: that is missed too
        if read_at_once(empty, offset, 4096) is None:
            await empty.pread(offset, 4096)
    assert not uring_api.made[0].batches


async def test_a_write_waits_for_a_read_of_its_range_that_the_ring_has(
    uring_api: StandInModule, empty: FileStorage, tries: Tries
) -> None:
    node = FileNode("disk0", empty)
    empty._has_missed = uring_api.made[0].held = True
    read = asyncio.create_task(node.pread(0, 4096))
    await turns(3)
    assert uring_api.made[0].submitted
    write = asyncio.create_task(node.pwrite(4095, b"n"))
    await turns(10)
    was_written = write.done() or await asyncio.to_thread(Path(empty.name).read_bytes) != bytes(SIZE)
    uring_api.made[0].release()
    assert await read == bytes(4096)
    assert not was_written
    await write
