"""Every interleaving of every few operations: none breaks what Fleecer promises, and a rule taken out is found."""

from __future__ import annotations

import pytest
from tests.sim.breaks import BREAKS

from fleecer.testing.sim.cases import Scheme, run_directed
from fleecer.testing.sim.exhaust import OPERATIONS, cases, exhaust_case, worlds
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.shrink import Failure, Script, replay
from fleecer.testing.sim.world import Format

PARTS = 3


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("disk_format", "held"), worlds())
def test_every_interleaving_of_every_two_operations_is_right(
    disk_format: Format, held: tuple[Scheme, ...], part: int
) -> None:
    runs = 0
    for case in list(cases(2, disk_format, held))[part::PARTS]:
        found = exhaust_case(case)
        assert not found.error, f"{found.error}; {found.failure and found.failure.to_json()}"
        runs += found.figures.runs
    assert runs > 50, "hardly anything was tried"


@pytest.mark.parametrize(("disk_format", "held"), worlds())
def test_every_interleaving_of_a_write_a_snapshot_read_and_a_third_operation_is_right(
    disk_format: Format, held: tuple[Scheme, ...]
) -> None:
    """Of the triples those that tell most; `python -m fleecer.testing.sim --exhaust 3` visits all, for many minutes."""
    wanted = {(OPERATIONS["write"],), (OPERATIONS["snapshot read"],)}
    chosen = [case for case in cases(3, disk_format, held) if wanted <= set(case.actors)]
    if disk_format != "bare" or held == ("target",):  # a second change takes a minute where so much can be in between
        changes = {(OPERATIONS[name],) for name in ("zero", "discard", "flush", "read")}
        if disk_format == "bare":  # but there nothing below hides a race
            changes.remove((OPERATIONS["zero"],))
        chosen = [case for case in chosen if not changes & set(case.actors) and len(set(case.actors)) == 3]
    assert len(chosen) >= 3
    for case in chosen:
        found = exhaust_case(case)
        assert not found.error, f"{found.error}; {found.failure and found.failure.to_json()}"


def test_every_operation_is_part_of_some_case_of_each_scheme() -> None:
    for _, held in worlds():
        used = {actor[0] for case in cases(2, "raw", held) for actor in case.actors}
        left_out = {"jcancel"} if held == ("access",) else {"sstop"}
        assert used == set(OPERATIONS.values()) - left_out


def first_failure(scheme: Scheme) -> Failure:
    """What the search of all pairs comes upon first."""
    for case in cases(2, "bare", (scheme,)):
        found = exhaust_case(case)
        if found.error:
            assert found.failure is not None, f"{found.error} does not happen again"
            return found.failure
    raise AssertionError("nothing was found")


@pytest.mark.parametrize(
    ("rule", "scheme"),
    [
        ("changes do not wait for frozen reads", "access"),
        ("a wait between choosing and freezing", "access"),
        ("done before the copy is made", "access"),
        ("old data is not kept", "access"),
        ("copies do not serialise", "target"),
        ("old data is not kept", "target"),
    ],
)
def test_a_rule_taken_out_is_found_made_small_told_and_replayed(
    rule: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        BREAKS[rule](patch)
        failure = first_failure(scheme)
        assert sum(map(len, failure.case.actors)) <= 2
        for step in failure.preemptions:  # each is needed
            rest = {at: index for at, index in failure.preemptions.items() if at != step}
            run_directed(failure.case, Script(rest))
        story = failure.story()
        assert story[-1] == f"Violation: {failure.error}"
        assert any("guest" in line for line in story), "nobody is told of"
        with pytest.raises(Violation) as again:
            replay(failure.to_json())
        assert str(again.value) == str(failure.error)
    replay(failure.to_json())
    assert not exhaust_case(failure.case).error
