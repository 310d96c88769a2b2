"""Programs: servers and clients that the bench starts, what the kernel knows of them, and their end.

Everything started here is ended by its process number, in every case, and waited for. Programs get a session of their
own, so that Ctrl-C reaches the bench alone, which then ends them in order.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from bench.figures import BenchError

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0
_NBD_GREETING = b"NBDMAGIC"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _start(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - the bench's own command lines, and those its user names
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        raise BenchError(f"cannot start {command[0]!r}: {error.strerror}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and what it started: a session of its own makes them one group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Waits for its end, and gives its status; None where it takes longer.

    With a time limit, `Popen.wait` only looks every 50 ms: copies that take four of those were measured in such steps.
    """
    ending = os.pidfd_open(process.pid)
    try:
        select.select([ending], [], [], timeout_s)
    finally:
        os.close(ending)
    return process.poll()


class Client:
    """A program that does something and ends. What it prints is kept for the error text."""

    def __init__(self, command: Sequence[str], directory: str) -> None:
        self._name = os.path.basename(command[0])
        self._log = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            self._process = _start(command, self._log)
        except BaseException:
            os.close(self._log)
            raise
        self._closed = False

    def finish(self, timeout_s: float) -> str:
        """Waits for its end and gives what it printed. Raises BenchError when it fails or takes longer."""
        code = _wait(self._process, timeout_s)
        if code is None:
            raise BenchError(f"{self._name} did not end within {timeout_s:.0f} s")
        printed = _content(self._log)
        if code:
            raise BenchError(f"{self._name} ended with status {code}: {_last_line(printed)}")
        return printed

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """Ends it if it has not ended. Idempotent."""
        if not self._closed:
            self._closed = True
            _end(self._process)
            os.close(self._log)


def call(command: Sequence[str], directory: str, timeout_s: float = 600.0) -> str:
    """Runs a program to its end and gives what it printed. Raises BenchError."""
    client = Client(command, directory)
    try:
        return client.finish(timeout_s)
    finally:
        client.end()


class ServerProcess:
    """A server, from its start until `end`. `start_s` is how long it took until it greeted an NBD client."""

    def __init__(self, command: Sequence[str], socket_path: str, directory: str) -> None:
        self.name = os.path.basename(command[0])
        self._killed = False
        self._log = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        begun = time.perf_counter()
        try:
            self._process = _start(command, self._log)
        except BaseException:
            os.close(self._log)
            raise
        try:
            self._wait_for_greeting(socket_path, begun + START_TIMEOUT_S)
        except BaseException:
            self.end()
            raise
        self.start_s = time.perf_counter() - begun

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def cpu_s(self) -> float:
        """Processor time it has used so far, its own and the kernel's for it, in seconds."""
        return parse_cpu_s(self._proc("stat"))

    def fetched_bytes(self) -> int:
        """How much the kernel has read from storage for it."""
        return parse_field(self._proc("io"), "read_bytes")

    def resident_bytes(self) -> int:
        """Its resident memory now."""
        return parse_field(self._proc("status"), "VmRSS") * 1024

    def resident_peak_bytes(self) -> int:
        """The most resident memory it has had."""
        return parse_field(self._proc("status"), "VmHWM") * 1024

    def check(self) -> None:
        """Raises BenchError if it has ended by itself."""
        if self._process.poll() is not None and not self._killed:
            raise BenchError(
                f"{self.name} ended with status {self._process.returncode}: {_last_line(_content(self._log))}"
            )

    def kill(self) -> None:
        """Ends it at once, whatever it is doing; then `check` has nothing to say of it."""
        self._killed = True
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Ends it and waits."""
        _end(self._process)
        os.close(self._log)

    def _proc(self, name: str) -> str:
        self.check()
        with open(f"/proc/{self.pid}/{name}", encoding="ascii", errors="replace") as file:
            return file.read()

    def _wait_for_greeting(self, path: str, deadline: float) -> None:
        while time.perf_counter() < deadline:
            self.check()
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
                probe.settimeout(1.0)
                with contextlib.suppress(OSError):
                    probe.connect(path)
                    if probe.recv(8, socket.MSG_WAITALL) == _NBD_GREETING:
                        return
            time.sleep(0.001)
        raise BenchError(f"{self.name} did not serve NBD at {path} within {START_TIMEOUT_S:.0f} s")


def parse_cpu_s(stat: str) -> float:
    """User and system time in /proc/PID/stat, in seconds. The program's name in it may hold anything, also ')'."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def parse_field(text: str, name: str) -> int:
    """The number behind "name:" in a file of such lines. Raises BenchError where there is none."""
    for line in text.splitlines():
        key, colon, rest = line.partition(":")
        if colon and key == name:
            return int(rest.split()[0])
    raise BenchError(f"the kernel does not tell {name} of a process; the bench needs it")


def interruptible() -> None:
    """Makes SIGTERM end the bench as Ctrl-C does, in order: also where Ctrl-C is ignored, as behind a shell's `&`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _content(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"
