"""A failure made small: nothing in it is needless, it fails as told each time, and it can be written down."""

from __future__ import annotations

import json

import pytest
from tests.sim.breaks import BREAKS

from fleecer.testing.sim.cases import Case, draw_case, run_directed, run_seed
from fleecer.testing.sim.loop import NamedLoop
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.shrink import Failure, Follow, Script, replay, shrink, shrink_seed

LARGE = Case(
    "bare",
    2,
    ("access", "target"),
    (
        ("read 0 8", "flush", "write 0 8", "zero 8 16"),
        ("write 8 16", "read 0 16"),
        ("sstatus 0 0 8", "sread 0 0 16", "sread 1 8 16"),
        ("sstart", "jcancel"),
    ),
    prompt=True,
    inline=0.3,
)


def failing_seed() -> int:
    """The first seed that fails as things are."""
    for seed in range(500):
        try:
            run_seed(seed)
        except Violation:
            return seed
    raise AssertionError("no seed fails")


def fails(case: Case, preemptions: dict[int, int]) -> bool:
    try:
        run_directed(case, Script(preemptions))
    except Violation:
        return True
    return False


def check(failure: Failure) -> None:
    """It fails as it says; no preemption in it is needless."""
    assert fails(failure.case, failure.preemptions)
    for step in failure.preemptions:
        rest = {at: index for at, index in failure.preemptions.items() if at != step}
        assert not fails(failure.case, rest), f"the preemption at step {step} is needless"
    with pytest.raises(type(failure.error)) as again:
        replay(failure.to_json())
    assert str(again.value) == str(failure.error)


def test_a_large_case_is_left_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS["old data is not kept"](monkeypatch)
    failure = shrink(LARGE, [Script({})])
    assert failure is not None
    check(failure)
    assert sorted(word.split()[0] for actor in failure.case.actors for word in actor) in (
        ["sread", "write"],
        ["sread", "zero"],
        ["write"],  # what `World.finish` reads tells
        ["zero"],
    )
    assert len(failure.case.held) == 1
    assert not failure.case.inline


def test_a_seed_that_fails_becomes_a_small_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS["old data is not kept"](monkeypatch)
    failure = shrink_seed(failing_seed())
    assert failure is not None
    check(failure)
    assert sum(map(len, failure.case.actors)) <= 2
    assert not failure.case.over_nbd


def test_a_seed_that_does_not_fail_gives_nothing() -> None:
    assert shrink_seed(1) is None


def test_what_does_not_fail_cannot_be_made_small() -> None:
    assert shrink(LARGE, [Script({}), Script({1: 1})]) is None


def test_a_story_says_who_does_what_up_to_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS["old data is not kept"](monkeypatch)
    failure = shrink(LARGE, [Script({})])
    assert failure is not None
    story = failure.story()
    assert any(line.startswith(" actor ") and "guest" in line for line in story)
    assert story[-1] == f"Violation: {failure.error}"


def test_an_order_of_names_leads_to_the_same_run() -> None:
    first, second = NamedLoop(), NamedLoop()
    case = Case("bare", 2, ("access",), (("write 0 8",), ("sread 0 0 16",)), prompt=True)
    script = Script({2: 1, 5: 1, 7: 1})
    run_directed(case, script, loop=first)
    run_directed(case, Follow(first.order), loop=second)
    assert second.order == first.order
    assert script.preemptions, "the script changed nothing"


def test_a_case_survives_being_written_down() -> None:
    for seed in range(200):
        case = draw_case(seed)
        assert Case.from_json(case.to_json()) == case


@pytest.mark.parametrize("text", ["", "{", '{"held": [], "actors": [], "colour": 1}', '{"held": 1, "actors": []}'])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        Case.from_json(text)


def test_a_line_of_the_corpus_tells_the_case_the_schedule_and_the_failure() -> None:
    line = Failure(LARGE, {7: 1, 3: 2}, Violation("so it is")).to_json()
    fields = json.loads(line)
    assert "\n" not in line
    assert Case.from_json(json.dumps(fields["case"])) == LARGE
    assert (fields["preemptions"], fields["was"]) == ([[3, 2], [7, 1]], "Violation: so it is")
