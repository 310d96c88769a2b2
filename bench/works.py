"""The works on a disk as it is: a guest's reads and writes, sizes in memory, start-up, block status.

A work is run once for one subject and gives figures by name. It checks that it did what it says: that a warm run read
nothing from storage and a cold one did. Snapshots are in `snapshot_works`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from bench import fio, images
from bench.figures import BenchError, Figures
from bench.images import Disk, Format, Images
from bench.process import call
from bench.subjects import Server, Subject, served

Place = Literal["disk", "tmpfs"]
Access = Literal["read", "write", "randread", "randwrite"]

GUEST_TIMEOUT_S = 300.0
MAKING_TIMEOUT_S = 1800.0
MiB = 1 << 20
TiB = 1 << 40


@dataclass(frozen=True)
class Settings:
    """How much of it: seconds of a timed run, the image's size, and how many clusters a first-touch run touches."""

    run_s: float
    image_bytes: int
    touches: int


class Stand:
    """What a work has at hand: settings, programs, the images of its place, a directory for sockets and reports."""

    def __init__(self, settings: Settings, images_here: Images, directory: str) -> None:
        self.settings = settings
        self.images = images_here
        self.directory = directory
        self.fio = images.program("fio")

    def guest(self, jobs: Sequence[fio.Arguments], name: str = "fio") -> fio.Run:
        """Starts fio."""
        return fio.Run(self.fio, self.directory, jobs, name)


class Work(Protocol):
    """One piece of work."""

    def run(self, stand: Stand, subject: Subject) -> Figures:
        """Does it once. Raises BenchError."""
        ...


@contextlib.contextmanager
def process_time(server: Server, figures: Figures, name: str) -> Iterator[list[float]]:
    """Notes the server's processor time a unit of work inside, in microseconds; the caller puts the number of units."""
    before = server.cpu_s()
    units: list[float] = []
    yield units
    after = server.cpu_s()
    if before is not None and after is not None and units:
        figures[name] = (after - before) / units[0] * 1e6


@dataclass(frozen=True)
class Guest:
    """A guest at work on a disk: requests of one size and kind, `depth` in flight on each connection.

    Warm runs take a fixed time, over and over the same image. Cold reads, and writes to an overlay, which change what
    they find, meet each part once: the latter are a fixed number of requests.
    """

    format: Format
    access: Access
    block: int
    depth: int
    connections: int = 1
    cold: bool = False
    flushes: bool = False  # after each write, as a database does

    def run(self, stand: Stand, subject: Subject) -> Figures:
        writes = self.access in ("write", "randwrite")
        with stand.images.disk(self.format) as disk:
            images.settle(disk)
            (images.cool if self.cold else images.warm)(disk)
            with served(subject, stand.directory, [disk]) as server:
                figures: Figures = {}
                fetched = server.fetched_bytes()
                with process_time(server, figures, "cpu") as units:
                    result = stand.guest([self._job(stand, server, disk)]).result(GUEST_TIMEOUT_S)
                    units.append(result.requests)
                fetched = server.fetched_bytes() - fetched
        if not writes:
            self._check_cache(fetched, result, disk.size)
        return figures | {
            "requests": result.rate,
            "throughput": result.mib_rate,
            "p50": result.p50_us,
            "p99": result.p99_us,
            "max": result.max_us,
            "fetched": float(fetched),
        }

    def _job(self, stand: Stand, server: Server, disk: Disk) -> list[str]:
        run_ms = round(stand.settings.run_s * 1000)
        options = [f"--rw={self.access}", f"--bs={self.block}", f"--iodepth={self.depth}", f"--size={disk.size}"]
        options += [f"--numjobs={self.connections}", *server.fio_target()]
        if self.flushes:
            options.append("--fsync=1")
        if self.format == "overlay" and self.access in ("write", "randwrite"):
            share = stand.settings.touches * 4096 if self.block == 4096 else disk.size // 2
            return [*options, f"--io_size={share // self.connections // self.block * self.block}"]
        if self.cold:
            return [*options, f"--runtime={run_ms}ms"]
        return [*options, f"--runtime={run_ms}ms", "--time_based"]

    def _check_cache(self, fetched: int, result: fio.Result, size: int) -> None:
        moved = min(result.bytes_moved, size)
        if self.cold and fetched < moved // 2:
            raise BenchError(f"a cold run read {moved} bytes, of which only {fetched} came from storage")
        if not self.cold and fetched > result.bytes_moved // 50 + 4 * MiB:
            raise BenchError(f"a warm run read {fetched} of {result.bytes_moved} bytes from storage")


