"""A small QMP client: one command at a time over a unix socket, Fleecer's or QEMU's.

It blocks, as the commands that use it have nothing else to do. Events are skipped. What a connection holds on the
server (a temporary snapshot) goes when it is closed, or its process ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import types
from typing import Any, Self

from fleecer.errors import IoError, RemoteProtocolError, UsageError, quoted
from fleecer.net.unixpath import check_socket_path
from fleecer.units import KiB, MiB
from fleecer.wire import qmp

ANSWER_TIMEOUT_S = 10.0
"""For what a server answers at once, unless something is the matter."""
_DOCUMENT_BYTES_MAX = 64 * MiB  # a server's answers are longer than what it takes


class QmpClient:
    """A session, ready for commands. A context manager: leaving it closes it.

    Raises UsageError where nobody listens, IoError, or RemoteProtocolError where what listens speaks no QMP.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._splitter = qmp.Splitter(document_bytes_max=_DOCUMENT_BYTES_MAX)
        self._documents: list[qmp.Document] = []
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            greeting = self._receive()
            if not isinstance(greeting, dict):
                raise RemoteProtocolError(f"what listens at {quoted(path)} did not greet as a QMP server does")
            self.version: dict[str, Any] = greeting["QMP"].get("version") or {}
            self.execute("qmp_capabilities", timeout_s=ANSWER_TIMEOUT_S)
        except BaseException:
            self._socket.close()
            raise

    @property
    def is_fleecer(self) -> bool:
        """Whether the server is Fleecer's own, which has commands that QEMU lacks."""
        return str(self.version.get("package", "")).startswith("fleecer-")

    def need_fleecer(self, purpose: str) -> None:
        """Raises UsageError unless the server is Fleecer's own."""
        if not self.is_fleecer:
            raise UsageError(f"the QMP server at {quoted(self.path)} is not Fleecer's, and has no way to {purpose}")

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """Runs a command and returns its value. Raises QmpError with the server's words, or IoError if it is gone.

        Without `timeout_s` it may take its time; after a time-out the session is of no use any more.
        """
        self._socket.settimeout(timeout_s)
        self._serial += 1
        request: dict[str, Any] = {"execute": command, "id": self._serial}
        if arguments:
            request["arguments"] = arguments
        try:
            self._socket.sendall(qmp.encode(request))
        except OSError as error:
            raise self._lost(error) from error
        while True:
            message = self._receive()
            if isinstance(message, qmp.Return) and message.id == self._serial:
                if message.error is not None:
                    raise message.error
                return message.value

    def pass_over_events(self) -> None:
        """Reads what the server has announced since the last command, and never waits.

        To be called now and then while there is nothing to ask: a server cuts off who does not read.
        """
        self._socket.settimeout(0)
        with contextlib.suppress(OSError):  # whatever is wrong, the next command tells of it
            while data := self._socket.recv(64 * KiB):
                self._splitter.feed(data)

    def close(self) -> None:
        """Ends the session. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        check_socket_path(self.path)
        try:
            self._socket.connect(self.path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise UsageError(
                f"there is no daemon at {quoted(self.path)}; start one with: fleecer serve [NAME=]IMAGE..."
            ) from None
        except NotADirectoryError:
            directory = os.path.dirname(self.path)
            raise UsageError(
                f"run directory {quoted(directory)}: it, or a part of its path, is no directory; name a daemon's"
            ) from None
        except OSError as error:
            detail = error.strerror or str(error)
            if isinstance(error, PermissionError):
                detail += "; a daemon serves its own user and root"
            raise IoError(error.errno or errno.EINVAL, self.path, "connect", detail=detail) from error

    def _receive(self) -> qmp.Return | qmp.Event | dict[str, Any]:
        while not self._documents:
            try:
                data = self._socket.recv(64 * KiB)
            except TimeoutError as error:
                detail = f"no answer in {ANSWER_TIMEOUT_S:g} s; is it a QMP server, and free?"
                raise IoError(errno.ETIMEDOUT, self.path, "QMP", detail=detail) from error
            except OSError as error:
                raise self._lost(error) from error
            if not data:
                raise self._lost(None)
            self._documents += self._splitter.feed(data)
        return qmp.decode_reply(self._documents.pop(0))

    def _lost(self, error: OSError | None) -> IoError:
        why = f" ({error.strerror})" if error is not None and error.strerror else ""
        return IoError(errno.ECONNRESET, self.path, "QMP", detail=f"the daemon has closed the connection{why}")
