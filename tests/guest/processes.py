"""The programs that run here: tools that end by themselves, processes that are followed, and a Fleecer daemon.

A process that stays is ended by its own id, whatever happens in between.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

HANG_S = 300.0
"""Nothing takes that long. A limit for what would otherwise never end, not a measure."""


def tool(name: str) -> str:
    """The path of a foreign program; the test fails if it is missing."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        pytest.fail(f"{name} is missing; make test-guest installs it", pytrace=False)
    return path


def run(name: str, *arguments: str | Path, statuses: Sequence[int] = (0,), cwd: Path | None = None) -> str:
    """Runs a foreign program and returns what it says on standard output."""
    done = subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, errors="replace", cwd=cwd, timeout=HANG_S
    )
    assert done.returncode in statuses, f"{name} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def fleecer(*arguments: str | Path) -> str:
    """Runs a fleecer command and returns what it says on standard output."""
    done = subprocess.run([sys.executable, "-m", "fleecer", *arguments], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, f"fleecer {arguments[0]} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


class Lines:
    """Follows what a process prints, line by line; never lets it wait for us."""

    def __init__(self, stream: IO[str]) -> None:
        self.lines: list[str] = []
        self._ended = False
        self._stream = stream
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        for line in self._stream:
            with self._news:
                self.lines.append(line.strip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The first line of all that `pattern` matches whole, at once or when it comes."""
        wanted = re.compile(pattern)
        seen = 0
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if wanted.fullmatch(line):
                        return line
                seen = len(self.lines)
                assert not self._ended, f"it ended and never said {pattern!r}, but:\n{self.text()}"
                assert self._news.wait(HANG_S), f"it never said {pattern!r}, but:\n{self.text()}"

    def text(self) -> str:
        return "\n".join(self.lines[-40:])

    def close(self) -> None:
        """Once the process has ended."""
        self._thread.join()
        self._stream.close()


def end(process: subprocess.Popen[str]) -> int:
    """Ends a process that may have ended already, and returns its status."""
    process.terminate()
    try:
        return process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


class Daemon:
    """`fleecer serve` of one image, in a run directory of its own."""

    def __init__(self, run_directory: Path, process: subprocess.Popen[str], output: Lines) -> None:
        self.run_directory = run_directory
        self._process = process
        self._output = output

    @property
    def socket(self) -> Path:
        """Where it serves NBD."""
        return self.run_directory / "nbd.sock"

    def stop(self) -> None:
        """Tells it to stop and checks that it does so in order."""
        status = end(self._process)
        self._output.close()
        assert status == 0, f"the daemon ended with {status}:\n{self._output.text()}"


@contextmanager
def serving(name: str, image: Path, run_directory: Path) -> Iterator[Daemon]:
    """Serves an image under `name`; at the end the daemon has stopped, in order if nothing else went wrong."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fleecer", "serve", "--run-dir", run_directory, f"{name}={image}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = Lines(process.stdout)
    daemon = Daemon(run_directory, process, output)
    try:
        output.wait_for(rf"{name} .*")
        yield daemon
    except BaseException:
        end(process)
        output.close()
        raise
    daemon.stop()
