"""Makes each mistake in a copy of the tree, and has the simulation look for it.

A mutant is killed if what is to find it ends with a failure and says which. One that does not even start, or that is
not found in `CPU_S_MAX` seconds of the processor, is not. The measure is the processor's time, since others may use the
machine as well.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from tests.mutants.mutant import Mutant

CPU_S_MAX = 60
CONTROL_CPU_S_MAX = 180
"""To find nothing takes longest: all of the gauntlet."""
_ROOT = pathlib.Path(__file__).parents[2]
_CONTROL = Mutant("(no mistake)", "__init__.py", "", "", "the control: nothing is found")
_WORDS_MAX = 110


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant. `found` tells how it was killed; where it was not, `problem` tells what happened."""

    mutant: Mutant
    found: str
    problem: str
    cpu_s: float

    @property
    def is_control(self) -> bool:
        """Whether there was no mistake to find."""
        return self.mutant is _CONTROL


def run_mutants(mutants: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """Runs them all, `jobs` at a time, and one without a mistake, as they come to their end."""
    with tempfile.TemporaryDirectory(prefix="fleecer-mutants-") as directory:
        base = pathlib.Path(directory)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            pending = [
                pool.submit(_run, mutant, base / str(number)) for number, mutant in enumerate([_CONTROL, *mutants])
            ]
            try:
                for future in concurrent.futures.as_completed(pending):
                    yield future.result()
            finally:
                _stop(pending)


_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


def _stop(pending: Sequence[concurrent.futures.Future[Outcome]]) -> None:
    """Where the user gave up: nothing goes on."""
    for future in pending:
        future.cancel()
    with _lock:
        for process in _running:
            process.kill()


def _run(mutant: Mutant, tree: pathlib.Path) -> Outcome:
    copy_tree(tree)
    if mutant is not _CONTROL:
        mutant.apply(tree)
    tests = ["-m", "pytest", "-x", "-rf", "--no-header", "--tb=line", "-p", "no:xdist", *mutant.tests]
    words = tests if mutant.tests else ["-m", "fleecer.testing.sim", "--gauntlet"]
    output = tree / "output"
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    cpu_s_max = CONTROL_CPU_S_MAX if mutant is _CONTROL else CPU_S_MAX
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (cpu_s_max, cpu_s_max + 1))
    with _lock:
        _running.add(process)
    _, status, usage = os.wait4(process.pid, 0)
    with _lock:
        _running.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    found, problem = judge(
        process.returncode, output.read_text(errors="replace"), cpu_s_max, by_tests=bool(mutant.tests)
    )
    shutil.rmtree(tree)
    return Outcome(mutant, found, problem, usage.ru_utime + usage.ru_stime)


def copy_tree(tree: pathlib.Path) -> None:
    """Copies what a run needs. Compiled files come along, and count only while their sources are unchanged."""
    tree.mkdir()
    for part in ("src", "tests"):
        shutil.copytree(_ROOT / part, tree / part)
    shutil.copy(_ROOT / "pyproject.toml", tree)


def judge(status: int, output: str, cpu_s_max: int = CPU_S_MAX, *, by_tests: bool) -> tuple[str, str]:
    """What a run found, and what kept it from finding anything; one of the two is empty."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if status < 0:
        return "", f"not found in {cpu_s_max} s of the processor (signal {-status})"
    if status == 0:
        return "", "nothing found"
    if by_tests:
        failed = next((line for line in lines if line.startswith("FAILED ")), "")
        return (shortened(failed), "") if status == 1 and failed else ("", f"the tests do not run: {last}")
    if status == 1 and any(line.startswith("FAILED ") for line in lines):
        return shortened(next(line for line in lines if line.startswith("FAILED "))), ""
    return "", f"the gauntlet does not run: {last}"


def shortened(line: str) -> str:
    """What fits into the table: where it was found, and how it ends."""
    line = line.removeprefix("FAILED ")
    if len(line) <= _WORDS_MAX:
        return line
    head = line[: _WORDS_MAX // 3]
    return f"{head} ... {line[len(head) + 5 - _WORDS_MAX :]}"
