"""A bit of every search, the quick and telling ones first, up to the first failure: does this tree still keep its word?

What a mistake is found by depends on its kind: one in the order of steps by the interleavings, one in the order of
writes by power cuts, one in what happens after a failure by faults. So all are tried, in turn, within a minute or so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from fleecer.testing.sim.cases import BATCH, run_batch
from fleecer.testing.sim.exhaust import cases, exhaust_case, worlds
from fleecer.testing.sim.faultpoints import programs, run_fault_points
from fleecer.testing.sim.powercut import judge_workload, workloads

_BATCHES = 12
_CUTS_EVERY = 9
_FAULTS_EVERY = 4


def gauntlet() -> str:
    """Returns what the first failure was, "" if there was none."""
    searches: list[Callable[[], Iterator[str]]] = [
        lambda: _exhaust(2, ("raw", "bare")),
        lambda: _cut(1, 1),
        _fail,
        lambda: _exhaust(2, ("qcow2", "overlay")),
        _wander,
        lambda: _cut(3, _CUTS_EVERY),
    ]
    failures = itertools.chain.from_iterable(search() for search in searches)
    return next(filter(None, failures), "")


def _exhaust(size: int, formats: tuple[str, ...]) -> Iterator[str]:
    for disk_format, held in worlds():
        if disk_format in formats:
            for case in cases(size, disk_format, held):
                error = exhaust_case(case, small=False).error
                yield error and f"interleavings of {case.actors} on {disk_format}, {held[0]}: {error}"


def _cut(size: int, every: int) -> Iterator[str]:
    for workload in itertools.islice(workloads(size), 0, None, every):
        error = judge_workload(workload).error
        yield error and f"power cut in {workload}: {error}"


def _fail() -> Iterator[str]:
    for case in itertools.islice(programs(), 8):
        runs = run_fault_points(case, every=_FAULTS_EVERY)
        yield f"fault: {runs.failed[0]}" if runs.failed else ""


def _wander() -> Iterator[str]:
    for batch in range(_BATCHES):
        failed = run_batch(batch * BATCH).failed
        yield f"seed {failed[0][0]}: {failed[0][1]}" if failed else ""
