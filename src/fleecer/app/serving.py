"""The composition root: puts a daemon, its monitor and its sockets together, runs them, and ends them in order.

The end, asked for by SIGTERM, SIGINT or QMP's `quit`: no more commands and sessions are taken; the daemon refuses new
requests, ends those in flight, flushes and closes everything; events of that are still told; then the monitors close.
A second signal, not too soon after the first (signals.py), gives up at once, with status 1: as after a crash, nothing
is lost that a flush had acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Sequence

from fleecer.app import signals
from fleecer.app.rundir import NBD_SOCKET, QMP_SOCKET, claimed
from fleecer.daemon import Daemon
from fleecer.daemon.daemon import Format
from fleecer.errors import UsageError, quoted
from fleecer.export import Export
from fleecer.monitor import MonitorServer
from fleecer.net.listen import parse_host_port
from fleecer.net.uri import DEFAULT_PORT, tcp_uri, unix_uri
from fleecer.storage.paths import file_identity

NAME_BYTES_MAX = 128
"""Names of disks become names of directories in backups, and parts of export names."""

_NAME = re.compile(r"[^/@\x00-\x20\x7f][^/@\x00-\x1f\x7f]*")


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """An image to serve under a name. Without a format its ending tells it."""

    name: str
    path: str
    format: Format | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` is asked for. `listen` is HOST[:PORT] for TCP besides the unix socket in the run directory."""

    disks: Sequence[Disk]
    run_directory: str
    listen: str | None = None
    read_only: bool = False
    allow_backing: Sequence[str] = ()


class Service:
    """A daemon with its monitors in this process. Made by `service`."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._stopping = asyncio.Event()
        self.monitor = MonitorServer(daemon, self.stop)

    def stop(self) -> None:
        """Asks for the orderly end."""
        self._stopping.set()

    async def stopped(self) -> None:
        """Returns once the end was asked for."""
        await self._stopping.wait()

    async def close(self) -> None:
        """The orderly end. Raises the first failure, such as of the last flush, after all has been tried."""
        self.monitor.refuse()
        try:
            await self.daemon.close()
        finally:
            await self.monitor.close()


@contextlib.asynccontextmanager
async def service(daemon: Daemon) -> AsyncIterator[Service]:
    """Stop signals ask for the end inside; leaving it, however that happens, is the orderly end.

    They are followed until the event loop is closed, so that what hangs at the end can be given up.
    """
    running = Service(daemon)
    signals.follow(asyncio.get_running_loop(), signals.Stopper(lambda _: running.stop()))
    try:
        yield running
    finally:
        await running.close()


def disk_named(text: str, image_format: Format | None) -> Disk:
    """What "[NAME=]IMAGE" means. The name is, unless given, the file's without its ending."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        path = text
        name = os.path.splitext(os.path.basename(text))[0]
    return Disk(name, path, image_format)


def log_to_stderr() -> None:
    """Warnings and errors go to standard error, a line each."""
    logging.basicConfig(level=logging.WARNING, format="fleecer: %(message)s", stream=sys.stderr)


def settle() -> None:
    """What was made by now stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


async def serve(options: ServeOptions, announce: Callable[[str], None]) -> None:
    """Serves disks until it is told to stop; `announce` gets one line per disk, with its URIs, once all are ready.

    On return everything written is durable. Raises FleecerError: before anything was served, or for what the end failed
    to do.
    """
    _check_names(options.disks)
    if not options.read_only:
        _check_files(options.disks)
    address = parse_host_port(options.listen, DEFAULT_PORT) if options.listen is not None else None
    if address is not None and not address[0]:
        raise UsageError(f"address {quoted(options.listen or '')} names no host; 0.0.0.0 or [::] is every address")
    with claimed(options.run_directory) as directory:
        daemon = Daemon(allow_backing=options.allow_backing)
        async with service(daemon) as running:
            exports = [
                await daemon.serve_image(disk.name, disk.path, format=disk.format, read_only=options.read_only)
                for disk in options.disks
            ]
            if address is not None:
                daemon.server.listen_tcp(*address)
            daemon.server.listen_unix(os.path.join(directory, NBD_SOCKET))
            running.monitor.listen_unix(os.path.join(directory, QMP_SOCKET))
            settle()
            daemon.snapshots.keep_scratches_ready()
            for export in exports:
                announce(f"{export.name}  {'  '.join(uris(daemon, export))}")
            await running.stopped()


def uris(daemon: Daemon, export: Export) -> list[str]:
    """The NBD URIs of an export, the local one first."""
    found: list[str] = []
    for listener in daemon.server.listeners:
        address = listener.address
        if isinstance(address, str):
            found.insert(0, unix_uri(address, export.name))
        else:
            found.append(tcp_uri(address[0], address[1], export.name))
    return found


def _check_names(disks: Sequence[Disk]) -> None:
    paths: dict[str, str] = {}
    for disk in disks:
        _check_encoding(disk.name)
        if not _NAME.fullmatch(disk.name) or disk.name in (".", ".."):
            raise UsageError(
                f"disk name {quoted(disk.name)} must not be empty, nor have '/' or '@' or control characters in it; "
                "name the disk: NAME=IMAGE"
            )
        if len(os.fsencode(disk.name)) > NAME_BYTES_MAX:
            raise UsageError(
                f"disk name {quoted(disk.name)} is longer than {NAME_BYTES_MAX} bytes; choose a shorter one"
            )
        if disk.name in paths:
            raise UsageError(
                f"images {quoted(paths[disk.name])} and {quoted(disk.path)} are both named {quoted(disk.name)}; "
                "name one otherwise: NAME=IMAGE"
            )
        paths[disk.name] = disk.path


def _check_encoding(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"disk name {quoted(name)} is not UTF-8, as NBD wants; name the disk: NAME=IMAGE") from None


def _check_files(disks: Sequence[Disk]) -> None:
    """Tells of an image given twice, which its own lock would refuse in words that look for another process."""
    paths: dict[tuple[int, int], str] = {}
    for disk in disks:
        identity = file_identity(disk.path)
        if identity is None:
            continue
        if identity in paths:
            raise UsageError(
                f"images {quoted(paths[identity])} and {quoted(disk.path)} are the same file; serve it once, or all "
                "with --read-only"
            )
        paths[identity] = disk.path
