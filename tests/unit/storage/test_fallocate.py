"""Zeroing without writing: the chain of means, and what each file system refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecer.ranges import is_zero
from fleecer.storage import fallocate

SIZE = 1 << 20


@pytest.fixture(params=["disk", "memory"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """A file full of data on tmp_path's file system, and one on tmpfs."""
    directory = str(tmp_path) if request.param == "disk" else "/dev/shm"
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"x" * SIZE)
        file.flush()
        os.fsync(file.fileno())
        yield file.fileno()


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize("refused", [[], ["punch"], ["zero"], ["punch", "zero"], ["punch", "zero", "allocate"]])
def test_every_way_leaves_zeroes_in_the_range_and_nothing_else(
    fd: int, unmap: bool, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "punch": fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE,
        "zero": fallocate.ZERO_RANGE | fallocate.KEEP_SIZE,
        "allocate": fallocate.KEEP_SIZE,
    }
    real = fallocate.fallocate
    asked: list[int] = []

    def refusing(fd: int, mode: int, offset: int, length: int) -> None:
        asked.append(mode)
        if mode in {kinds[name] for name in refused}:
            raise OSError(errno.EOPNOTSUPP, "refused")
        real(fd, mode, offset, length)

    monkeypatch.setattr(fallocate, "fallocate", refusing)
    modes = fallocate.Modes()
    for offset, length in ((65536, 131072), (1000, 5), (SIZE - 70_000, 70_000)):
        fallocate.zero_range(fd, modes, offset, length, unmap=unmap)
        assert is_zero(os.pread(fd, length, offset))
    expected = bytearray(b"x" * SIZE)
    for offset, length in ((65536, 131072), (1000, 5), (SIZE - 70_000, 70_000)):
        expected[offset : offset + length] = bytes(length)
    assert os.pread(fd, SIZE + 1, 0) == expected
    for name in refused:
        assert asked.count(kinds[name]) <= 1, "a refused mode was asked for again"


def test_unmap_frees_space_and_its_opposite_keeps_it(fd: int) -> None:
    modes = fallocate.Modes()
    full = allocated(fd)
    fallocate.zero_range(fd, modes, 0, SIZE // 2, unmap=False)
    assert allocated(fd) >= full
    fallocate.zero_range(fd, modes, 0, SIZE // 2, unmap=True)
    assert allocated(fd) <= full - SIZE // 2
    fallocate.zero_range(fd, modes, 0, SIZE // 2, unmap=False)
    assert allocated(fd) >= full
    assert is_zero(os.pread(fd, SIZE // 2, 0))


def test_real_failures_are_raised_and_not_taken_for_refusals(fd: int) -> None:
    modes = fallocate.Modes()
    with pytest.raises(OSError, match="Bad file descriptor"):
        modes.attempt(-1, fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE, 0, 1)
    assert modes.attempt(fd, fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE, 0, 4096)


def test_a_call_that_a_signal_interrupts_is_repeated(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        calls = 0

        def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
            self.calls += 1
            if self.calls < 3:
                ctypes.set_errno(errno.EINTR)
                return -1
            return 0

    libc = Interrupted()
    monkeypatch.setattr(fallocate, "_libc", libc)
    fallocate.fallocate(fd, 0, 0, 1)
    assert libc.calls == 3


def test_a_write_of_nothing_is_an_error(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(OSError, match="Input/output error"):
        fallocate.write_zeroes(fd, 0, 10)


def test_zeroes_are_written_to_the_end_however_short_the_writes(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:700], offset))
    fallocate.write_zeroes(fd, 10, 3000)
    monkeypatch.undo()
    assert os.pread(fd, 3012, 9) == b"x" + bytes(3000) + b"x" * 11


def test_trying_whether_holes_can_be_punched_changes_nothing(fd: int) -> None:
    before, space = os.pread(fd, SIZE, 0), allocated(fd)
    assert fallocate.can_punch(fd, SIZE)
    assert (os.pread(fd, SIZE + 1, 0), allocated(fd)) == (before, space)


def test_files_in_memory_are_told_from_files_on_disk(tmp_path: Path) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as memory, open("/proc/self/stat", "rb") as other:
        assert fallocate.is_in_memory(memory.fileno())
        assert not fallocate.is_in_memory(other.fileno())
    assert not fallocate.is_in_memory(-1)
