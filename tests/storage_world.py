"""For tests of storages: reading at once, and kernels that lack something."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from fleecer import spares
from fleecer.ranges import Buffer
from fleecer.storage.api import Storage


def read_at_once(storage: Storage, offset: int, length: int) -> Buffer | None:
    """What can be had of a storage without a wait; None where it cannot."""
    return spares.take_filled(storage.try_pread_into, offset, length)


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
