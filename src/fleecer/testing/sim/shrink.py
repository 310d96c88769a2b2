"""Makes a failure small: fewer operations, then fewer preemptions; what is left is told as a story, and kept.

A schedule is told as what differs from first come, first served: at step N, the one that came K-th runs first.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fleecer.testing.sim.cases import Case, draw_case, run_directed, run_seed
from fleecer.testing.sim.loop import NamedLoop

Preemptions = dict[int, int]
"""By step: which of those that are ready runs, the first come being 0; 0 at steps not named."""


WANDERINGS = 1000
"""How many random schedules are tried to have a failure without the times it was found with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A case, a schedule that made it fail, and with what."""

    case: Case
    preemptions: Preemptions
    error: BaseException

    def to_json(self) -> str:
        """One line for a corpus: see `replay`."""
        fields = {
            "case": json.loads(self.case.to_json()),
            "preemptions": sorted(self.preemptions.items()),
            "was": f"{type(self.error).__name__}: {self.error}",
        }
        return json.dumps(fields)

    def story(self) -> list[str]:
        """Who does what when, up to the failure."""
        lines: list[str] = []
        loop = NamedLoop(steps_max=100_000)
        try:
            run_directed(self.case, Script(self.preemptions), trace=_Told(loop, lines), loop=loop)
        except Exception as error:  # noqa: BLE001 - it is what the story is about
            lines.append(f"{type(error).__name__}: {error}")
        return lines


class _Told(list[str]):
    """Collects lines, each with who says it."""

    def __init__(self, loop: NamedLoop, lines: list[str]) -> None:
        super().__init__()
        self._loop = loop
        self._lines = lines

    def append(self, line: str) -> None:
        """Adds a line."""
        self._lines.append(f"{self._loop.current.split('.')[0]:>8}  {line}")


class _Director(abc.ABC):
    """A driver that notes which of its choices were not first come, first served, as `preemptions`."""

    def __init__(self) -> None:
        self.preemptions: Preemptions = {}
        self._step = -1

    def choose(self, names: list[str], enablers: list[int]) -> int:
        """See `Driver.choose`."""
        self._step += 1
        index = self._pick(names)
        if index:
            self.preemptions[self._step] = index
        return index

    @abc.abstractmethod
    def _pick(self, names: list[str]) -> int:
        """The index of what is to run."""

    def stepped(self) -> None:
        """See `Driver.stepped`."""
        return

    def over(self) -> None:
        """See `Driver.over`."""
        return


class Script(_Director):
    """Directs a loop by preemptions."""

    def __init__(self, preemptions: Preemptions) -> None:
        super().__init__()
        self._given = preemptions

    def _pick(self, names: list[str]) -> int:
        index = self._given.get(self._step, 0)
        return index if index < len(names) else 0


class Follow(_Director):
    """Directs a loop in an order of names: of those ready, the one that comes next in it; else first come."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        self._places: dict[str, list[int]] = {}
        for place, name in reversed(list(enumerate(order))):
            self._places.setdefault(name, []).append(place)

    def _pick(self, names: list[str]) -> int:
        unknown = 1 << 60
        places = [self._places[name][-1] if self._places.get(name) else unknown for name in names]
        index = places.index(min(places))
        if self._places.get(names[index]):
            self._places[names[index]].pop()
        return index


class Wander(_Director):
    """Directs a loop at random, by a few preemptions as a rule."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self._often = self._draw.choice((0.1, 0.3, 0.6))

    def _pick(self, names: list[str]) -> int:
        return self._draw.randrange(len(names)) if self._draw.random() < self._often else 0


def replay(line: str) -> None:
    """Runs what `Failure.to_json` told. Raises as `run_directed`."""
    fields: dict[str, Any] = json.loads(line)
    case = Case.from_json(json.dumps(fields["case"]))
    run_directed(case, Script(dict(fields["preemptions"])))


def shrink_seed(seed: int) -> Failure | None:
    """A small failure of a seed's case. None if none is found on disks that take no time, and tear nothing."""
    loop = NamedLoop()
    case = draw_case(seed)
    try:
        run_seed(seed, loop=loop)
    except Exception:  # noqa: BLE001 - whatever it is, it is looked for below
        return shrink(case, [Follow(loop.order), *map(Wander, range(WANDERINGS))])
    return None


def shrink(case: Case, directors: Iterable[_Director]) -> Failure | None:
    """A failure of `case` under the first of the directors under which it fails, made small; None if it never does."""
    failure = next(filter(None, (_try(case, director) for director in directors)), None)
    if failure is None:
        return None
    while smaller := _first_smaller(failure):
        failure = smaller
    return _fewest_preemptions(failure)


def _first_smaller(failure: Failure) -> Failure | None:
    """The failure with one thing less. Steps are renumbered by that, so its order is followed by name."""
    loop = NamedLoop(steps_max=100_000)
    with contextlib.suppress(Exception):
        run_directed(failure.case, Script(failure.preemptions), loop=loop)
    tries = (_try(case, Follow(loop.order)) for case in _fewer_operations(failure.case))
    return next(filter(None, tries), None)


def _try(case: Case, director: _Director) -> Failure | None:
    try:
        run_directed(case, director)
    except Exception as error:  # noqa: BLE001 - any failure is one
        return Failure(case, director.preemptions, error)
    return None


def _fewer_operations(case: Case) -> Iterator[Case]:
    """The case less one thing. Actors keep their numbers, by which their steps are named."""
    for number, actor in enumerate(case.actors):
        for place in range(len(actor)):
            less = (*actor[:place], *actor[place + 1 :])
            yield dataclasses.replace(case, actors=(*case.actors[:number], less, *case.actors[number + 1 :]))
    for place in range(len(case.held)):
        yield dataclasses.replace(case, held=(*case.held[:place], *case.held[place + 1 :]))
    if case.over_nbd:
        yield dataclasses.replace(case, over_nbd=False)
    if case.inline:
        yield dataclasses.replace(case, inline=0.0)
    if case.actors and not case.actors[-1]:
        yield dataclasses.replace(case, actors=case.actors[:-1])


def _fewest_preemptions(failure: Failure) -> Failure:
    """Leaves preemptions out, halves first, then one by one, as long as it fails."""
    size = max(1, len(failure.preemptions) // 2)
    while True:
        steps = sorted(failure.preemptions)
        smaller = None
        for start in range(0, len(steps), size):
            without = set(steps[start : start + size])
            rest = {step: index for step, index in failure.preemptions.items() if step not in without}
            smaller = _try(failure.case, Script(rest))
            if smaller is not None:
                failure = smaller
                break
        if smaller is None:
            if size == 1:
                return failure
            size //= 2
