"""The search for interleavings: it leaves out many and misses no outcome, tells a deadlock, and cleans up after itself.

The reference tries every choice at every step: slow, and too simple to be wrong.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest

from fleecer.block.bitmap import Bitmap
from fleecer.block.copier import Snapshot
from fleecer.block.edge import Edge
from fleecer.block.inflight import InFlight
from fleecer.block.nodes.file import FileNode
from fleecer.testing.sim import explore
from fleecer.testing.sim.cases import Case, run_directed
from fleecer.testing.sim.disk import SimDisk
from fleecer.testing.sim.exhaust import exhaust_case
from fleecer.testing.sim.explore import Explorer, Program
from fleecer.testing.sim.loop import Driver, NamedLoop, simulate
from fleecer.testing.sim.oracle import History, Violation

PROGRAMS = 160
BATCHES = 4
ORDERS_MAX = 1500
PAGE = 4096


class Cells:
    """What the tasks of a little program share."""

    def __init__(self) -> None:
        self.a = self.b = 0
        self.log: list[int] = []
        self.gate: asyncio.Future[None] | None = None
        self.claims = InFlight()
        self.bits = Bitmap()


Step = tuple[str, str, int]
Task = Sequence[Step]
Outcome = tuple[object, ...]


async def _add(cells: Cells, cell: str, number: int, seen: list[object]) -> None:
    value = getattr(cells, cell)
    await asyncio.sleep(0)
    setattr(cells, cell, value + number)


async def _wait(cells: Cells, cell: str, number: int, seen: list[object]) -> None:
    if cells.gate is None:
        cells.gate = asyncio.get_running_loop().create_future()
        await cells.gate


async def _open(cells: Cells, cell: str, number: int, seen: list[object]) -> None:
    if cells.gate is not None:
        gate, cells.gate = cells.gate, None
        gate.set_result(None)


async def _claimed(cells: Cells, cell: str, number: int, seen: list[object], *, serialising: bool) -> None:
    claim = cells.claims.enter("ab".index(cell) * PAGE, PAGE, serialising)
    if claim.blockers:
        await claim.granted()
    if serialising:
        await _add(cells, cell, number, seen)
    else:
        seen.append(getattr(cells, cell))
    await asyncio.sleep(0)
    cells.claims.leave(claim)


async def _clear(cells: Cells, cell: str, number: int, seen: list[object]) -> None:
    waiter = cells.claims.until_clear("ab".index(cell) * PAGE, PAGE)
    if waiter is not None:
        await waiter
    seen.append(getattr(cells, cell))


def _now(step: Callable[[Cells, str, int, list[object]], object]) -> Callable[..., Awaitable[None]]:
    async def wrapped(cells: Cells, cell: str, number: int, seen: list[object]) -> None:
        step(cells, cell, number, seen)

    return wrapped


KINDS: dict[str, Callable[[Cells, str, int, list[object]], Awaitable[None]]] = {
    "read": _now(lambda cells, cell, _, seen: seen.append(getattr(cells, cell))),
    "write": _now(lambda cells, cell, number, _: setattr(cells, cell, number)),
    "add": _add,
    "append": _now(lambda cells, _, number, __: cells.log.append(number)),
    "look at log": _now(lambda cells, _, __, seen: seen.append(len(cells.log))),
    "wait": _wait,
    "open": _open,
    "share": functools.partial(_claimed, serialising=False),
    "own": functools.partial(_claimed, serialising=True),
    "until clear": _clear,
    "overlaps": _now(lambda cells, cell, _, seen: seen.append(cells.claims.overlaps("ab".index(cell) * PAGE, PAGE))),
    "count": _now(lambda cells, _, __, seen: seen.append(len(cells.claims))),
    "set bit": _now(lambda cells, _, number, __: cells.bits.set(number % 3, number % 3 + 1)),
    "clear bits": _now(lambda cells, _, number, __: cells.bits.clear(0, number % 3 + 1)),
    "look at bits": _now(lambda cells, _, number, seen: seen.append(cells.bits.run(number % 3, 3))),
}


def draw_program(seed: int) -> list[Task]:
    """Two or three tasks of a few steps, small enough for the reference."""
    draw = random.Random(seed)
    tasks = draw.choice((2, 2, 3))
    kinds = draw.sample(list(KINDS), 4)
    while True:
        program: list[Task] = [
            [(draw.choice(kinds), draw.choice("ab"), draw.randint(1, 9)) for _ in range(draw.randint(1, 8 // tasks))]
            for _ in range(tasks)
        ]
        if orders(program) <= ORDERS_MAX:
            return program


def orders(program: Sequence[Task]) -> int:
    """How many orders of all turns there are, about, if nobody has to wait."""
    total, count = 0, 1
    for steps in program:
        turns = sum({"add": 2, "share": 2, "own": 3}.get(kind, 1) for kind, _, _ in steps) + 1
        for turn in range(turns):
            total += 1
            count = count * total // (turn + 1)
    return count


async def act(cells: Cells, steps: Task, seen: list[object]) -> None:
    """One task: each step in a turn of its own."""
    for kind, cell, number in steps:
        await KINDS[kind](cells, cell, number, seen)
        await asyncio.sleep(0)


def run(program: Sequence[Task], outcomes: set[Outcome], loop: NamedLoop, driver: Driver) -> None:
    """One run of the program; adds what it came to: every cell, all that was seen, and who never ended."""

    async def main() -> None:
        cells = Cells()
        seen: list[list[object]] = [[] for _ in program]
        tasks = [
            loop.create_task(act(cells, steps, mine), name=f"task {number}")
            for number, (steps, mine) in enumerate(zip(program, seen, strict=True))
        ]
        loop.direct(driver)
        await loop.quiescent()
        ended = tuple(task.done() for task in tasks)
        bits = tuple(cells.bits[bit] for bit in range(3))
        outcomes.add((cells.a, cells.b, tuple(cells.log), bits, tuple(map(tuple, seen)), ended))

    simulate(main(), loop=loop)


class EveryChoice:
    """The reference: a driver that goes through all choices at all steps, one run after the other."""

    def __init__(self) -> None:
        self.runs = 0
        self._path: list[list[int]] = []  # chosen, of how many
        self._depth = 0

    def explore(self, program: Program) -> None:
        """Runs the program in every order there is."""
        while True:
            self._depth = 0
            program(NamedLoop(), self)
            self.runs += 1
            while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
                self._path.pop()
            if not self._path:
                return
            self._path[-1][0] += 1

    def choose(self, names: list[str], enablers: list[int]) -> int:
        """See `Driver.choose`."""
        if self._depth == len(self._path):
            self._path.append([0, len(names)])
        self._depth += 1
        return self._path[self._depth - 1][0]

    def stepped(self) -> None:
        """See `Driver.stepped`."""

    def over(self) -> None:
        """See `Driver.over`."""


def outcomes_of(program: Sequence[Task]) -> tuple[set[Outcome], int]:
    """What the search finds the program may come to, and in how many runs."""
    found: set[Outcome] = set()
    explorer = Explorer([Cells])
    assert explorer.explore(functools.partial(run, program, found))
    return found, explorer.figures.runs + explorer.figures.pruned


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_outcome_is_missed_and_most_runs_are_left_out(batch: int) -> None:
    all_runs = runs = 0
    for seed in range(batch, PROGRAMS, BATCHES):
        program = draw_program(seed)
        expected: set[Outcome] = set()
        reference = EveryChoice()
        reference.explore(functools.partial(run, program, expected))
        found, count = outcomes_of(program)
        assert found == expected, f"program {seed}: {program}"
        all_runs += reference.runs
        runs += count
    assert runs * 10 < all_runs, f"{runs} runs where {all_runs} are all there is"


def test_with_nothing_left_out_every_order_is_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "conflict", lambda *_: True)
    for seed in range(0, PROGRAMS, 15):
        program = draw_program(seed)
        expected: set[Outcome] = set()
        reference = EveryChoice()
        reference.explore(functools.partial(run, program, expected))
        assert outcomes_of(program) == (expected, reference.runs)


def test_an_access_that_is_not_noticed_hides_outcomes() -> None:
    program = [[("add", "a", 1)], [("add", "a", 2)]]
    found: set[Outcome] = set()
    Explorer().explore(functools.partial(run, program, found))  # nobody watches the cells
    assert len(found) < len(outcomes_of(program)[0])


def test_a_lost_update_is_found() -> None:
    found, _ = outcomes_of([[("add", "a", 1)], [("add", "a", 2)]])
    assert {outcome[0] for outcome in found} == {1, 2, 3}


def test_under_a_claim_no_update_is_lost() -> None:
    found, runs = outcomes_of([[("own", "a", 1)], [("own", "a", 2)], [("share", "a", 0)]])
    assert {outcome[0] for outcome in found} == {3}
    assert runs > 1


def test_a_wake_up_that_comes_too_early_is_found() -> None:
    found, _ = outcomes_of([[("wait", "a", 0)], [("open", "a", 0)]])
    assert {outcome[-1] for outcome in found} == {(True, True), (False, True)}


def test_a_deadlock_of_actors_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = InFlight.leave

    def silent(self: InFlight, claim: object) -> None:
        claim.dependents = None  # type: ignore[attr-defined]
        leave(self, claim)  # type: ignore[arg-type]

    monkeypatch.setattr(InFlight, "leave", silent)
    case = Case("raw", 2, ("access",), (("write 0 8",), ("sread 0 0 8",)), prompt=True, filled=8)
    found = exhaust_case(case)
    assert found.error == "Violation: actor 0 waits for something that never comes"


CASE = Case("bare", 2, ("target",), (("write 0 8",), ("sread 0 0 16",), ("jcancel",)), prompt=True, filled=8)


def test_the_same_search_twice_is_identical() -> None:
    logs: list[list[list[str]]] = [[], []]
    for log in logs:

        def program(loop: NamedLoop, driver: Driver, log: list[list[str]] = log) -> None:
            try:
                run_directed(CASE, driver, loop=loop)
            finally:
                log.append(loop.order)

        Explorer().explore(program)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 20
    assert len(set(map(tuple, logs[0]))) == len(logs[0]), "a run was made twice"


def test_a_search_that_may_not_go_on_says_so() -> None:
    explorer = Explorer()
    assert not explorer.explore(lambda loop, driver: run_directed(CASE, driver, loop=loop), runs_max=3)
    assert explorer.figures.runs + explorer.figures.pruned == 3


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_search_the_classes_are_as_they_were(fails: bool) -> None:
    watched = (Cells, Edge, FileNode, Snapshot, InFlight, Bitmap, SimDisk, History)

    def members() -> list[dict[str, object]]:
        return [dict(vars(watching)) for watching in watched]

    before = members()
    runs = itertools.count()

    def program(loop: NamedLoop, driver: Driver) -> None:
        run_directed(CASE, driver, loop=loop)
        if fails and next(runs) == 3:
            raise Violation("made up")

    if fails:
        with pytest.raises(Violation, match="made up"):
            Explorer([Cells]).explore(program)
    else:
        Explorer([Cells]).explore(program)
    assert members() == before
