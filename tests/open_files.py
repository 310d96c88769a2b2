"""Which files this process has open: for tests of what is left behind."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def open_files(directory: Path) -> list[str]:
    """Those below `directory`. Only files: loops and sockets of other tests go whenever Python collects them."""
    found: list[str] = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which they are listed
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(path for path in found if path.startswith(f"{str(directory).rstrip('/')}/"))
