"""The subjects: who serves the disks. Each run gets a server process of its own, in its usual configuration.

Fleecer and qemu-storage-daemon take the same options where the graph is given by hand, and get the same graph there.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.figures import FLEECER, BenchError
from bench.images import Disk, program
from bench.process import ServerProcess, call
from fleecer.cli.qmp_client import QmpClient

Family = Literal["fleecer", "qsd", "nbdkit", "floor"]
SchemeName = Literal["snapshot", "backup-job", "backup-job-extended"]
"""Ways to keep a disk's past (schemes.py): each subject's newest, or the one that both daemons have, into a qcow2 image
as qemu-img makes it unasked, or into one with extended L2 entries."""


@dataclass(frozen=True)
class Subject:
    """A program under its name in the results, such as "qsd 10.0.13". The floor has no command."""

    name: str
    family: Family
    command: tuple[str, ...]


class Server:
    """Disks being served. For the floor there is no process: fio works on the files itself."""

    def __init__(self, process: ServerProcess | None, nbd_socket: str, qmp_socket: str, disks: Sequence[Disk]) -> None:
        self._process = process
        self._nbd_socket = nbd_socket
        self._qmp_socket = qmp_socket
        self._qmp: QmpClient | None = None
        self.disks = tuple(disks)

    @property
    def process(self) -> ServerProcess:
        """The server's process. Raises BenchError for the floor."""
        if self._process is None:
            raise BenchError("the floor has no server")
        return self._process

    @property
    def nbd_socket(self) -> str:
        """The path of its NBD socket."""
        return self._nbd_socket

    @property
    def qmp(self) -> QmpClient:
        """A QMP session, made when first asked for."""
        if self._qmp is None:
            self._qmp = QmpClient(self._qmp_socket)
        return self._qmp

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{export}?socket={self._nbd_socket}"

    def fio_target(self, index: int = 0) -> list[str]:
        """fio's options that aim a job at a disk."""
        if self._process is None:
            return ["--ioengine=io_uring", "--invalidate=0", f"--filename={self.disks[index].path}"]
        return ["--ioengine=nbd", f"--uri={self.uri(self.disks[index].name)}"]

    def cpu_s(self) -> float | None:
        """Processor time of the server so far; None for the floor."""
        return None if self._process is None else self._process.cpu_s()

    def fetched_bytes(self) -> int:
        """How much was read from storage for it; for the floor, for all clients that have ended."""
        if self._process is None:
            return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock * 512
        return self._process.fetched_bytes()

    def close(self) -> None:
        """Ends it."""
        if self._qmp is not None:
            self._qmp.close()
        if self._process is not None:
            self._process.end()


@contextlib.contextmanager
def served(
    subject: Subject, directory: str, disks: Sequence[Disk], scheme: SchemeName | None = None
) -> Iterator[Server]:
    """Serves disks under their names; sockets go to `directory`. The graph is one that the scheme can be put into.

    For backup jobs Fleecer gets the graph and the options that qemu-storage-daemon gets, in place of `fleecer serve`.
    """
    nbd_socket, qmp_socket = os.path.join(directory, "nbd.sock"), os.path.join(directory, "qmp.sock")
    match subject.family:
        case "floor":
            yield Server(None, "", "", disks)
            return
        case "nbdkit":
            (disk,) = disks
            command = [*subject.command, "-f", "-U", nbd_socket, "file", disk.path]
        case "fleecer" if scheme in (None, "snapshot"):
            images = [f"{disk.name}={disk.path}" for disk in disks]
            command = [*subject.command, "serve", "--run-dir", directory, *images]
        case _:
            daemon = ("storage-daemon",) if subject.family == FLEECER else ()
            command = [*subject.command, *daemon, *daemon_options(disks, nbd_socket, qmp_socket, scheme == "snapshot")]
    with serving(command, nbd_socket, qmp_socket, disks, directory) as server:
        yield server


@contextlib.contextmanager
def serving(
    command: Sequence[str], nbd_socket: str, qmp_socket: str, disks: Sequence[Disk], directory: str
) -> Iterator[Server]:
    """A server with a command line of one's own. Sockets are removed afterwards."""
    server = Server(ServerProcess(command, nbd_socket, directory), nbd_socket, qmp_socket, disks)
    try:
        yield server
        server.process.check()
    finally:
        server.close()
        for path in (nbd_socket, qmp_socket):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def daemon_options(disks: Sequence[Disk], nbd_socket: str, qmp_socket: str, filterable: bool) -> list[str]:
    """Options for a storage daemon: an exported node `diskN` per disk.

    If a filter is to be put in later, a raw node `topN` stands above it and is exported: it is what QEMU's users need.
    """
    options = [
        "--nbd-server",
        f"addr.type=unix,addr.path={escaped(nbd_socket)}",
        "--chardev",
        f"socket,id=qmp,path={escaped(qmp_socket)},server=on,wait=off",
        "--monitor",
        "chardev=qmp",
    ]
    for index, disk in enumerate(disks):
        file = f"driver=file,filename={escaped(disk.path)},discard=unmap,node-name="
        if disk.driver == "raw":
            options += ["--blockdev", f"{file}disk{index}"]
        else:
            options += ["--blockdev", f"{file}file{index}"]
            options += ["--blockdev", f"driver=qcow2,node-name=disk{index},file=file{index}"]
        exported = f"disk{index}"
        if filterable:
            exported = f"top{index}"
            options += ["--blockdev", f"driver=raw,node-name=top{index},file=disk{index}"]
        options += ["--export", f"type=nbd,id=guest{index},node-name={exported},name={escaped(disk.name)},writable=on"]
    return options


def escaped(value: str) -> str:
    """A value for QEMU's comma-separated options."""
    return value.replace(",", ",,")


def find(fleecer: str | None, daemons: Sequence[str], directory: str) -> list[Subject]:
    """The subjects there are: Fleecer, each storage daemon named, nbdkit and the floor.

    `fleecer` and `daemons` are commands; without `fleecer` it is the one that this Python has. Raises BenchError.
    """
    command = tuple(fleecer.split()) if fleecer else (sys.executable, "-m", "fleecer")
    subjects = [Subject(FLEECER, "fleecer", command)]
    for one in daemons:
        parts = (program(one.split()[0]), *one.split()[1:])
        version = version_in(call([*parts, "--version"], directory))
        if any(subject.name == f"qsd {version}" for subject in subjects):
            raise BenchError(f"{one}: qemu-storage-daemon {version} is named twice")
        subjects.append(Subject(f"qsd {version}", "qsd", parts))
    nbdkit = program("nbdkit")
    subjects.append(Subject(f"nbdkit {version_in(call([nbdkit, '--version'], directory))}", "nbdkit", (nbdkit,)))
    return [*subjects, Subject("floor", "floor", ())]


def version_in(text: str) -> str:
    """The first version number in a text. Raises BenchError where there is none."""
    found = re.search(r"\d+(\.\d+)+", text)
    if found is None:
        raise BenchError(f"no version number in {text[:80]!r}")
    return found.group()
