"""`python -m fleecer.testing.sim`: searches for schedules, power cuts and faults that break what Fleecer promises.

    python -m fleecer.testing.sim                    random schedules for two minutes, on all cores
    python -m fleecer.testing.sim --seconds 20 --from 5000
    python -m fleecer.testing.sim --seed 4711        one schedule, told step by step
    python -m fleecer.testing.sim --exhaust 3        every interleaving of every three operations
    python -m fleecer.testing.sim --cuts 3           every power cut in every workload of up to three operations
    python -m fleecer.testing.sim --faults           every fault at every request of some small programs
    python -m fleecer.testing.sim --gauntlet         a bit of all that, until something fails; for mutants
    python -m fleecer.testing.sim --replay FILE      what was found before, one failure in a line

A failed schedule is made small, told, and printed as a line for the corpus. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import TypeVar

from fleecer.testing.sim.cases import BATCH, Batch, draw_case, run_batch, run_seed
from fleecer.testing.sim.exhaust import cases, exhaust_case, worlds
from fleecer.testing.sim.explore import Figures
from fleecer.testing.sim.faultpoints import FaultRuns, programs, run_fault_points
from fleecer.testing.sim.gauntlet import gauntlet
from fleecer.testing.sim.loop import SimLoop
from fleecer.testing.sim.powercut import judge_workload, workloads
from fleecer.testing.sim.shrink import Failure, replay, shrink_seed

T = TypeVar("T")
U = TypeVar("U")


def main(words: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fleecer.testing.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="how long to try random schedules (default 120)")
    parser.add_argument("--count", type=int, help="how many to try instead")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--seed", type=int, help="run one schedule and tell it")
    chosen.add_argument("--exhaust", type=int, metavar="N", help="visit all interleavings of every N operations")
    chosen.add_argument("--cuts", type=int, metavar="N", help="cut the power in every workload of up to N operations")
    chosen.add_argument("--faults", action="store_true", help="have every request fail in every way")
    chosen.add_argument("--gauntlet", action="store_true", help="try a bit of everything, up to the first failure")
    chosen.add_argument("--replay", metavar="FILE", help="run every line of a corpus")
    options = parser.parse_args(words)
    logging.disable(logging.WARNING)  # what is given up is warned of, and here much is
    try:
        return _carry_out(options)
    finally:
        logging.disable(logging.NOTSET)


def _carry_out(options: argparse.Namespace) -> int:
    if options.seed is not None:
        return _tell(options.seed)
    if options.exhaust is not None:
        return _exhaust(options.exhaust, options.jobs)
    if options.cuts is not None:
        return _cut_power(options.cuts, options.jobs)
    if options.faults:
        return _fail(options.jobs)
    if options.gauntlet:
        failure = gauntlet()
        print(f"FAILED {failure}" if failure else "nothing found")
        return 1 if failure else 0
    if options.replay is not None:
        return _replay(options.replay)
    return _search(options.first, options.seconds, options.count, options.jobs)


def _tell(seed: int) -> int:
    print(draw_case(seed).to_json())
    story: list[str] = []
    loop = SimLoop()
    try:
        run_seed(seed, story, loop=loop)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was asked for
        print("\n".join(story))
        _report(f"seed {seed}", f"{type(error).__name__}: {error}", shrink_seed(seed))
        return 1
    print("\n".join(story))
    print(f"seed {seed}: as it should be; {loop.steps} steps, {loop.time():.6f} s of virtual time")
    return 0


def _search(first: int, seconds: float, count: int | None, jobs: int) -> int:
    end = time.monotonic() + seconds
    batches: Iterable[int] = itertools.count(first, BATCH)
    if count is not None:
        batches = range(first, first + count, BATCH)
        end = float("inf")
    total = Batch(first)
    began = time.monotonic()
    for batch in _on_all(jobs, run_batch, batches, end):
        total.add(batch)
        for seed, error in batch.failed:
            _report(f"seed {seed}", error, shrink_seed(seed))
    print(
        f"{total.schedules} schedules, {total.steps} steps in {time.monotonic() - began:.0f} s on {jobs} processes: "
        f"{total.schedules / total.cpu_s:.0f} schedules a second and core, "
        f"{total.virtual_s / total.cpu_s:.2f} virtual seconds in one of the processor's; {len(total.failed)} violations"
    )
    return 1 if total.failed else 0


def _exhaust(size: int, jobs: int) -> int:
    failures = 0
    total = Figures()
    began = time.monotonic()
    for disk_format, held in worlds():
        here = Figures()
        count = 0
        for found in _on_all(jobs, exhaust_case, cases(size, disk_format, held)):
            count += 1
            for figures in (here, total):
                figures.add(found.figures)
            if found.error:
                failures += 1
                _report(" | ".join(actor[0] for actor in found.case.actors), found.error, found.failure)
        print(
            f"{disk_format}, {held[0]}: {count} programs of {size} operations, {here.runs} runs and {here.pruned} cut "
            f"short, {here.longest} steps at most",
            flush=True,
        )
    print(f"{total.runs} runs, {total.steps} steps in {time.monotonic() - began:.0f} s; {failures} violations")
    return 1 if failures else 0


def _cut_power(size: int, jobs: int) -> int:
    states = moments = failures = count = 0
    began = time.monotonic()
    for judged in _on_all(jobs, judge_workload, workloads(size)):
        count += 1
        states += judged.states
        moments += judged.moments
        if judged.error:
            failures += 1
            print(f"FAILED {judged.workload}: {judged.error}", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{count} workloads, {moments} moments, {states} media judged in {seconds:.0f} s; {failures} workloads failed"
    )
    return 1 if failures else 0


def _fail(jobs: int) -> int:
    total = FaultRuns()
    began = time.monotonic()
    for runs in _on_all(jobs, run_fault_points, programs()):
        total.add(runs)
        for failed in runs.failed:
            print(f"FAILED {failed}", flush=True)
    print(
        f"{total.runs} fault runs in {time.monotonic() - began:.0f} s, "
        f"{total.virtual_s / total.cpu_s:.0f} times faster than virtual time; {len(total.failed)} violations"
    )
    return 1 if total.failed else 0


def _replay(path: str) -> int:
    failures = count = 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            count += 1
            try:
                replay(line)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
                failures += 1
                print(f"{path}:{number}: {type(error).__name__}: {error}")
    print(f"{count} failures of old replayed; {failures} happen again")
    return 1 if failures else 0


def _on_all(jobs: int, work: Callable[[T], U], items: Iterable[T], end: float = float("inf")) -> Iterator[U]:
    """What `work`, a function of a module, makes of each item, in the order they end. None begins after `end`."""
    in_time = itertools.takewhile(lambda _: time.monotonic() < end, items)
    if jobs <= 1:
        yield from map(work, in_time)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), logging.disable, (logging.WARNING,)) as pool:
        pending = {pool.submit(work, item) for item in itertools.islice(in_time, jobs * 2)}
        while pending:
            # In the order they end: one long item keeps no other core waiting.
            ended, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending.update(pool.submit(work, item) for item in itertools.islice(in_time, len(ended)))
            for future in ended:
                yield future.result()


def _report(what: str, error: str, failure: Failure | None) -> None:
    print(f"FAILED {what}: {error}")
    if failure is None:
        print("  it depends on times or tearing, and does not happen on disks that take no time")
        return
    print(f"  made small, with {len(failure.preemptions)} preemptions:")
    for line in failure.story():
        print(f"  {line}")
    print(f"  for the corpus: {failure.to_json()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
