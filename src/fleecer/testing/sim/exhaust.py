"""All interleavings of every few operations at once on a disk of two clusters, by explore.py.

Operations touch the border of the clusters or all of both, so any two meet. The worlds differ in the disk's format and
in the snapshots that are held: one read through snapshot-access, or a backup job's target over the live disk.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import get_args

from fleecer.testing.sim.cases import Case, Scheme, run_directed
from fleecer.testing.sim.explore import Explorer, Figures
from fleecer.testing.sim.loop import Driver, NamedLoop
from fleecer.testing.sim.shrink import Failure, Follow, shrink
from fleecer.testing.sim.world import Format

OPERATIONS = {
    "read": "read 0 16",
    "write": "write 0 8",
    "zero": "zero 4 16",
    "discard": "discard 0 16",
    "flush": "flush",
    "snapshot read": "sread 0 0 16",
    "snapshot status": "sstatus 0 0 16",
    "snapshot start": "sstart",
    "snapshot stop": "sstop",
    "job cancel": "jcancel",
}


def worlds() -> list[tuple[Format, tuple[Scheme, ...]]]:
    """Every format with every scheme."""
    return [(disk_format, (scheme,)) for disk_format in get_args(Format) for scheme in get_args(Scheme)]


def cases(size: int, disk_format: Format, held: Sequence[Scheme]) -> Iterator[Case]:
    """Every multiset of `size` operations that make sense where `held` are there. One cluster was never written."""
    for chosen in itertools.combinations_with_replacement(OPERATIONS, size):
        if ("job cancel" in chosen and "target" not in held) or ("snapshot stop" in chosen and "access" not in held):
            continue
        actors = tuple((OPERATIONS[name],) for name in chosen)
        yield Case(disk_format, 2, tuple(held), actors, prompt=True, filled=8)


def longer_cases() -> Iterator[Case]:
    """What no pair of operations shows.

    Two in a new cluster whom a third kept waiting; one that was set aside; what a newer snapshot that ended has kept.
    """
    yield Case("overlay", 2, (), (("write 0 3",), ("write 4 7",), ("zero 0 8",)), prompt=True, filled=0)
    yield Case("qcow2", 2, (), (("blank 0 8", "write 0 4"), ("discard 0 8",)), prompt=True, filled=8)
    actors = (("write 0 8", "sstop 1", "write 0 8"), ("sread 0 0 8",))
    yield Case("raw", 1, ("access", "access"), actors, prompt=True)


@dataclasses.dataclass(slots=True)
class Found:
    """What the search of one case came to."""

    case: Case
    figures: Figures
    failure: Failure | None = None
    error: str = ""


def exhaust_case(case: Case, *, small: bool = True) -> Found:
    """Visits all interleavings of the case up to the first that fails; that is made `small`."""
    explorer = Explorer()
    try:
        explorer.explore(functools.partial(_run, case))
    except Exception as error:  # noqa: BLE001 - any failure is one
        return Found(
            case, explorer.figures, shrink(case, [Follow(explorer.order())]), f"{type(error).__name__}: {error}"
        )
    return Found(case, explorer.figures)


def _run(case: Case, loop: NamedLoop, driver: Driver) -> None:
    run_directed(case, driver, loop=loop)
