"""Listening sockets: unix ones that only their owner can reach, and TCP ones.

Invariants: a unix socket is 0600 from its first instant (the umask is set before it exists); a path is taken over only
from a socket that nobody answers at; running out of descriptors pauses accepting for a moment and drops nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable

from fleecer.errors import IoError, UsageError, quoted
from fleecer.net.stream import SocketStream
from fleecer.net.unixpath import check_socket_path

BACKLOG = 128
_ACCEPTS_MAX = 64  # connections accepted a turn
_PAUSE_S = 0.1


class Listener:
    """Accepts on a socket, which it owns, and hands each stream to `accepted`, which must call its `begin`.

    With `same_user_only` processes of other users, root's excepted, are cut off at once (unix sockets).
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        accepted: Callable[[SocketStream], None],
        *,
        same_user_only: bool = False,
    ) -> None:
        self.name = name
        self._same_user_only = same_user_only
        self.address = sock.getsockname()
        self._sock = sock
        self._path = self.address if sock.family == socket.AF_UNIX else None
        self._inode = os.stat(self._path).st_ino if self._path is not None else 0
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        """Stops accepting and removes the unix socket. Idempotent; connections made before go on."""
        if self._sock.fileno() < 0:
            return
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)

    def _readable(self) -> None:
        for _ in range(_ACCEPTS_MAX):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._loop.remove_reader(self._sock.fileno())
                self._retry = self._loop.call_later(_PAUSE_S, self._listen_again)
                return
            if self._same_user_only and _peer(sock)[1] not in (0, os.geteuid()):
                sock.close()
                continue
            sock.setblocking(False)
            if self._path is None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                peer = f"{address[0]}:{address[1]}"
            else:
                peer = "local"
            self._accepted(SocketStream(sock, peer))

    def _listen_again(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self._readable)


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a unix socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", credentials)
    return process, user, group


def listen_unix(path: str, accepted: Callable[[SocketStream], None], *, same_user_only: bool = False) -> Listener:
    """Listens at `path`, mode 0600; see `Listener`. Raises UsageError when something else is there."""
    path = os.path.abspath(path)
    check_socket_path(path)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    before = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise IoError(error.errno or errno.EIO, path, "listen", detail=error.strerror or str(error)) from error
    finally:
        os.umask(before)
    return Listener(sock, path, accepted, same_user_only=same_user_only)


def listen_tcp(host: str, port: int, accepted: Callable[[SocketStream], None]) -> Listener:
    """Listens at `host`:`port` (0: any free port, see `Listener.address`). Raises IoError naming the address."""
    name = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise IoError(error.errno or errno.EIO, name, "listen", detail=error.strerror or str(error)) from error
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        detail = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            detail = "this daemon or another program listens there already; choose another port"
        raise IoError(error.errno or errno.EIO, name, "listen", detail=detail) from error
    return Listener(sock, name, accepted)


def parse_host_port(text: str, default_port: int) -> tuple[str, int]:
    """("host", port) out of "host", "host:port", ":port" or "[v6]:port". Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(default_port)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UsageError(
            f"address {quoted(text)} is not HOST:PORT; an IPv6 address goes in brackets, as in [::1]:10809"
        )
    host = host.removeprefix("[").removesuffix("]")
    try:
        return host, parse_port(port)
    except UsageError as error:
        raise UsageError(f"address {quoted(text)}: {error}, as in 127.0.0.1:10809") from None


def parse_port(text: str) -> int:
    """A TCP port. Raises UsageError for what is no number of 0 to 65535 in plain digits."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65535):
        raise UsageError(f"port {quoted(text)} is not a number up to 65535")
    return int(text)


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise IoError(error.errno or errno.EIO, path, "listen", detail=error.strerror or str(error)) from error
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise UsageError(f"{quoted(path)} exists and is not a socket of ours; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
            holder, _, _ = _peer(probe)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError:
            holder = 0
    if holder == os.getpid():
        raise UsageError(f"socket {quoted(path)} is served by this daemon already; choose another path")
    whom = f"process {holder}" if holder else "another process"
    raise UsageError(f"socket {quoted(path)} is in use by {whom}; stop that or choose another path")
