"""Visits all interleavings of a small program, leaving out those that differ only in what nobody could notice.

Stateless search with source sets and sleep sets (Abdulla, Aronsson, Jonsson, Sagonas: "Source Sets: A Foundation for
Optimal Dynamic Partial Order Reduction"). The program is run from its beginning again and again, each time with the
choices of the last run up to some step, another choice there, and the default (first come, first served) after that.

Where two steps conflict (access.py tells), and neither was the cause of the other, a run is made in which the later one
comes first. A step whose every order was tried sleeps until something happens that conflicts with it.

Invariants
- Every order of conflicting steps that can happen does happen in some run.
- The same program gives the same runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from fleecer.testing.sim.access import Recorder, Touched, Watch, conflict
from fleecer.testing.sim.loop import Driver, NamedLoop


class Pruned(Exception):
    """Everything that could go on here was seen before."""


@dataclasses.dataclass(slots=True)
class _Node:
    """One step of the current run: what could run, what does, what is still to be tried instead."""

    names: list[str]
    sleep: dict[str, Touched]
    chosen: str
    wanted: set[str]
    enabler: int
    touched: Touched = dataclasses.field(default_factory=dict)
    past: int = 0  # the steps that came before it of necessity, one bit each


@dataclasses.dataclass(slots=True)
class Figures:
    """What a search did: runs that went to their end, runs cut short as seen before, the longest run."""

    runs: int = 0
    pruned: int = 0
    steps: int = 0
    longest: int = 0

    def add(self, other: Figures) -> None:
        """Counts another search in."""
        self.runs += other.runs
        self.pruned += other.pruned
        self.steps += other.steps
        self.longest = max(self.longest, other.longest)


Program = Callable[[NamedLoop, Driver], None]
"""Runs once on the loop, which the driver is to direct from where choices start to where the loop becomes quiet."""


class Explorer:
    """A search over the runs of one program. It directs the loop of each (`Driver`).

    What the program shares are objects of the classes that access.py watches, and of those in `also`.
    """

    def __init__(self, also: Iterable[type] = ()) -> None:
        self.figures = Figures()
        self._stack: list[_Node] = []
        self._depth = 0
        self._known = 0  # how many steps of this run are those of the last
        self._recorder: Recorder
        self._watch = Watch(also)

    def explore(self, program: Program, *, runs_max: int | None = None) -> bool:
        """Runs the program in every way. Raises what it raises, then `order` tells the choices that led there.

        Returns whether all was visited; False where `runs_max` ended it before.
        """
        self._watch.install()
        try:
            while True:
                self._depth = 0
                self._known = max(0, len(self._stack) - 1)
                try:
                    program(self._new_loop(), self)
                except Pruned:
                    self.figures.pruned += 1
                else:
                    self.figures.runs += 1
                self.figures.longest = max(self.figures.longest, len(self._stack))
                del self._stack[self._depth :]
                if not self._turn_back():
                    return True
                if runs_max is not None and self.figures.runs + self.figures.pruned >= runs_max:
                    return False
        finally:
            self._watch.remove()

    def order(self) -> list[str]:
        """The choices of the last run, by name."""
        return [node.chosen for node in self._stack]

    def _new_loop(self) -> NamedLoop:
        loop = NamedLoop(steps_max=20_000)
        self._recorder = Recorder(loop)
        self._watch.report_to(self._recorder)
        return loop

    # Driver.

    def choose(self, names: list[str], enablers: list[int]) -> int:
        """See `Driver.choose`."""
        depth = self._depth
        if depth < len(self._stack):
            node = self._stack[depth]
            index = names.index(node.chosen)
            if depth == self._known:
                self._watch.note(True)
                node.enabler = enablers[index]
            return index
        sleep: dict[str, Touched] = {}
        if depth:
            above = self._stack[depth - 1]
            sleep = {name: touched for name, touched in above.sleep.items() if not conflict(touched, above.touched)}
        name = next((name for name in names if name not in sleep), None)
        if name is None:
            raise Pruned
        index = names.index(name)
        self._stack.append(_Node(names, sleep, name, {name}, enablers[index]))
        if depth == self._known:
            self._watch.note(True)
        return index

    def stepped(self) -> None:
        """See `Driver.stepped`."""
        depth = self._depth
        self._depth += 1
        self.figures.steps += 1
        if depth >= self._known:
            self._stack[depth].touched = self._recorder.take()
            self._find_races(depth)

    def over(self) -> None:
        """See `Driver.over`."""
        self._watch.note(False)

    # The search.

    def _find_races(self, index: int) -> None:
        """Finds the steps that `index` conflicts with, and has the other order tried."""
        stack = self._stack
        node = stack[index]
        past = 0
        for cause in (node.enabler, self._previous(index)):
            if cause >= 0:
                past |= stack[cause].past | 1 << cause
        racing: list[int] = []
        for earlier in range(index - 1, -1, -1):
            if not past >> earlier & 1 and conflict(stack[earlier].touched, node.touched):
                racing.append(earlier)
                past |= stack[earlier].past | 1 << earlier
        node.past = past
        for earlier in racing:
            self._want_reversed(earlier, index)

    def _previous(self, index: int) -> int:
        name = self._stack[index].chosen
        for earlier in range(index - 1, -1, -1):
            if self._stack[earlier].chosen == name:
                return earlier
        return -1

    def _want_reversed(self, earlier: int, later: int) -> None:
        """Has a run made in which what `later` does comes before `earlier`."""
        stack = self._stack
        independent = [step for step in range(earlier + 1, later) if not stack[step].past >> earlier & 1]
        independent.append(later)
        initials: list[str] = []
        before = 0
        for step in independent:
            if not stack[step].past & before:
                initials.append(stack[step].chosen)
            before |= 1 << step
        node = stack[earlier]
        if not node.wanted.intersection(initials) and not node.sleep.keys() & set(initials):
            node.wanted.add(initials[0])

    def _turn_back(self) -> bool:
        """Sets the deepest step at which something is still to be tried to that. False if there is none."""
        while self._stack:
            node = self._stack[-1]
            node.sleep[node.chosen] = node.touched
            for name in node.names:
                if name in node.wanted and name not in node.sleep:
                    node.chosen = name
                    return True
            self._stack.pop()
        return False
