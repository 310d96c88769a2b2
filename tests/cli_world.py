"""Real daemons and commands in processes of their own: what the end-to-end tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Self

import fleecer

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(fleecer.__file__).parents[1]), "PYTHONWARNINGS": "error"}
PROGRAM = (sys.executable, "-m", "fleecer")
TIMEOUT_S = 60.0


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `fleecer` to its end, whatever its status."""
    return subprocess.run(
        [*PROGRAM, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def succeed(*arguments: str, cwd: Path | None = None) -> str:
    """Runs `fleecer`, which must succeed, and returns its output."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def document(*arguments: str, cwd: Path | None = None) -> dict[str, Any]:
    """Runs `fleecer ... --json`; standard output must be one document, standard error empty."""
    done = run(*arguments, "--json", cwd=cwd)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    decoded: dict[str, Any] = json.loads(done.stdout)
    return decoded


def fail(*arguments: str, cwd: Path | None = None) -> str:
    """Runs `fleecer`, which must fail with status 1 and one line, and returns that line without "fleecer: "."""
    done = run(*arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr
    assert done.stderr.startswith("fleecer: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("fleecer: ").rstrip("\n")


def peer(*command: str, cwd: Path | None = None) -> str:
    """Runs a foreign program, which must succeed, and returns its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Serving:
    """`fleecer serve` in a process of its own, ready once it is made. A context manager: leaving it ends the daemon.

    `uris` has the local URI of each disk.
    """

    def __init__(self, directory: Path, *images: str, options: tuple[str, ...] = ()) -> None:
        self.run_dir = str(directory / "run")
        self.process = subprocess.Popen(
            [*PROGRAM, "serve", *images, "--run-dir", self.run_dir, *options],
            cwd=directory,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline() for _ in images]
        if not all(self.lines):
            raise AssertionError(f"the daemon did not start: {self.process.communicate(timeout=TIMEOUT_S)[1]}")
        self.uris = {line.split()[0]: line.split()[1] for line in self.lines}

    def snapshot(self, *arguments: str) -> list[str]:
        """Takes a snapshot and returns its URIs."""
        return succeed("snapshot", "create", "--run-dir", self.run_dir, *arguments).split()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ends it with a signal; returns its status and what it wrote to standard error."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
                raise
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def write(uri: str, *commands: str) -> None:
    """Lets qemu-io work on an export."""
    steps = [word for command in commands for word in ("-c", command)]
    told = peer("qemu-io", "-f", "raw", *steps, uri)
    assert "failed" not in told, told


def raw_image(path: Path, size: int, *pieces: tuple[int, bytes]) -> bytes:
    """Makes a sparse file with `pieces` of data at their offsets; returns its content."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path.read_bytes()