@dataclass(frozen=True)
class Memory:
    """A server's start-up time and resident memory, with nothing done yet, then with `clients` at work at once."""

    clients: int = 64

    def run(self, stand: Stand, subject: Subject) -> Figures:
        with stand.images.disk("qcow2") as disk, served(subject, stand.directory, [disk]) as server:
            figures: Figures = {"start": server.process.start_s * 1e3}
            figures["idle"] = server.process.resident_bytes() / MiB
            jobs = ["--rw=randread", "--bs=64k", "--iodepth=4", f"--numjobs={self.clients}", *server.fio_target()]
            jobs += [f"--runtime={round(stand.settings.run_s * 1000)}ms", "--time_based", f"--size={disk.size}"]
            stand.guest([jobs]).result(GUEST_TIMEOUT_S)
            return figures | {"clients": server.process.resident_peak_bytes() / MiB}


@dataclass(frozen=True)
class MappedMemory:
    """Peak resident memory after reads all over a qcow2 image of 4 TiB whose every cluster is mapped."""

    size: int = 4 * TiB
    requests: int = 100_000

    def run(self, stand: Stand, subject: Subject) -> Figures:
        make = functools.partial(stand.images.empty, "qcow2", self.size, "-o", "preallocation=metadata", name="mapped")
        disk = stand.images.kept(f"mapped-{self.size}", make)
        with served(subject, stand.directory, [disk]) as server:
            job = ["--rw=randread", "--bs=4k", "--iodepth=16", "--norandommap", f"--size={self.size}"]
            stand.guest([[*job, f"--io_size={self.requests * 4096}", *server.fio_target()]]).result(GUEST_TIMEOUT_S)
            return {"mapped": server.process.resident_peak_bytes() / MiB}


@dataclass(frozen=True)
class Exports:
    """Start-up time and resident memory of a server of many small disks."""

    count: int = 1000

    def run(self, stand: Stand, subject: Subject) -> Figures:
        disks: list[Disk] = []
        try:
            for index in range(self.count):
                path = stand.images.path("small.raw")
                with open(path, "xb") as file:
                    file.truncate(MiB)
                disks.append(Disk(f"disk{index}", "raw", path, MiB, (path,)))
            with served(subject, stand.directory, disks) as server:
                listing = call([images.program("nbdinfo"), "--size", server.uri(disks[-1].name)], stand.directory)
                if int(listing) != MiB:
                    raise BenchError(f"the last of {self.count} exports has {listing.strip()} bytes")
                return {
                    "start": server.process.start_s * 1e3,
                    "resident": server.process.resident_bytes() / MiB,
                }
        finally:
            stand.images.remove(*disks)


@dataclass(frozen=True)
class Status:
    """Where the data is, asked of a sparse qcow2 image of 4 TiB with many extents: nbdinfo's map of all of it."""

    size: int = 4 * TiB
    extents: int = 100_000

    def run(self, stand: Stand, subject: Subject) -> Figures:
        disk = scattered(stand, self.size, self.extents, 64 << 10)
        images.warm(disk)
        figures: Figures = {}
        with served(subject, stand.directory, [disk]) as server:
            begun = time.perf_counter()
            with process_time(server, figures, "cpu") as units:
                command = [images.program("nbdinfo"), "--map", server.uri(disk.name)]
                found = sum(line.endswith("data") for line in call(command, stand.directory).splitlines())
                units.append(1)
            figures["map"] = (time.perf_counter() - begun) * 1e3
        if found != self.extents:
            raise BenchError(f"the map has {found} extents of data; there are {self.extents}")
        return figures


def scattered(stand: Stand, size: int, extents: int, length: int) -> Disk:
    """A qcow2 image with so many extents of data, evenly spread. It is made once and stays as it is."""
    key = f"scattered-{size}-{extents}-{length}"
    return stand.images.kept(key, lambda: _make_scattered(stand, size, extents, length))


def _make_scattered(stand: Stand, size: int, extents: int, length: int) -> Disk:
    """Written by a qemu-storage-daemon, so that the image is laid out as QEMU does it."""
    disk = stand.images.empty("qcow2", size)
    listing = os.path.join(stand.directory, "writes")
    with open(listing, "x", encoding="ascii") as file:
        spacing = size // extents // length * length
        file.write(fio.request_list([(index * spacing, length) for index in range(extents)]))
    try:
        maker = Subject("qemu", "qsd", (images.program("qemu-storage-daemon"),))
        with served(maker, stand.directory, [disk]) as server:
            job = [f"--read_iolog={listing}", "--filename=guest", "--iodepth=16", *server.fio_target()]
            stand.guest([job]).result(MAKING_TIMEOUT_S)
        return disk
    except BaseException:
        stand.images.remove(disk)
        raise
    finally:
        os.unlink(listing)
