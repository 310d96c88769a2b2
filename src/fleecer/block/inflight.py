"""Requests in flight over byte ranges, and who waits for whom: the only waiting for overlap in the program.

A claim covers [offset, offset + length). Two claims conflict when they overlap and at least one of them is
*serialising*. A claim is granted once every conflicting claim that entered before it has left.

Invariants:
- Order of entry decides: a claim waits for earlier ones only, so claims of one InFlight cannot wait in a circle, as
  long as no request enters a second claim while it holds one on the same InFlight.
- Entering and finding out whom to wait for is one step, with no await between: marking a range without waiting for
  those already in it does not serialise.
- A claim that leaves before it was granted (its request failed) releases those behind it all the same.
- A claim never spans a write to a socket, so a client that stops reading stalls nobody.
"""

from __future__ import annotations

import asyncio
import functools

from fleecer.ranges import Buffer
from fleecer.storage.api import BeginRead, ReadEnded


class Claim:
    """One request's hold on a range. Made by `InFlight.enter`, ended by `InFlight.leave`."""

    __slots__ = ("blockers", "dependents", "end", "serialising", "start", "waiter")

    def __init__(self, start: int, end: int, serialising: bool) -> None:
        self.start = start
        self.end = end
        self.serialising = serialising
        self.blockers = 0
        self.dependents: list[Claim] | None = None  # made when there is one: most claims never have any
        self.waiter: asyncio.Future[bool] | None = None

    async def granted(self) -> None:
        """Returns when no earlier conflicting claim is left. Call it only where `blockers` is not 0, and once."""
        if self.blockers:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter


class InFlight:
    """The claims on one node's ranges.

    `serialise=False` switches all waiting off: for tests that must show what goes wrong without it.
    """

    __slots__ = ("_claims", "_serialise", "_serialising_count")

    def __init__(self, *, serialise: bool = True) -> None:
        self._claims: dict[Claim, None] = {}  # in the order of entry
        self._serialising_count = 0
        self._serialise = serialise

    def __len__(self) -> int:
        return len(self._claims)

    def enter(self, offset: int, length: int, serialising: bool = False) -> Claim:
        """Claims a range at once. The caller must await `granted()` if `blockers` is not 0, and `leave` in any case."""
        claim = Claim(offset, offset + length, serialising)
        if self._claims and (serialising or self._serialising_count) and self._serialise:
            self._hang_behind(claim)
        self._claims[claim] = None
        if serialising:
            self._serialising_count += 1
        return claim

    def leave(self, claim: Claim) -> None:
        """Ends a claim and releases whoever waited for it."""
        del self._claims[claim]
        if claim.serialising:
            self._serialising_count -= 1
        if claim.dependents is not None:
            self._release(claim.dependents)

    def begin_read(self, start: int, end: int, begin: BeginRead, place: int, length: int, ended: ReadEnded) -> bool:
        """Begins a read that claims [start, end) until its end, as `Node.begin_pread` does, by `begin` at `place`.

        False, with nothing claimed, where the claim would wait, or `begin` says so.
        """
        if self._serialising_count and self.would_wait(start, end - start):
            return False
        claim = Claim(start, end, serialising=False)
        self._claims[claim] = None
        if begin(place, length, functools.partial(self._read_ended, claim, ended)):
            return True
        self.leave(claim)
        return False

    def _read_ended(self, claim: Claim, ended: ReadEnded, data: Buffer, error: Exception | None) -> None:
        del self._claims[claim]
        if claim.dependents is not None:
            self._release(claim.dependents)
        ended(data, error)

    def _release(self, dependents: list[Claim]) -> None:
        for dependent in dependents:
            dependent.blockers -= 1
            waiter = dependent.waiter
            if not dependent.blockers and waiter is not None and not waiter.done():
                waiter.set_result(True)

    def changing(self) -> bool:
        """Whether any claim is serialising."""
        return self._serialising_count != 0

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether any claim touches the range."""
        if not self._claims:
            return False
        end = offset + length
        return any(claim.start < end and offset < claim.end for claim in self._claims)

    def would_wait(self, offset: int, length: int) -> bool:
        """Whether a claim of the range, not serialising, would wait: for what is over at once, and enters none."""
        if not self._serialising_count or not self._serialise:
            return False
        end = offset + length
        return any(claim.serialising and claim.start < end and offset < claim.end for claim in self._claims)

    def until_clear(self, offset: int, length: int) -> asyncio.Future[bool] | None:
        """A future that becomes True when every claim that overlaps the range now has left; None if there is none.

        Claims that enter later are not waited for, and are not held up. Whoever waits may give up by completing the
        future with False.
        """
        bystander = Claim(offset, offset + length, serialising=True)
        if self._serialise:
            self._hang_behind(bystander)
        if not bystander.blockers:
            return None
        bystander.waiter = asyncio.get_running_loop().create_future()
        return bystander.waiter

    def _hang_behind(self, claim: Claim) -> None:
        start, end, serialising = claim.start, claim.end, claim.serialising
        for earlier in self._claims:
            if earlier.start < end and start < earlier.end and (serialising or earlier.serialising):
                if earlier.dependents is None:
                    earlier.dependents = []
                earlier.dependents.append(claim)
                claim.blockers += 1
