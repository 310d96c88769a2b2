"""A bit of every search, the quick and telling ones first, up to the first failure: does this tree still keep its word?

What a mistake is found by depends on its kind: one in the order of steps by the interleavings, one in the order of
writes by power cuts, one in what happens after a failure by faults. So all are tried, in turn, within a minute.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from fleecer.testing.sim.cases import BATCH, run_batch
from fleecer.testing.sim.exhaust import cases, exhaust_case, worlds
from fleecer.testing.sim.faultpoints import programs, run_fault_points
from fleecer.testing.sim.powercut import judge_workload, workloads
from fleecer.testing.sim.together import run_together

_PAIRS_OF_DISKS = 20
_BATCHES = 16
_CUTS_EVERY = 29
_FAULT_PROGRAMS = 20
_FAULTS_EVERY = 5
_EXHAUST_EVERY = 5


def gauntlet() -> str:
    """Returns what the first failure was, "" if there was none."""
    searches: list[Callable[[], Iterator[str]]] = [
        _cut_together,
        lambda: _wander(0, 3),
        lambda: _cut(1, 1),
        _fail,
        lambda: _wander(3, _BATCHES),
        lambda: _exhaust(2, ("raw", "bare"), 1),
        lambda: _cut(3, _CUTS_EVERY),
        lambda: _exhaust(2, ("blocks", "qcow2", "overlay"), _EXHAUST_EVERY),
    ]
    failures = itertools.chain.from_iterable(search() for search in searches)
    try:
        return next(filter(None, failures), "")
    except Exception as error:  # noqa: BLE001 - a search that cannot go on has found something
        return f"a search ended by {type(error).__name__}: {error}"


def _cut_together() -> Iterator[str]:
    for seed in range(_PAIRS_OF_DISKS):
        try:
            run_together(seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            yield f"two disks, seed {seed}: {type(error).__name__}: {error}"


def _exhaust(size: int, formats: tuple[str, ...], every: int) -> Iterator[str]:
    for disk_format, held in worlds():
        if disk_format in formats:
            for case in itertools.islice(cases(size, disk_format, held), 0, None, every):
                error = exhaust_case(case, small=False).error
                yield error and f"interleavings of {case.actors} on {disk_format}, {held[0]}: {error}"


def _cut(size: int, every: int) -> Iterator[str]:
    for workload in itertools.islice(workloads(size), 0, None, every):
        error = judge_workload(workload).error
        yield error and f"power cut in {workload}: {error}"


def _fail() -> Iterator[str]:
    for case in itertools.islice(programs(), _FAULT_PROGRAMS):
        runs = run_fault_points(case, every=_FAULTS_EVERY, failures_max=1)
        yield f"fault: {runs.failed[0]}" if runs.failed else ""


def _wander(first: int, end: int) -> Iterator[str]:
    for batch in range(first, end):
        failed = run_batch(batch * BATCH).failed
        yield f"seed {failed[0][0]}: {failed[0][1]}" if failed else ""
