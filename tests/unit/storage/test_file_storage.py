"""Files and block devices: what is opened, short reads and writes, the inline path, holes, and durability."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import stat
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.open_files import open_files
from tests.storage_world import read_at_once, without_nowait

from fleecer.block.edge import Edge
from fleecer.block.nodes.file import FileNode
from fleecer.errors import FleecerError, IoError, UsageError
from fleecer.ranges import is_zero
from fleecer.storage.file import (
    EXTENTS_MAX,
    INLINE_MAX_BYTES,
    LONG_BYTES,
    FileStorage,
    create_file,
    open_file,
    open_unlinked,
)
from fleecer.storage.inline import InlineWrites, LongWrites, _times_put_to_sleep
from fleecer.storage.pool import running_pool
from fleecer.storage.syncs import SWITCH_VARIABLE

SIZE = 1 << 20


@pytest.fixture(autouse=True)
async def pool() -> AsyncIterator[None]:
    yield
    await running_pool().close()


@pytest.fixture(params=["disk", "memory"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path, pool: None) -> AsyncIterator[FileStorage]:
    """An empty file of SIZE bytes on tmp_path's file system, and one on tmpfs."""
    (opened,) = await open_unlinked(str(tmp_path) if request.param == "disk" else "/dev/shm", [SIZE])
    yield opened
    await opened.close()


# Opening.


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkfifo, "is a FIFO; only regular files and block devices will do"),
        (os.mkdir, "is a directory; only"),
        (make_socket, "is a socket; only"),
        (lambda path: os.symlink("/dev/zero", path), "is a character device; only"),
    ],
)
@pytest.mark.parametrize("read_only", [True, False])
async def test_what_is_no_image_is_refused_at_once(
    tmp_path: Path, make: Callable[[str], None], text: str, read_only: bool
) -> None:
    path = str(tmp_path / "x")
    make(path)
    with pytest.raises(UsageError, match=f"image '{path}' {text}"):
        await open_file(path, read_only=read_only)


async def test_a_fifo_that_takes_a_files_place_between_look_and_open_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "x")
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda path: os.fstat(os.open(__file__, os.O_RDONLY)))
    with pytest.raises(UsageError, match="is a FIFO"):
        await open_file(path, read_only=True)


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("missing", errno.ENOENT, "does not exist"),
        ("plain/below", errno.ENOTDIR, "does not exist: what its path has for a directory is none"),
        ("x" * 300, errno.ENAMETOOLONG, "does not exist: no name may be longer than 255 bytes, no path than 4095"),
    ],
)
async def test_an_error_names_the_path_and_the_reason(tmp_path: Path, name: str, code: int, text: str) -> None:
    (tmp_path / "plain").touch()
    with pytest.raises(IoError, match=f"^image '{tmp_path}/.*' {text}$") as caught:
        await open_file(str(tmp_path / name))
    assert caught.value.errno == code
    assert isinstance(caught.value.__cause__, OSError)


async def test_force_share_is_for_readers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="force-share is for reading only"):
        await open_file(str(tmp_path / "x"), force_share=True)


async def test_an_open_file_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "disk0"
    path.write_bytes(b"x" * 1234)
    os.link(path, tmp_path / "link")
    one = await open_file(str(path), read_only=True)
    two = await open_file(str(tmp_path / "link"), read_only=True)
    assert (one.name, one.size, one.read_only, one.is_block_device) == (str(path), 1234, True, False)
    assert one.identity == two.identity
    assert not one.limits.growable
    assert not one.limits.can_discard
    assert os.get_inheritable(one._fd) is False
    await one.close()
    await two.close()
    await two.close()
    writer = await open_file(str(path))
    assert writer.limits.growable
    assert writer.limits.can_discard
    assert writer.limits.zero_is_fast
    await writer.close()


async def test_a_new_file_is_private_has_its_size_and_reads_as_zero(tmp_path: Path) -> None:
    path = str(tmp_path / "new")
    made = await create_file(path, size=100_000)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert made.size == os.stat(path).st_size == 100_000
    assert is_zero(await made.pread(0, 100_000))
    await made.close()


