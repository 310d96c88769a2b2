"""The works with a snapshot: writes that must be preserved first, copies of the past, latency meanwhile, the cut.

What is checked: that first touches preserved each cluster and second touches nothing; that copies are as long as the
disk; that the guest was writing before, across and after a cut.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench import fio, images
from bench.figures import BenchError, Figures
from bench.images import Disk, Format
from bench.process import Client
from bench.schemes import CLUSTER_BYTES, Scheme, scheme
from bench.subjects import SchemeName, Server, Subject, daemon_options, escaped, served, serving
from bench.works import GUEST_TIMEOUT_S, MiB, Stand, process_time, scattered

BUSY_S = 0.1
"""Of the processor: what a server has done by then for a guest shows that the guest writes."""
COPY_TIMEOUT_S = 600.0
STEADY_RATE = 2000
"""Requests a second of a guest whose latency is looked at: far from what any subject can do."""

Tool = Literal["nbdcopy", "qemu-img"]


@contextlib.contextmanager
def cut_disk(stand: Stand, subject: Subject, disk: Disk, name: SchemeName) -> Iterator[tuple[Server, Scheme, str]]:
    """A disk that is served and has just been cut: its server, the scheme at work, the export of the past."""
    images.settle(disk)
    images.warm(disk)
    with served(subject, stand.directory, [disk], name) as server:
        past = scheme(name, subject, server, stand.images)
        try:
            past.prepare()
            past.cut()
            yield server, past, past.publish()
        finally:
            past.close()


@dataclass(frozen=True)
class Touches:
    """4 KiB writes in random order, one to each cluster of a disk that has just been cut; then the same once more."""

    format: Format
    scheme: SchemeName
    depth: int
    connections: int = 1

    def run(self, stand: Stand, subject: Subject) -> Figures:
        count = stand.settings.touches
        figures: Figures = {}
        with (
            stand.images.disk(self.format) as disk,
            request_lists(stand, disk.size, count, self.connections) as lists,
            cut_disk(stand, subject, disk, self.scheme) as (server, past, _),
        ):
            jobs = [
                [f"--read_iolog={one}", "--filename=guest", f"--iodepth={self.depth}", *server.fio_target()]
                for one in lists
            ]
            kept = [past.preserved_bytes()]
            for touch in ("first", "second"):
                with process_time(server, figures, f"{touch} cpu") as units:
                    result = stand.guest(jobs).result(GUEST_TIMEOUT_S)
                    units.append(result.requests)
                kept.append(past.preserved_bytes())
                figures |= {
                    f"{touch} touch": result.rate,
                    f"{touch} p99": result.p99_us,
                    f"{touch} max": result.max_us,
                }
        check_preserved(kept, count * past.cluster_bytes)
        return figures


def check_preserved(kept: list[int], expected: int) -> None:
    """Whether bytes kept before, after the first and after the second touch are right. Raises BenchError.

    `expected` is what first touches preserve; a scratch in qcow2 has tables beside it, so a little more is allowed.
    """
    before, first, second = kept
    slack = expected // 20 + 2 * MiB
    if not expected <= first - before + MiB <= expected + slack + MiB:
        raise BenchError(f"first touches preserved {first - before} bytes; {expected} were to be")
    if abs(second - first) > slack:
        raise BenchError(f"second touches preserved {second - first} bytes more; none were to be")


@contextlib.contextmanager
def request_lists(stand: Stand, size: int, count: int, connections: int) -> Iterator[list[str]]:
    """Files of writes, one to the head of each of `count` clusters, dealt out to connections."""
    ranges = fio.touch_list(size, CLUSTER_BYTES, 4096, count)
    paths = [os.path.join(stand.directory, f"touches{index}") for index in range(connections)]
    try:
        for index, path in enumerate(paths):
            with open(path, "x", encoding="ascii") as file:
                file.write(fio.request_list(ranges[index::connections]))
        yield paths
    finally:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def copy_command(tool: Tool, uri: str, size: int) -> list[str]:
    """Reads an export whole, and forgets what it reads."""
    if tool == "nbdcopy":
        return [images.program("nbdcopy"), uri, "null:"]
    target = ["--target-image-opts", f"driver=null-co,size={size}"]
    return [images.program("qemu-img"), "convert", "-n", "-f", "raw", uri, *target]


@dataclass(frozen=True)
class Copy:
    """A snapshot is read whole, while the disk is left alone, or (`busy`) a guest writes as fast as it can."""

    format: Format
    tool: Tool
    busy: bool = False

    def run(self, stand: Stand, subject: Subject) -> Figures:
        figures: Figures = {}
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(stand.images.disk(self.format))
            server, _, export = stack.enter_context(cut_disk(stand, subject, disk, "snapshot"))
            if self.busy:
                job = ["--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={disk.size}", *server.fio_target()]
                used_s = server.cpu_s() or 0.0
                guest = stand.guest([[*job, f"--runtime={COPY_TIMEOUT_S:.0f}", "--time_based"]])
                stack.callback(guest.end)
                while (server.cpu_s() or 0.0) < used_s + BUSY_S:
                    if not guest.running():
                        raise BenchError("the guest has ended before the copy began")
                    time.sleep(0.01)
            begun = time.perf_counter()
            with process_time(server, figures, "cpu") as units:
                copier = Client(copy_command(self.tool, server.uri(export), disk.size), stand.directory)
                stack.callback(copier.end)
                copier.finish(COPY_TIMEOUT_S)
                units.append(disk.size / MiB)
            figures["copied"] = disk.size / MiB / (time.perf_counter() - begun)
            if self.busy:
                if not guest.running():
                    raise BenchError("the guest did not write until the copy's end")
                figures["guest"] = guest.stop().rate
        return figures


@dataclass(frozen=True)
class Isolation:
    """The latency of a guest at a steady rate, with a snapshot: left alone, while it is read, with a reader stalled."""

    format: Format

    def run(self, stand: Stand, subject: Subject) -> Figures:
        figures: Figures = {}
        with (
            stand.images.disk(self.format) as disk,
            cut_disk(stand, subject, disk, "snapshot") as (server, _, export),
        ):
            self._guest(stand, server, disk, "quiet", figures, seed=1)
            with reading(stand, server.uri(export)):
                self._guest(stand, server, disk, "read", figures, seed=2)
            with stalled_reader(server.nbd_socket, export, disk.size):
                self._guest(stand, server, disk, "stalled", figures, seed=3)
        figures["read/quiet"] = figures["read p99"] / figures["quiet p99"]
        figures["stalled/quiet"] = figures["stalled p99"] / figures["quiet p99"]
        return figures

    def _guest(self, stand: Stand, server: Server, disk: Disk, phase: str, figures: Figures, seed: int) -> None:
        result = stand.guest([steady_job(stand, server, disk.size, seed)]).result(GUEST_TIMEOUT_S)
        figures |= {f"{phase} p50": result.p50_us, f"{phase} p99": result.p99_us, f"{phase} max": result.max_us}


def steady_job(stand: Stand, server: Server, size: int, seed: int) -> list[str]:
    """4 KiB random writes at `STEADY_RATE`."""
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=8", f"--rate_iops={STEADY_RATE}", f"--randseed={seed}"]
    run_ms = max(1000, round(stand.settings.run_s * 1000))
    return [*options, f"--size={size}", f"--runtime={run_ms}ms", "--time_based", *server.fio_target()]


@contextlib.contextmanager
def reading(stand: Stand, uri: str) -> Iterator[None]:
    """Somebody copies an export, over and over, all the time that is spent inside. Raises BenchError if that fails."""
    shell = 'while :; do "$0" "$1" null: || exit; done'
    reader = Client(["/bin/sh", "-c", shell, images.program("nbdcopy"), uri], stand.directory)
    try:
        yield
        if not reader.running():
            reader.finish(0)
            raise BenchError("the reader has ended")
    finally:
        reader.end()


@contextlib.contextmanager
def stalled_reader(path: str, export: str, size: int) -> Iterator[None]:
    """A client that asks for 64 MiB of an export and reads no reply."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(10.0)
        try:
            client.connect(path)
            if client.recv(18, socket.MSG_WAITALL)[:8] != b"NBDMAGIC":
                raise BenchError(f"what listens at {path} does not speak NBD")
            name = export.encode()
            # Flags: fixed newstyle, no zeroes. Option 1: the export's name; the reply is its size and flags.
            client.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, len(name)) + name)
            if struct.unpack(">QH", client.recv(10, socket.MSG_WAITALL))[0] != size:
                raise BenchError(f"export {export} is not of {size} bytes")
            for cookie in range(64):
                offset = cookie * MiB % (size - MiB + 1)
                client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, offset, MiB))
        except (OSError, struct.error) as error:
            raise BenchError(f"the stalled reader could not begin: {error}") from error
        yield


