"""The command: its searches run on several processes, and say what they did."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--count", "200", "--from", "7000"], r"200 schedules, \d+ steps .* on 2 processes: \d+ .*; 0 violations"),
        (["--cuts", "1"], r"\d+ workloads, \d+ moments, \d+ media judged in \d+ s; 0 workloads failed"),
    ],
)
def test_a_search_on_two_processes_tells_its_figures(words: list[str], told: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fleecer.testing.sim", "--jobs", "2", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(told, ran.stdout.strip())
