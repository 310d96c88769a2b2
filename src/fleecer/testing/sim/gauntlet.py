"""A bit of every search, the quick and telling ones first, up to the first failure: does this tree still keep its word?

What a mistake is found by depends on its kind: one in the order of steps by the interleavings, one in the order of
writes by power cuts, one in what happens after a failure by faults. So all are tried, in turn, within a minute.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator

from fleecer.testing.sim.cases import Case, draw_crowd, run_case, run_seed
from fleecer.testing.sim.exhaust import cases, exhaust_case, longer_cases, worlds
from fleecer.testing.sim.faultpoints import backup_programs, late_programs, mixed_programs, run_fault_points
from fleecer.testing.sim.powercut import Workload, duets, judge_workload, workloads
from fleecer.testing.sim.together import run_together

_PAIRS_OF_DISKS = 20
_SEEDS = 1000
_FIRST_SEEDS = 300
_CROWDS = 400
_DUETS_EVERY = 9
_CUTS = 6
_FAULT_PROGRAMS = 20
_FAULTS_EVERY = 5
_PAIRS_EVERY = 9


_LONGEST_S = 20.0
"""Of the processor, for one of the pieces that a search is made of. What takes longer goes round for ever."""
_AGAIN_S = 1.0
"""After that: what was stopped may be one of many, each of which goes round for ever."""


def gauntlet() -> str:
    """Returns what the first failure was, "" if there was none. To be called in the main thread."""
    searches: list[Callable[[], Iterator[str]]] = [
        lambda: _play("two disks", range(_PAIRS_OF_DISKS), run_together),
        lambda: _play("schedules", range(_FIRST_SEEDS), run_seed),
        lambda: _play("crowds", range(_CROWDS), lambda seed: run_case(draw_crowd(seed, "raw"))),
        lambda: _cut(workloads(1)),
        lambda: _exhaust(longer_cases()),
        lambda: _cut(workload for workload in workloads(3) if workload.setting == "raw"),
        lambda: _fail(late_programs(), 1),
        lambda: _fail(backup_programs(), 1),
        lambda: _fail(itertools.islice(mixed_programs(), _FAULT_PROGRAMS), _FAULTS_EVERY),
        lambda: _play("schedules", range(_FIRST_SEEDS, _SEEDS), run_seed),
        lambda: _cut(itertools.islice(duets(), 0, None, _DUETS_EVERY)),
        lambda: _exhaust(_pairs(("raw", "bare"), 1)),
        lambda: _exhaust(_pairs(("blocks", "qcow2", "overlay"), _PAIRS_EVERY)),
    ]
    before = signal.signal(signal.SIGVTALRM, _too_long)
    try:
        for failure in itertools.chain.from_iterable(search() for search in searches):
            if failure:
                return failure
            signal.setitimer(signal.ITIMER_VIRTUAL, _LONGEST_S, _AGAIN_S)
    except Exception as error:  # noqa: BLE001 - a search that cannot go on has found something
        return f"a search ended by {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return ""


def _too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"something goes round for ever: {_LONGEST_S:g} s")


def _play(what: str, seeds: Iterable[int], run: Callable[[int], object]) -> Iterator[str]:
    for seed in seeds:
        try:
            run(seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            yield f"{what}, seed {seed}: {type(error).__name__}: {error}"
        else:
            yield ""


def _pairs(formats: tuple[str, ...], every: int) -> Iterator[Case]:
    for disk_format, held in worlds():
        if disk_format in formats:
            yield from itertools.islice(cases(2, disk_format, held), 0, None, every)


def _exhaust(chosen: Iterable[Case]) -> Iterator[str]:
    for case in chosen:
        error = exhaust_case(case, small=False).error
        yield error and f"interleavings of {case.actors} on {case.format}, {', '.join(case.held)}: {error}"


def _cut(chosen: Iterable[Workload]) -> Iterator[str]:
    for workload in chosen:
        error = judge_workload(workload, exhaustive_up_to=3, samples=_CUTS).error
        yield error and f"power cut in {workload}: {error}"


def _fail(cases_: Iterable[Case], every: int) -> Iterator[str]:
    for case in cases_:
        runs = run_fault_points(case, every=every, failures_max=1)
        yield f"fault: {runs.failed[0]}" if runs.failed else ""
