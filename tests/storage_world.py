"""For tests of files: kernels that lack something, and the race of reads and writes of one range."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any
from unittest import mock

import pytest

from fleecer.block.nodes.file import FileNode
from fleecer.storage.file import FileStorage


def without_nowait(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A kernel that refuses reads with flags; returns the flags of each read asked for, as they come."""
    real = os.preadv
    asked: list[int] = []

    def no_flags(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", no_flags)
    return asked


async def nothing_tears(storage: FileStorage, length: int) -> None:
    """Reads that are never inline, beside writes that are inline every other time, are of one write each."""
    node = FileNode("disk0", storage)
    await node.pwrite(0, b"\x01" * length)

    async def read() -> None:
        data = bytes(await node.pread(0, length))
        assert data == data[:1] * length

    def never(storage: FileStorage, *request: object) -> None:
        return None

    with mock.patch.object(FileStorage, "try_pread", never):
        for step in range(100):
            writes = never if step % 2 else FileStorage.try_pwrite
            with mock.patch.object(FileStorage, "try_pwrite", writes):
                await asyncio.gather(read(), node.pwrite(0, bytes([step + 2]) * length), read(), read())
