"""The real block layer under random schedules: guests, readers and an operator on one disk, judged by the oracle."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from tests.sim.breaks import BREAKS

from fleecer.testing.sim.cases import (
    BATCH,
    GUESTS,
    OPERATORS,
    READERS,
    Scheme,
    draw_case,
    run_batch,
    run_case,
    run_seed,
)
from fleecer.testing.sim.world import Format
from fleecer.testing.streams import BUFFER_BYTES

BATCHES = 12


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_read_is_allowed_under_random_schedules(batch: int) -> None:
    done = run_batch(batch * BATCH)
    assert not done.failed
    assert (done.schedules, done.steps > 10 * BATCH) == (BATCH, True)


@pytest.mark.parametrize(
    "seed",
    [
        917808,  # a disk that showed where it ended in the middle of a write: a read up to there was torn
        2066405,  # a full job's last flush came when its target was detached already, and waited for ever
    ],
)
def test_what_failed_once_at_certain_times_does_not_fail_again(seed: int) -> None:
    run_case(dataclasses.replace(draw_case(seed), room_bytes=BUFFER_BYTES))


def test_the_cases_drawn_are_of_every_kind() -> None:
    drawn = [draw_case(seed) for seed in range(BATCHES * BATCH)]
    words = {operation.split()[0] for case in drawn for actor in case.actors for operation in actor}
    assert words == {*GUESTS, *READERS, *OPERATORS}
    assert {case.format for case in drawn} == {*get_args(Format)}
    assert {scheme for case in drawn for scheme in case.held} == {*get_args(Scheme)}
    assert {case.over_nbd for case in drawn} == {False, True}


def test_the_same_seed_gives_the_same_story() -> None:
    stories: list[list[str]] = [[], []]
    for story in stories:
        run_seed(7, story)
    assert stories[0] == stories[1]
    assert stories[0]


@pytest.mark.parametrize(
    "rule",
    [
        "old data is not kept",
        "changes do not wait for frozen reads",
        "a wait between choosing and freezing",
        "done before the copy is made",
    ],
)
def test_a_rule_taken_out_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[rule](monkeypatch)
    failed = next((done.failed for first in range(0, 4000, BATCH) if (done := run_batch(first)).failed), [])
    assert any("at its instant it was" in error for _, error in failed)
