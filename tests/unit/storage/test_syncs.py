"""Syncs by the kernel: what is told and when, their limit, their end, and threads where there are none.

Each rule is tried on a stand-in for the kernel's calls, which a test can hold up, and where possible on the kernel.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import gc
import os
import platform
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecer.errors import IoError
from fleecer.polling import Polling
from fleecer.storage import syncs as syncs_module
from fleecer.storage.file import FileStorage, create_file
from fleecer.storage.pool import Pool, running_pool
from fleecer.storage.syncs import SWITCH_VARIABLE, SYNCS_MAX, Syncs, open_syncs

SETUP, DESTROY, SUBMIT, GET_EVENTS = 206, 207, 209, 208


class StandIn:
    """Behaves as syscall(2) of a queue, on a machine with the numbers of x86-64; completes nothing until `complete`.

    `gone` is whether the queue was given back, `refuses` which calls fail.
    """

    def __init__(self) -> None:
        self.refuses: set[int] = set()
        self.under_way: list[tuple[int, int, int]] = []  # number, file, eventfd
        self.done: list[tuple[int, int]] = []
        self.gone = False

    def __call__(self, call: Any, *arguments: Any) -> int:
        if call.value in self.refuses:
            ctypes.set_errno(errno.EAGAIN)
            return -1
        assert not self.gone
        if call.value == SUBMIT:
            request = arguments[2]._obj.contents
            self.under_way.append((request.data, request.fd, request.eventfd))
            return 1
        if call.value == GET_EVENTS:
            done, self.done = self.done, []
            for event, (number, result) in zip(arguments[3], done, strict=False):
                event.data, event.result = number, result
            return len(done)
        self.gone = call.value == DESTROY
        return 0

    def complete(self, count: int = 1, result: int = 0) -> None:
        for _ in range(count):
            number, _, eventfd = self.under_way.pop(0)
            self.done.append((number, result))
            os.eventfd_write(eventfd, 1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(syncs_module, "_syscall", made)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return made


@pytest.fixture
async def syncs(kernel: StandIn) -> AsyncIterator[Syncs]:
    made = open_syncs()
    assert made is not None
    yield made
    kernel.complete(len(kernel.under_way))
    await made.idle()
    made.close()
    assert kernel.gone
    made.close()  # nothing more


@pytest.fixture
async def pool(kernel: StandIn) -> AsyncIterator[Pool]:
    yield running_pool()
    kernel.complete(len(kernel.under_way))
    await running_pool().close()


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[FileStorage]:
    """A file whose name is durable."""
    made = await create_file(str(tmp_path / "disk"), size=4096)
    await made.sync()
    made._is_in_memory = False  # wherever the tests run
    yield made
    await made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_kernel_syncs_and_tells_once_and_later(file: int) -> None:
    syncs = open_syncs()
    if syncs is None:
        pytest.skip("this kernel, or machine, syncs in threads only")
    told: list[int] = []
    for number in range(3):
        os.pwrite(file, b"x", number)
        assert syncs.begin(file, told.append)
    assert not told
    async with asyncio.timeout(60):
        await syncs.idle()
    assert told == [0, 0, 0]
    assert not syncs.busy
    syncs.close()


async def test_what_cannot_be_synced_is_not_begun() -> None:
    syncs = open_syncs()
    if syncs is None:
        pytest.skip("this kernel, or machine, syncs in threads only")
    reading, writing = os.pipe()
    told: list[int] = []
    try:
        assert not syncs.begin(writing, told.append)
        assert not syncs.busy
    finally:
        os.close(reading)
        os.close(writing)
    syncs.close()
    assert not told


async def test_each_hears_of_its_own_result(syncs: Syncs, kernel: StandIn, file: int) -> None:
    told: list[tuple[str, int]] = []

    def tell(name: str, result: int) -> None:
        told.append((name, result))

    for name in "abc":
        assert syncs.begin(file, functools.partial(tell, name))
    assert [fd for _, fd, _ in kernel.under_way] == [file] * 3
    await turns()
    assert not told
    kernel.under_way.insert(0, kernel.under_way.pop(1))  # they end in any order
    kernel.complete(1, -errno.EIO)
    await turns()
    assert told == [("b", -errno.EIO)]
    kernel.complete(2)
    await turns()
    assert told == [("b", -errno.EIO), ("a", 0), ("c", 0)]


async def test_so_many_at_once_and_no_more(syncs: Syncs, kernel: StandIn, file: int) -> None:
    told: list[int] = []
    assert all(syncs.begin(file, told.append) for _ in range(SYNCS_MAX))
    assert not syncs.begin(file, told.append)
    kernel.complete()
    await turns()
    assert syncs.begin(file, told.append)
    assert told == [0]


async def test_what_the_kernel_refuses_was_not_begun(syncs: Syncs, kernel: StandIn, file: int) -> None:
    told: list[int] = []
    kernel.refuses.add(SUBMIT)
    assert not syncs.begin(file, told.append)
    assert not syncs.busy
    assert syncs._polling is None or not syncs._polling._suspended
    kernel.refuses.clear()


async def test_no_queue_is_closed_while_one_is_under_way(syncs: Syncs, kernel: StandIn, file: int) -> None:
    assert syncs.begin(file, lambda _: None)
    with pytest.raises(AssertionError):
        syncs.close()
    idle = asyncio.create_task(syncs.idle())
    await turns()
    assert not idle.done()
    kernel.complete()
    await idle


async def test_the_loop_sleeps_while_one_is_under_way(syncs: Syncs, kernel: StandIn, file: int) -> None:
    polling = Polling(asyncio.get_running_loop())
    syncs._polling = polling
    assert syncs.begin(file, lambda _: None)
    assert syncs.begin(file, lambda _: None)
    polling.arrived()
    assert not polling._is_awake
    kernel.complete()
    await turns(1)
    polling.arrived()
    assert not polling._is_awake, "another goes on"
    kernel.complete()
    while syncs.busy:
        await asyncio.sleep(0)
    assert polling._is_awake, "who waited for it will ask anew"


@pytest.mark.parametrize("why", ["it is switched off", "the kernel gives none", "the machine is not known"])
async def test_there_is_none_where(kernel: StandIn, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    before = os.listdir("/proc/self/fd")
    if why == "it is switched off":
        monkeypatch.setenv(SWITCH_VARIABLE, "off")
    elif why == "the kernel gives none":
        kernel.refuses.add(SETUP)
    else:
        monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    assert open_syncs() is None
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_there_is_none_where_no_descriptor_is_left(kernel: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "eventfd", none_left)
    assert open_syncs() is None


async def test_there_is_none_where_the_loop_cannot_watch_it(kernel: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", refuses)
    assert open_syncs() is None
    gc.collect()
    assert kernel.gone


async def test_who_takes_the_end_badly_costs_nobody_else_theirs(syncs: Syncs, kernel: StandIn, file: int) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def raises(_: int) -> None:
        raise ZeroDivisionError

    told: list[int] = []
    assert syncs.begin(file, raises)
    assert syncs.begin(file, told.append)
    kernel.complete(2)
    await syncs.idle()
    assert told == [0]
    assert [type(context["exception"]) for context in reported] == [ZeroDivisionError]


def test_a_loop_that_goes_without_closing_gives_back_what_it_had(kernel: StandIn) -> None:
    async def main() -> int:
        syncs = open_syncs()
        assert syncs is not None
        return syncs._fd

    fd = asyncio.run(main())
    gc.collect()
    assert kernel.gone
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# Files, and the pool.


async def test_a_file_is_synced_without_a_thread(
    pool: Pool, kernel: StandIn, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda _: pytest.fail("a thread syncs"))
    syncing = asyncio.create_task(storage.sync())
    await turns()
    assert [fd for _, fd, _ in kernel.under_way] == [storage._fd]
    assert not syncing.done()
    kernel.complete()
    await syncing


async def test_a_sync_that_failed_names_the_file(pool: Pool, kernel: StandIn, storage: FileStorage) -> None:
    told: list[Exception | None] = []
    assert storage.begin_sync(told.append)
    kernel.complete(1, -errno.EIO)
    await turns()
    (error,) = told
    assert isinstance(error, IoError)
    assert error.errno == errno.EIO
    assert storage.name in str(error)
    syncing = asyncio.create_task(storage.sync())
    await turns()
    kernel.complete(1, -errno.ENOSPC)
    with pytest.raises(IoError, match="No space left on device"):
        await syncing


async def test_a_thread_syncs_what_the_kernel_does_not_take(
    pool: Pool, kernel: StandIn, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    kernel.refuses.add(SUBMIT)
    assert not storage.begin_sync(lambda _: None)
    await storage.sync()
    assert synced == [storage._fd]


async def test_a_thread_syncs_beside_the_kernel(pool: Pool, kernel: StandIn, storage: FileStorage) -> None:
    told: list[Exception | None] = []
    assert storage.begin_sync(told.append)
    kernel.refuses.add(SUBMIT)
    async with asyncio.timeout(60):
        await storage.sync()
    with pytest.raises(AssertionError, match="work in flight"):
        await storage.close()
    kernel.complete()
    await turns()
    assert told == [None]


async def test_a_new_file_is_synced_by_a_thread_which_syncs_its_name_too(
    pool: Pool, kernel: StandIn, tmp_path: Path
) -> None:
    storage = await create_file(str(tmp_path / "new"), size=4096)
    assert not storage.begin_sync(lambda _: None)
    await storage.sync()
    storage._is_in_memory = False  # wherever the tests run
    assert storage.begin_sync(lambda _: None)
    kernel.complete()
    await turns()
    await storage.close()


async def test_a_file_in_memory_is_synced_at_once(
    pool: Pool, kernel: StandIn, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    storage._is_in_memory = True
    told: list[Exception | None] = []
    assert storage.begin_sync(told.append)
    assert told == [None]
    await storage.sync()
    assert synced == [storage._fd, storage._fd]
    assert not kernel.under_way


async def test_a_file_is_closed_only_after_the_sync_of_one_who_was_cancelled(
    pool: Pool, kernel: StandIn, storage: FileStorage
) -> None:
    syncing = asyncio.create_task(storage.sync())
    await turns()
    syncing.cancel()
    await turns()
    assert not syncing.done(), "nobody can take it back"
    kernel.complete()
    with pytest.raises(asyncio.CancelledError):
        await syncing


async def test_a_pool_is_closed_only_after_its_syncs(kernel: StandIn, storage: FileStorage) -> None:
    pool = running_pool()
    told: list[Exception | None] = []
    assert storage.begin_sync(told.append)
    closing = asyncio.create_task(pool.close())
    await turns(5)
    assert not closing.done()
    assert not kernel.gone
    kernel.complete()
    await closing
    assert told == [None]
    assert kernel.gone