@dataclass(frozen=True)
class StalledScratch:
    """The guest's longest wait when the scratch stops answering: it must be let go when the time-out has passed.

    Both daemons get the same graph: copy-before-write with a time-out of a second, whose scratch is an NBD server that
    takes a minute for a write.
    """

    format: Format
    timeout_s: int = 1

    def run(self, stand: Stand, subject: Subject) -> Figures:
        scratch_socket = os.path.join(stand.directory, "scratch.sock")
        nbdkit = [images.program("nbdkit"), "-f", "-U", scratch_socket, "--filter=delay", "memory"]
        nbd_socket, qmp_socket = os.path.join(stand.directory, "nbd.sock"), os.path.join(stand.directory, "qmp.sock")
        with stand.images.disk(self.format) as disk:
            slow = [*nbdkit, f"size={disk.size}", "wdelay=60"]
            with serving(slow, scratch_socket, scratch_socket, [disk], stand.directory) as scratch:
                command = [*subject.command, *(["storage-daemon"] if subject.family == "fleecer" else [])]
                command += self._options(disk, nbd_socket, qmp_socket, scratch_socket)
                with serving(command, nbd_socket, qmp_socket, [disk], stand.directory) as server:
                    result = stand.guest([steady_job(stand, server, disk.size, seed=1)]).result(GUEST_TIMEOUT_S)
                    scratch.process.kill()  # else the daemon's end waits for its last write
        if result.max_us < self.timeout_s * 0.9e6:
            raise BenchError(f"no write waited for the scratch: the longest took {result.max_us:.0f} us")
        return {"max": result.max_us / 1e3, "p99": result.p99_us / 1e3}

    def _options(self, disk: Disk, nbd_socket: str, qmp_socket: str, scratch_socket: str) -> list[str]:
        options = daemon_options([disk], nbd_socket, qmp_socket, filterable=False)
        export = options.index("--export")
        target = f"driver=nbd,node-name=scratch0,server.type=unix,server.path={escaped(scratch_socket)}"
        cbw = "driver=copy-before-write,node-name=cbw0,file=disk0,target=scratch0"
        cbw += f",on-cbw-error=break-snapshot,cbw-timeout={self.timeout_s}"
        return [
            *options[:export],
            *("--blockdev", target, "--blockdev", cbw),
            *("--export", f"type=nbd,id=guest0,node-name=cbw0,name={disk.name},writable=on"),
        ]


