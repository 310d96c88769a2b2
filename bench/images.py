"""The images that subjects serve, and the state of the page cache over them.

Images hold no zeroes, so that nobody gets by with less. The same file serves every subject in turn; what changes in
use (an overlay that is written to) is made anew for each run. All made here goes with `Images.close`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from bench.figures import BenchError
from bench.process import call

Format = Literal["raw", "qcow2", "overlay"]

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Disk:
    """An image: its name as an export, its driver, its size as a guest sees it, and all files that hold its data."""

    name: str
    driver: Literal["raw", "qcow2"]
    path: str
    size: int
    files: tuple[str, ...]


class Images:
    """The images of one place, made when they are first asked for."""

    def __init__(self, directory: str, size: int) -> None:
        self.directory = directory
        self.size = size
        self._made: dict[str, Disk] = {}
        self._qemu_img = program("qemu-img")
        self._serial = 0

    @contextlib.contextmanager
    def disk(self, kind: Format) -> Iterator[Disk]:
        """The disk of a format, full of data. An overlay is new, has no data of its own, and goes again."""
        if kind != "overlay":
            yield self._full(kind)
            return
        base = self._full("raw")
        path = self.path("overlay.qcow2")
        self._run("create", "-q", "-f", "qcow2", "-b", base.path, "-F", "raw", path)
        try:
            yield Disk("disk0", "qcow2", path, self.size, (path, base.path))
        finally:
            os.unlink(path)

    def empty(self, kind: Literal["raw", "qcow2"], size: int, *options: str, name: str = "disk0") -> Disk:
        """A new image without data, removed with `remove`. `options` go to qemu-img create."""
        path = self.path(f"{name}.{kind if kind == 'qcow2' else 'raw'}")
        self._run("create", "-q", "-f", kind, *options, path, str(size))
        return Disk(name, kind, path, size, (path,))

    def kept(self, key: str, make: Callable[[], Disk]) -> Disk:
        """A disk that takes long to make: made when first asked for, and kept as long as these images are."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def path(self, ending: str) -> str:
        """A path that is not in use."""
        self._serial += 1
        return os.path.join(self.directory, f"{self._serial}-{ending}")

    def remove(self, *disks: Disk) -> None:
        """Removes images made by `empty`."""
        for disk in disks:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(disk.path)

    def close(self) -> None:
        """Removes what is left."""
        for disk in self._made.values():
            self.remove(disk)
        self._made.clear()

    def _full(self, kind: Literal["raw", "qcow2"]) -> Disk:
        if kind not in self._made:
            path = self.path(f"full.{kind}")
            self._made[kind] = Disk("disk0", kind, path, self.size, (path,))
            if kind == "raw":
                fill(path, self.size)
            else:
                self._run("convert", "-q", "-f", "raw", "-O", "qcow2", self._full("raw").path, path)
        return self._made[kind]

    def _run(self, *arguments: str) -> None:
        call([self._qemu_img, *arguments], self.directory)


def fill(path: str, size: int) -> None:
    """Makes a file of `size` bytes without zeroes in it."""
    piece = memoryview(os.urandom(_PIECE_BYTES).replace(b"\0", b"\1"))
    with open(path, "xb") as file:
        file.writelines(piece[: min(_PIECE_BYTES, size - start)] for start in range(0, size, _PIECE_BYTES))


def settle(disk: Disk) -> None:
    """Writes back what is dirty, so that no run pays for the one before it."""
    for path in disk.files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def warm(disk: Disk) -> None:
    """Brings all data of an image into the page cache."""
    for path in disk.files:
        if cached_bytes(path) < os.stat(path).st_blocks * 512:
            with open(path, "rb", buffering=0) as file:
                buffer = bytearray(1 << 20)
                while file.readinto(buffer):
                    pass


def cool(disk: Disk) -> None:
    """Takes an image out of the page cache. Raises BenchError where that does not work, as on tmpfs."""
    settle(disk)
    for path in disk.files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = cached_bytes(path)
        if left > os.path.getsize(path) // 100 + (1 << 20):
            raise BenchError(f"{path}: {left} bytes stay in the page cache; a cold run cannot be made here")


def cached_bytes(path: str) -> int:
    """How much of a file is in the page cache."""
    told = call([program("fincore"), "--bytes", "--json", path], os.path.dirname(path))
    entry = json.loads(told)["fincore"][0]
    return int(entry["res"])


def program(name: str) -> str:
    """The path of a program. Raises BenchError that says it is missing."""
    found = shutil.which(name)
    if found is None:
        raise BenchError(f"{name} is not installed; the bench needs it")
    return found