async def test_an_existing_file_is_spared_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"precious")
    with pytest.raises(IoError, match="File exists"):
        await create_file(str(path))
    assert path.read_bytes() == b"precious"
    made = await create_file(str(path), size=3, exclusive=False)
    assert path.read_bytes() == bytes(3)
    await made.close()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is a FIFO; only regular files will do"):
        await create_file(str(tmp_path / "fifo"), exclusive=False)


async def test_a_creation_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(IoError, match="resize to 9223372036854775807 bytes on") as caught:
        await create_file(str(path), size=(1 << 63) - 1)
    assert caught.value.errno == errno.EFBIG
    assert not path.exists()


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP, errno.EISDIR])
async def test_a_scratch_file_has_no_name(tmp_path: Path, code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without_tmpfile(path: str, flags: int, mode: int = 0o777, **options: Any) -> int:
        if code is not None and flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", without_tmpfile)
    (scratch,) = await open_unlinked(str(tmp_path), [0])
    assert os.listdir(tmp_path) == []
    await scratch.pwrite(5, b"abc")
    assert await scratch.pread(0, 10) == bytes(5) + b"abc" + bytes(2)
    await scratch.close()
    with pytest.raises(IoError, match=r"create a scratch file on '.*/missing': No such file"):
        await open_unlinked(str(tmp_path / "missing"), [0])


async def test_of_several_scratches_there_are_all_or_none(tmp_path: Path, pool: None) -> None:
    opened = await open_unlinked(str(tmp_path), [4096, 0, 512])
    assert [storage.size for storage in opened] == [4096, 0, 512]
    for storage in opened:
        await storage.close()
    with pytest.raises(IoError, match="resize to 9223372036854775807 bytes"):
        await open_unlinked(str(tmp_path), [4096, (1 << 63) - 1])
    assert not open_files(tmp_path)


async def test_a_file_tells_where_it_is_though_a_link_led_to_it_and_it_was_moved(tmp_path: Path, pool: None) -> None:
    one, other, links = (tmp_path / name for name in ("one", "other", "links"))
    for directory in (one, other, links):
        directory.mkdir()
    (one / "disk").write_bytes(bytes(512))
    (links / "disk").symlink_to(one / "disk")
    storage = await open_file(str(links / "disk"), read_only=True)
    assert storage.directory() == str(one)
    (one / "disk").rename(other / "disk")
    assert storage.directory() == str(other)
    (other / "disk").unlink()
    assert storage.directory() == str(other)
    await storage.close()


async def test_no_descriptor_is_left_after_failures(tmp_path: Path) -> None:
    (tmp_path / "disk0").touch()
    holder = await open_file(str(tmp_path / "disk0"))
    assert len(open_files(tmp_path)) == 1
    os.mkfifo(tmp_path / "fifo")
    for _ in range(5):
        for name in ("disk0", "fifo", "missing"):
            with pytest.raises(FleecerError):
                await open_file(str(tmp_path / name))
    assert len(open_files(tmp_path)) == 1
    await holder.close()


# Reading and writing.


async def test_random_requests_match_a_model(storage: FileStorage) -> None:
    generator = random.Random(1)
    model = bytearray(SIZE)
    for step in range(150):
        length = generator.choice([1, 512, 4096, 5000, 100_000, SIZE])
        offset = generator.randrange(SIZE - length + 1)
        data = generator.randbytes(length)
        match generator.randrange(6):
            case 0:
                if storage.try_pwrite(offset, data):
                    model[offset : offset + length] = data
            case 1:
                await storage.pwrite(offset, data)
                model[offset : offset + length] = data
            case 2:
                await storage.zero(offset, length, unmap=step % 2 == 0)
                model[offset : offset + length] = bytes(length)
            case 3:
                found = read_at_once(storage, offset, length)
                assert found is None or found == model[offset : offset + length]
            case 4:
                assert await storage.pread(offset, length) == model[offset : offset + length]
            case _:
                await storage.discard(offset, length)
                left = await storage.pread(offset, length)
                if left != model[offset : offset + length]:
                    assert all(b in {0, old} for b, old in zip(left, model[offset : offset + length], strict=True))
                model[offset : offset + length] = left
    assert await storage.pread(0, SIZE) == model
    assert storage.size == SIZE


async def test_bytes_past_the_end_read_as_zero(storage: FileStorage) -> None:
    await storage.truncate(1000)
    await storage.pwrite(0, b"x" * 1000)
    assert await storage.pread(990, 34) == b"x" * 10 + bytes(24)
    assert await storage.pread(5000, 100) == bytes(100)
    assert read_at_once(storage, 990, 34) is None, "a short inline read is for the pool to complete"


async def test_what_somebody_else_cut_off_is_an_error_and_never_zeroes(tmp_path: Path, pool: None) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 5000)
    storage = await open_file(str(path))
    try:
        os.truncate(path, 3000)
        assert read_at_once(storage, 2990, 20) is None
        text = "the file ends at byte 3000 but had 5000 bytes: it was cut short; restore it from a backup"
        for work in (storage.pread(2990, 20), storage.pread(4000, 2000), storage.extents(2990, 2010)):
            with pytest.raises(IoError, match=text) as caught:
                await work
            assert caught.value.errno == errno.EIO
        assert await storage.pread(0, 3000) == b"x" * 3000
        assert await storage.extents(0, 3000) == [(3000, True)]
        assert await storage.pread(5000, 100) == bytes(100), "past the size that is known there was never anything"
        os.truncate(path, 5000)
        assert await storage.pread(2990, 20) == b"x" * 10 + bytes(10), "nothing tells that the file was shorter"
    finally:
        await storage.close()


