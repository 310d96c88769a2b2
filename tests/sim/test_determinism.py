"""The same seed gives the same steps, in any process: without that no failure could be looked into."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleecer.testing.sim.cases import Case, run_directed, run_seed
from fleecer.testing.sim.exhaust import cases, worlds
from fleecer.testing.sim.explore import Explorer
from fleecer.testing.sim.loop import Driver, NamedLoop

ROOT = Path(__file__).parents[2]
SEEDS = 60


def of_random_schedules() -> str:
    """A digest of what was run, and told, for some seeds."""
    digest = hashlib.blake2b()
    for seed in range(SEEDS):
        loop = NamedLoop()
        story: list[str] = []
        run_seed(seed, story, loop=loop)
        digest.update(repr((loop.order, story, loop.time())).encode())
    return digest.hexdigest()


def of_all_interleavings() -> str:
    """A digest of all runs of one case of each world."""
    digest = hashlib.blake2b()
    for disk_format, held in worlds():
        case = next(case for case in cases(2, disk_format, held) if case.actors == (("zero 4 16",), ("sread 0 0 16",)))

        def program(loop: NamedLoop, driver: Driver, case: Case = case) -> None:
            try:
                run_directed(case, driver, loop=loop)
            finally:
                digest.update(repr(loop.order).encode())

        Explorer().explore(program)
    return digest.hexdigest()


SEARCHES = {"of_random_schedules": of_random_schedules, "of_all_interleavings": of_all_interleavings}


@pytest.mark.parametrize("name", SEARCHES)
def test_another_process_with_another_hash_seed_does_the_same(name: str) -> None:
    program = f"from tests.sim.test_determinism import {name}; print({name}())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "4711")
    }
    assert digests == {f"{SEARCHES[name]()}\n"}