@dataclass(frozen=True)
class Cut:
    """The time from the command to its reply, and the longest wait of a write in flight meanwhile.

    A guest on each disk; together they have 64 requests in flight, over the first 64 MiB of their disks.
    """

    format: Literal["raw", "qcow2"]
    disks: int
    size: int

    def run(self, stand: Stand, subject: Subject) -> Figures:
        run_s = max(1.0, stand.settings.run_s)
        with contextlib.ExitStack() as stack:
            disks: list[Disk] = []
            stack.callback(lambda: stand.images.remove(*disks))
            names = [f"disk{index}" for index in range(self.disks)]
            disks.extend(stand.images.empty(self.format, self.size, name=name) for name in names)
            # Of QEMU's schemes only backup jobs cut several disks at one instant with one command.
            name: SchemeName = "backup-job" if subject.family == "qsd" else "snapshot"
            server = stack.enter_context(served(subject, stand.directory, disks, name))
            past = scheme(name, subject, server, stand.images)
            stack.callback(past.close)
            past.prepare()
            server.qmp.execute("query-version")  # the session is there, whether or not there was something to prepare
            log = os.path.join(stand.directory, "guest")
            stack.callback(_remove_logs, stand.directory)
            job = ["--rw=randwrite", "--bs=4k", f"--iodepth={64 // self.disks}", f"--size={min(self.size, 64 * MiB)}"]
            job += ["--norandommap", f"--runtime={round(run_s * 1000)}ms", "--time_based", "--log_unix_epoch=1"]
            jobs = [[*job, f"--write_lat_log={log}", *server.fio_target(index)] for index in range(self.disks)]
            guest = stand.guest(jobs)
            stack.callback(guest.end)
            time.sleep(run_s * 0.6)
            wall, begun = time.time(), time.perf_counter()
            past.cut()
            taken_s = time.perf_counter() - begun
            guest.result(GUEST_TIMEOUT_S)
            begin_ms = wall * 1e3
            return {"cut": taken_s * 1e3} | self._waits(stand.directory, begin_ms, begin_ms + taken_s * 1e3)

    def _waits(self, directory: str, begin_ms: float, end_ms: float) -> Figures:
        across, before = [], []
        for index in range(self.disks):
            with open(os.path.join(directory, f"guest_lat.{index + 1}.log"), encoding="ascii") as file:
                found = fio.longest_across(file.read(), begin_ms, end_ms)
            if found is None:
                raise BenchError(f"the guest of disk {index} was not writing before, across and after the cut")
            across.append(found.across_us)
            before.append(found.before_us)
        return {"wait": max(across) / 1e3, "wait before": max(before) / 1e3}


def _remove_logs(directory: str) -> None:
    for name in os.listdir(directory):
        if name.startswith("guest_") and name.endswith(".log"):
            os.unlink(os.path.join(directory, name))


@dataclass(frozen=True)
class SparseBackup:
    """A backup of a large disk with little data in it: qemu-img convert of a snapshot into a new qcow2 image."""

    size: int = 1 << 40
    extents: int = 1024

    def run(self, stand: Stand, subject: Subject) -> Figures:
        disk = scattered(stand, self.size, self.extents, MiB)
        figures: Figures = {}
        target = stand.images.path("backup.qcow2")
        try:
            with cut_disk(stand, subject, disk, "snapshot") as (server, _, export):
                begun = time.perf_counter()
                with process_time(server, figures, "cpu") as units:
                    command = [images.program("qemu-img"), "convert", "-f", "raw", "-O", "qcow2"]
                    copier = Client([*command, server.uri(export), target], stand.directory)
                    try:
                        copier.finish(COPY_TIMEOUT_S)
                    finally:
                        copier.end()
                    units.append(self.extents)
                figures["backup"] = time.perf_counter() - begun
            kept = os.stat(target).st_blocks * 512
            if not self.extents * MiB <= kept <= self.extents * MiB * 11 // 10 + 64 * MiB:
                raise BenchError(f"the backup has {kept} bytes; the disk has {self.extents * MiB} of data")
            return figures
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