async def test_a_file_that_grows_while_a_read_past_its_end_is_under_way_was_not_cut(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def grows_after(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = real(fd, buffers, offset, flags)
        storage.try_pwrite(SIZE, b"y" * 4096)  # as the loop's thread may, between this read and what follows it
        return count

    monkeypatch.setattr(os, "preadv", grows_after)
    assert await storage.pread(SIZE, 4096) == bytes(4096)
    assert storage.size == SIZE + 4096


@pytest.mark.parametrize("most", [1, 511, 512, 513, 9_999])
async def test_short_reads_and_writes_are_continued(
    storage: FileStorage, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pwrite, real_preadv = os.pwrite, os.preadv

    def short_pwrite(fd: int, data: Any, offset: int) -> int:
        return real_pwrite(fd, memoryview(data)[:most], offset)

    def short_preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return real_preadv(fd, [memoryview(buffers[0])[:most]], offset, flags)

    monkeypatch.setattr(os, "pwrite", short_pwrite)
    monkeypatch.setattr(os, "preadv", short_preadv)
    data = random.Random(2).randbytes(10_000)
    await storage.pwrite(77, data)
    assert read_at_once(storage, 77, 10_000) is None
    assert await storage.pread(77, 10_000) == data
    # "Done" means all of it, and "not done" nothing, also past the end.
    assert storage.try_pwrite(SIZE - 5_000, data) is True
    assert storage.size == SIZE + 5_000
    assert await storage.pread(SIZE - 5_000, 10_000) == data


@pytest.mark.parametrize("at_once", [False, True])
async def test_what_a_write_that_failed_left_past_the_end_is_there_at_once(
    storage: FileStorage, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pwrite = os.pwrite

    def fills_up(fd: int, data: Any, offset: int) -> int:
        if offset >= SIZE + 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_pwrite(fd, memoryview(data)[:100], offset)

    node = FileNode("disk", storage)
    edge = Edge(node, "guest", "file", writable=True, may_grow=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fills_up)
        with pytest.raises(IoError, match=f"4096 bytes at {SIZE}"):
            await edge.pwrite(SIZE, b"x" * 4096, tried=not at_once)
    assert storage.size == node.size == SIZE + 100
    assert bytes(await edge.pread(SIZE, 100)) == b"x" * 100


async def test_a_write_of_nothing_is_an_error(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(IoError) as caught:
        await storage.pwrite(0, b"x")
    assert caught.value.errno == errno.EIO
    with pytest.raises(IoError) as caught:
        storage.try_pwrite(0, b"x")
    assert caught.value.errno == errno.EIO


async def test_a_write_that_runs_out_of_space_says_so_on_either_path(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    text = "write of 3 bytes at 10 on '.*': No space left on device"
    with pytest.raises(IoError, match=text) as caught:
        storage.try_pwrite(10, b"abc")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(IoError, match=text):
        await storage.pwrite(10, b"abc")
    assert storage.size == SIZE


async def test_errors_of_every_operation_name_it_and_its_range(tmp_path: Path) -> None:
    path = tmp_path / "disk0"
    path.write_bytes(bytes(8192))
    reader = await open_file(str(path), read_only=True)
    changes: list[tuple[Coroutine[Any, Any, object], str]] = [
        (reader.pwrite(1, b"x"), "write of 1 bytes at 1"),
        (reader.zero(4096, 10, unmap=True), "write zeroes of 10 bytes at 4096"),
        (reader.truncate(1), "resize to 1 bytes"),
    ]
    for request, text in changes:
        with pytest.raises(IoError, match=f"^{text} on '{path}': "):
            await request
    with pytest.raises(IoError, match="write of 1 bytes at 1"):
        reader.try_pwrite(1, b"x")
    await reader.close()
    requests: list[tuple[Coroutine[Any, Any, object], str]] = [
        (reader.pread(0, 1), "read of 1 bytes at 0"),
        (reader.sync(), "flush"),
        (reader.extents(0, 10), "block status of 10 bytes at 0"),
    ]
    for request, text in requests:
        with pytest.raises(IoError, match=f"^{text} on '{path}': Bad file descriptor"):
            await request
    assert read_at_once(reader, 0, 1) is None


# The inline path.


async def test_cached_pages_and_memory_are_read_inline(storage: FileStorage) -> None:
    await storage.pwrite(0, b"x" * SIZE)
    found = [read_at_once(storage, offset, 4096) for offset in range(0, SIZE, 65536)]
    assert sum(data == b"x" * 4096 for data in found) >= len(found) - 1
    assert read_at_once(storage, 0, INLINE_MAX_BYTES + 1) is None


async def test_inline_reads_do_not_share_their_buffers(storage: FileStorage) -> None:
    await storage.pwrite(0, b"x" * 8192)
    one = read_at_once(storage, 0, 4096) or await storage.pread(0, 4096)
    two = read_at_once(storage, 0, 4096) or await storage.pread(0, 4096)
    await storage.pwrite(0, b"y" * 8192)
    memoryview(two)[:] = b"z" * 4096
    assert one == b"x" * 4096


async def test_pages_that_are_not_cached_go_to_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await create_file(str(tmp_path / "disk0"), size=SIZE)
    await storage.pwrite(0, b"x" * SIZE)
    real = os.preadv

    def nothing_cached(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "would block")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", nothing_cached)
    assert read_at_once(storage, 0, 4096) is None
    assert await storage.pread(0, 4096) == b"x" * 4096
    monkeypatch.undo()
    # And for real, as far as the kernel lets go of the pages.
    await storage.sync()
    os.posix_fadvise(storage._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert await storage.pread(0, SIZE) == b"x" * SIZE
    await storage.close()


@pytest.mark.parametrize(("in_memory", "inline"), [(True, True), (False, False)])
async def test_where_the_kernel_knows_no_inline_reads_only_memory_is_read_inline(
    storage: FileStorage, in_memory: bool, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage.pwrite(0, b"x" * 4096)
    storage._inline_read_flags = os.RWF_NOWAIT
    asked = without_nowait(monkeypatch)
    storage._is_in_memory = in_memory
    for _ in range(3):
        assert (read_at_once(storage, 0, 4096) == b"x" * 4096) is inline
    assert asked == [os.RWF_NOWAIT, *([0] * 3 if inline else [])], "it is found out once"


class Clock:
    """A clock that a test sets; each reading costs `step_s`. `asleep` tells whether the kernel makes writers wait."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.step_s = 0.0
        self.asleep = True
        self.sleeps = 0

    def __call__(self) -> float:
        self.now_s += self.step_s
        self.sleeps += self.asleep
        return self.now_s

    def policy(self) -> InlineWrites:
        """A policy that goes by this clock."""
        return InlineWrites(self, lambda: self.sleeps)


async def test_slow_writes_send_those_that_follow_to_the_pool_for_a_while(storage: FileStorage) -> None:
    clock = Clock()
    storage._inline_writes = clock.policy()
    assert storage.try_pwrite(0, b"w")
    clock.step_s = InlineWrites.SLOW_S * 2
    assert storage.try_pwrite(0, b"x"), "one slow write may be chance"
    assert storage.try_pwrite(0, b"y"), "the slow write itself is done"
    clock.step_s = 0.0
    assert not storage.try_pwrite(0, b"z")
    clock.now_s += InlineWrites.PAUSE_MIN_S * 0.9
    assert not storage.try_pwrite(0, b"z")
    assert await storage.pread(0, 1) == b"y", "a write that was not allowed touched nothing"
    clock.now_s += InlineWrites.PAUSE_MIN_S * 0.2
    assert storage.try_pwrite(0, b"z")


def test_a_busy_machine_is_no_slow_disk(storage: FileStorage) -> None:
    clock = Clock()
    clock.asleep = False
    clock.step_s = InlineWrites.SLOW_S * 2
    storage._inline_writes = clock.policy()
    for _ in range(5):
        assert storage.try_pwrite(0, b"x"), "what took so long was another process"
    clock.asleep = True
    assert storage.try_pwrite(0, b"x")
    assert not storage.try_pwrite(0, b"x")


def test_a_thread_that_waits_is_put_to_sleep_and_one_that_computes_is_not() -> None:
    before = _times_put_to_sleep()
    sum(range(1000))
    computed = _times_put_to_sleep() - before
    for _ in range(20):
        time.sleep(0.001)
    assert _times_put_to_sleep() - before - computed >= 20
    assert computed < 5


def timed(policy: InlineWrites, clock: Clock, took_s: float) -> float:
    """Tells the policy of a write that took so long; returns the pause that follows."""
    begun_s = clock.now_s = max(clock.now_s, policy.resume_at_s)
    if policy.quick_to_go:
        policy.look_closely()
    clock.now_s += took_s
    policy.ended(begun_s, clock())
    return policy.resume_at_s - clock.now_s


def test_the_pause_doubles_while_trials_stay_slow_and_starts_anew_after_quick_ones() -> None:
    clock = Clock()
    policy = clock.policy()
    assert timed(policy, clock, 0.01) <= 0
    assert [timed(policy, clock, 0.01) for _ in range(7)] == pytest.approx([1, 2, 4, 8, 16, 16, 16])
    for _ in range(InlineWrites.RECENT_WRITES - 1):
        assert timed(policy, clock, 0.0001) <= 0
    assert timed(policy, clock, 0.01) == pytest.approx(16)
    for _ in range(InlineWrites.RECENT_WRITES):
        assert timed(policy, clock, 0.0001) <= 0
    assert timed(policy, clock, 0.01) <= 0, "the slow ones are forgotten"
    assert timed(policy, clock, 0.01) == pytest.approx(1)


async def test_the_longest_writes_go_to_the_pool(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongWrites, "goes_beside", lambda _: False)
    assert storage.try_pwrite(0, bytes(INLINE_MAX_BYTES))
    assert not storage.try_pwrite(0, bytes(INLINE_MAX_BYTES + 1))


class Policy(LongWrites):
    """What is decided about writes that come one by one."""

    def alone(self) -> bool:
        """One comes, and ends before anything else. Whether it goes to a thread; it is asked for twice on its way."""
        if not self.goes_beside():
            return False
        assert self.goes_beside()
        self.begin()
        self.end()
        return True


def test_long_writes_one_by_one_seldom_go_to_a_thread() -> None:
    policy = Policy()
    outcomes = "".join("t" if policy.alone() else "." for _ in range(300))
    assert [len(run) for run in outcomes.split("t")[1:9]] == [1, 2, 4, 8, 16, 32, 64, 64]


def test_while_long_writes_overlap_they_go_to_threads_and_the_first_thereafter_too() -> None:
    policy = Policy()
    for _ in range(20):
        policy.alone()
    while not policy.goes_beside():
        pass
    policy.begin()
    for _ in range(10):
        assert policy.goes_beside(), "another is in a thread"
        policy.begin()
        policy.end()
    policy.end()
    assert policy.alone()
    assert [policy.alone() for _ in range(3)] == [False, True, False]


async def test_long_writes_that_overlap_are_written_beside_the_loop(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    entered, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        threads.append(threading.get_ident())
        entered.set()
        assert threading.current_thread() is threading.main_thread() or go_on.wait(60)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    length = LONG_BYTES + 1
    assert storage.try_pwrite(0, bytes(LONG_BYTES)), "not so long"
    assert not storage.try_pwrite(0, b"1" * length)
    assert not storage.try_pwrite(0, b"1" * length), "it is on its way to a thread, whoever tries it"
    first = asyncio.create_task(storage.pwrite(0, b"1" * length))
    await asyncio.sleep(0)
    assert not storage.try_pwrite(length, b"2" * length), "the first has not ended"
    second = asyncio.create_task(storage.pwrite(length, b"2" * length))
    while len(threads) < 3:
        await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(first, second)
    assert len({*threads}) == 3
    assert await storage.pread(0, 2 * length) == b"1" * length + b"2" * length
    assert not storage._long_writes._beside


async def test_syncs_do_not_take_the_places_of_reads(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    storage._is_in_memory = False
    monkeypatch.setattr(os, "fdatasync", lambda fd: go_on.wait(60))
    syncs = [asyncio.create_task(storage.sync()) for _ in range(20)]
    await asyncio.sleep(0)
    assert await storage.pread(0, 10) == bytes(10)
    go_on.set()
    await asyncio.gather(*syncs)


# Growing, holes, zeroes.


async def test_growth_never_shortens_the_file_under_another_write(storage: FileStorage) -> None:
    far = storage.pwrite(8 << 20, b"x" * 4096)
    near = [storage.zero((2 << 20) + i * 4096, 4096, unmap=True) for i in range(8)]
    await asyncio.gather(far, *near)
    assert storage.size == os.fstat(storage._fd).st_size == (8 << 20) + 4096
    assert await storage.pread(8 << 20, 4096) == b"x" * 4096


async def test_a_write_past_the_end_counts_once_all_of_it_is_done(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_way, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def by_halves(fd: int, data: Any, offset: int) -> int:
        count = real(fd, memoryview(data)[: 4096 if offset == SIZE else len(data)], offset)
        half_way.set()
        assert go_on.wait(60)
        return count

    monkeypatch.setattr(os, "pwrite", by_halves)
    writing = asyncio.ensure_future(storage.pwrite(SIZE, b"x" * 8192))
    while not half_way.is_set():
        await asyncio.sleep(0)
    assert os.fstat(storage._fd).st_size == SIZE + 4096
    assert storage.size == SIZE
    go_on.set()
    await writing
    assert storage.size == SIZE + 8192


async def test_zero_past_the_end_extends_with_zeroes(storage: FileStorage) -> None:
    await storage.pwrite(SIZE - 10, b"x" * 10)
    for unmap in (True, False):
        start = storage.size - 5
        await storage.zero(start, 5000, unmap=unmap)
        assert storage.size == os.fstat(storage._fd).st_size == start + 5000
        assert is_zero(await storage.pread(start, 5000))


async def test_extents_tell_data_and_holes_to_the_end_and_beyond(storage: FileStorage) -> None:
    unit = 65536
    await storage.pwrite(unit, b"x" * unit)
    await storage.pwrite(4 * unit, b"x" * unit)
    assert await storage.extents(0, SIZE) == [
        (unit, False),
        (unit, True),
        (2 * unit, False),
        (unit, True),
        (SIZE - 5 * unit, False),
    ]
    assert await storage.extents(unit + 1, 10) == [(unit - 1, True)], "data is told to its end"
    assert await storage.extents(0, 10) == [(10, False)]
    assert await storage.extents(SIZE - 10, 100) == [(100, False)]
    assert await storage.extents(SIZE + 10, 100) == [(100, False)]
    await storage.pwrite(SIZE - unit, b"x" * unit)
    assert await storage.extents(SIZE - 10, 100) == [(10, True), (90, False)]


async def test_a_file_of_many_pieces_is_told_bit_by_bit(storage: FileStorage) -> None:
    unit = 65536
    for i in range(EXTENTS_MAX):
        await storage.pwrite(i * 2 * unit, b"x")
    runs = await storage.extents(0, storage.size)
    assert len(runs) == EXTENTS_MAX
    assert sum(run for run, _ in runs) < storage.size


async def test_extents_end_however_the_file_changes_meanwhile(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole punched between asking for data and for its end: the answer must still move on."""
    monkeypatch.setattr(os, "lseek", lambda fd, offset, whence: offset)
    runs = await storage.extents(0, SIZE)
    assert 1 <= len(runs) <= EXTENTS_MAX
    assert all(run > 0 for run, _ in runs)


async def test_truncate_cuts_and_extends_with_zeroes(storage: FileStorage) -> None:
    await storage.pwrite(0, b"x" * 100)
    await storage.truncate(50)
    await storage.truncate(100)
    assert storage.size == 100
    assert await storage.pread(0, 100) == b"x" * 50 + bytes(50)


# Durability.


async def test_the_first_sync_of_a_new_file_makes_its_name_durable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "off")
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync " + os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("fdatasync " + os.readlink(f"/proc/self/fd/{fd}")))
    path = str(tmp_path / "new")
    storage = await create_file(path)
    await storage.sync()
    await storage.sync()
    assert calls == [f"fsync {path}", f"fsync {tmp_path}", f"fdatasync {path}"]
    await storage.close()


async def test_a_failed_sync_keeps_the_directory_on_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    storage = await create_file(str(tmp_path / "new"))
    monkeypatch.setattr(os, "fsync", fail)
    for _ in range(2):
        with pytest.raises(IoError, match=f"^flush on '{storage.name}': Input/output error$"):
            await storage.sync()
    await storage.close()


# Block devices.


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "image"
    image.write_bytes(b"x" * SIZE)
    done = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
async def test_a_block_device_has_its_size_and_takes_every_request(loop_device: str) -> None:
    storage = await open_file(loop_device)
    assert (storage.size, storage.is_block_device, storage.limits.growable) == (SIZE, True, False)
    assert await storage.pread(0, SIZE) == b"x" * SIZE
    await storage.zero(1000, 100_001, unmap=True)
    await storage.zero(300_000, 3, unmap=False)
    await storage.zero(400_000, 5000, unmap=False)
    await storage.pwrite(200_001, b"abc")
    await storage.discard(500_000, 100)
    await storage.sync()
    expected = bytearray(b"x" * SIZE)
    expected[1000:101_001] = bytes(100_001)
    expected[300_000:300_003] = bytes(3)
    expected[400_000:405_000] = bytes(5000)
    expected[200_001:200_004] = b"abc"
    assert await storage.pread(0, SIZE) == expected
    await storage.discard(600_000, 100_000)
    left = await storage.pread(600_000, 100_000)
    assert set(left) <= {0, ord("x")}
    assert await storage.extents(0, SIZE) == [(SIZE, True)]
    with pytest.raises(IoError, match="a block device cannot be resized from here"):
        await storage.truncate(SIZE * 2)
    with pytest.raises(IoError) as caught:
        await storage.pwrite(SIZE, b"x")
    assert caught.value.errno == errno.ENOSPC
    await storage.close()


@pytest.mark.root
async def test_a_disk_that_loses_data_at_a_flush_never_reports_success_again(tmp_path: Path) -> None:
    """A loop device over a full tmpfs: the kernel fails one fsync, drops the pages, and says yes to the next."""
    mount = str(tmp_path / "small")
    os.mkdir(mount)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=True)
    try:
        subprocess.run(["truncate", "-s", "8M", f"{mount}/image"], check=True)
        command = ["losetup", "--find", "--show", f"{mount}/image"]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        try:
            node = FileNode("disk0", await open_file(device))
            await node.pwrite(0, b"x" * (4 << 20))
            for _ in range(100):
                with pytest.raises(IoError, match="flush on 'disk0'"):
                    await node.flush()
            await node.storage.sync()  # the kernel's word, which the node does not pass on
            with pytest.raises(IoError):
                await node.flush()
            await node.close()
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)
    finally:
        subprocess.run(["umount", mount], check=True)
