"""Claims against a naive oracle: whom a claim waits for, in what order, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecer.block.inflight import Claim, InFlight


@dataclasses.dataclass
class Step:
    """Enter a claim, or let the `leaves`-th of those present leave (modulo their number)."""

    offset: int
    length: int
    serialising: bool
    leaves: int | None


STEPS = st.lists(
    st.builds(Step, st.integers(0, 12), st.integers(1, 6), st.booleans(), st.one_of(st.none(), st.integers(0, 20))),
    max_size=40,
)


def conflict(a: Claim, b: Claim) -> bool:
    """The rule, byte by byte."""
    shared = set(range(a.start, a.end)) & set(range(b.start, b.end))
    return bool(shared) and (a.serialising or b.serialising)


def expected_blockers(present: list[Claim], index: int) -> int:
    return sum(conflict(earlier, present[index]) for earlier in present[:index])


@given(STEPS)
def test_a_claim_waits_for_exactly_the_earlier_conflicting_ones(steps: list[Step]) -> None:
    in_flight = InFlight()
    present: list[Claim] = []
    for step in steps:
        if step.leaves is not None and present:
            in_flight.leave(present.pop(step.leaves % len(present)))
        else:
            present.append(in_flight.enter(step.offset, step.length, step.serialising))
        assert len(in_flight) == len(present)
        for index, claim in enumerate(present):
            assert claim.blockers == expected_blockers(present, index)
        for at in range(20):
            assert in_flight.overlaps(at, 2) == any(c.start < at + 2 and at < c.end for c in present)


@given(STEPS)
@settings(deadline=None)
def test_waiters_are_woken_when_and_only_when_they_are_granted(steps: list[Step]) -> None:
    async def main() -> None:
        in_flight = InFlight()
        present: list[Claim] = []
        waits: dict[Claim, asyncio.Task[None]] = {}
        clears: list[tuple[set[Claim], asyncio.Future[bool] | None]] = []
        for step in steps:
            if step.leaves is not None and present:
                claim = present.pop(step.leaves % len(present))
                in_flight.leave(claim)
                waits.pop(claim).cancel()
            elif step.length == 6:
                touching = {c for c in present if c.start < step.offset + 6 and step.offset < c.end}
                clears.append((touching, in_flight.until_clear(step.offset, 6)))
            else:
                claim = in_flight.enter(step.offset, step.length, step.serialising)
                present.append(claim)
                waits[claim] = asyncio.create_task(claim.granted())
            for _ in range(3):
                await asyncio.sleep(0)
            for index, claim in enumerate(present):
                assert waits[claim].done() == (expected_blockers(present, index) == 0)
            for touching, clear in clears:
                assert (clear is None or clear.done()) == touching.isdisjoint(present)
        while present:
            in_flight.leave(present.pop(0))
        await asyncio.gather(*waits.values())
        assert all(clear is None or clear.result() for _, clear in clears)

    asyncio.run(main())


async def test_a_claim_that_leaves_ungranted_releases_those_behind_it() -> None:
    in_flight = InFlight()
    first = in_flight.enter(0, 10)
    second = in_flight.enter(0, 10, serialising=True)
    third = in_flight.enter(5, 1)
    assert (first.blockers, second.blockers, third.blockers) == (0, 1, 1)
    in_flight.leave(second)
    assert third.blockers == 0
    in_flight.leave(first)
    in_flight.leave(third)
    assert len(in_flight) == 0


async def test_a_cancelled_waiter_does_not_hinder_the_others() -> None:
    in_flight = InFlight()
    first = in_flight.enter(0, 10, serialising=True)
    second, third = in_flight.enter(0, 10), in_flight.enter(0, 10)
    cancelled, waiting = asyncio.create_task(second.granted()), asyncio.create_task(third.granted())
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    in_flight.leave(first)
    await waiting
    assert cancelled.cancelled()


async def test_waiting_for_a_clear_range_ignores_claims_that_come_later() -> None:
    in_flight = InFlight()
    first = in_flight.enter(0, 10)
    clear, given_up = in_flight.until_clear(5, 1), in_flight.until_clear(5, 1)
    later = in_flight.enter(5, 1, serialising=True)
    assert later.blockers == 1, "it waits for the first claim, not for those who wait for a clear range"
    assert clear is not None
    assert given_up is not None
    given_up.set_result(False)
    assert not clear.done()
    in_flight.leave(first)
    assert clear.result() is True
    assert given_up.result() is False
    in_flight.leave(later)
    assert in_flight.until_clear(0, 10) is None


async def test_a_claim_behind_a_waiting_one_waits_too() -> None:
    """Order of entry decides; else a stream of readers would keep a serialising write waiting for ever."""
    in_flight = InFlight()
    in_flight.enter(0, 10)
    in_flight.enter(0, 10, serialising=True)
    assert in_flight.enter(0, 10).blockers == 1


@pytest.mark.parametrize("serialising", [False, True])
async def test_without_serialisation_nobody_waits(serialising: bool) -> None:
    in_flight = InFlight(serialise=False)
    claims = [in_flight.enter(0, 10, serialising) for _ in range(3)]
    assert [claim.blockers for claim in claims] == [0, 0, 0]
    assert in_flight.until_clear(0, 10) is None
    for claim in claims:
        in_flight.leave(claim)
