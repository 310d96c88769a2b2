"""Every fault at every request of small programs: guests and snapshots get what is promised, and a lapse is found."""

from __future__ import annotations

import itertools

import pytest
from tests.sim.breaks import BREAKS

from fleecer.testing.sim.cases import Case
from fleecer.testing.sim.faultpoints import (
    backup_programs,
    fault_points,
    late_programs,
    mixed_programs,
    run_fault_points,
)

FIRST = [*late_programs(), *backup_programs(), *(case for case in mixed_programs() if case.seed == 0)]
"""Every format with every scheme, once; `python -m fleecer.testing.sim --faults` tries other times too."""


def name(case: Case) -> str:
    return "-".join([case.format, *case.held, case.actors[-1][0].split()[0]])


@pytest.mark.parametrize("case", FIRST, ids=name)
def test_whatever_fails_guests_and_snapshots_get_what_is_promised(case: Case) -> None:
    total = run_fault_points(case)
    assert not total.failed, total.failed[0]
    assert total.runs >= 70, "hardly any fault was tried"


@pytest.mark.parametrize("case", FIRST, ids=name)
def test_every_disk_and_every_way_to_fail_is_among_the_faults(case: Case) -> None:
    points = list(fault_points(case))
    scratches = {f"scratch-s{len(case.held)}" if scheme == "access" else "target-b1" for scheme in case.held[-1:]}
    if case.actors[-1][0] in ("backup", "rebackup"):
        scratches.add("target-f1")
    own = {"qcow2": {"image"}, "overlay": {"image", "base"}}.get(case.format, {"disk"})
    assert {point.disk for point in points} >= own | scratches | {"actor 0", "actor 1"}
    assert {point.way for point in points} == {"EIO", "ENOSPC", "short", "stall", "cancel"}
    assert any(point.for_good for point in points)
    assert len(set(map(str, points))) == len(points)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("a failed flush is forgotten", "after a cut"),
        ("a full scratch fails the guest", "requests of guests failed"),
        ("a slow copy is waited for without end", "a guest's request took"),
        ("a break is not noticed after a read", "at its instant it was"),
    ],
)
def test_a_rule_taken_out_is_found(rule: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[rule](monkeypatch)
    failed = itertools.chain.from_iterable(run_fault_points(case).failed for case in FIRST)
    assert any(told in line for line in failed), "it was not found out"
