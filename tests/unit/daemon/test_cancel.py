"""Whoever asks may go away at any moment: each operation is cancelled at each of its awaits, and must leave nothing.

An operation is run again and again, cancelled at its first wait, its second, and so on, until it ends before its turn
to be cancelled comes. After each the graph, the exports, the tasks and the descriptors are as they were before, and the
guests' requests go on.
"""

from __future__ import annotations

import asyncio
import functools
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest
from tests.open_files import open_files

from fleecer.block.edge import Edge
from fleecer.block.fleecing import Plan, cut, uncut
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.daemon import Daemon
from fleecer.errors import UsageError
from fleecer.jobs import BackupRequest
from fleecer.storage.pool import running_pool
from fleecer.testing.memory import MemoryNode, MemoryStorage
from fleecer.units import KiB

SIZE = 256 * KiB
WAITS_MAX = 500

Operation = Callable[[], Coroutine[Any, Any, Any]]


class Cancels:
    """Cancels the task that awaits `run` at the `at`th wait of what it runs, and with `again` at those that follow."""

    def __init__(self, at: int, *, again: bool) -> None:
        self.at = at
        self.again = again
        self.waits = 0

    @types.coroutine
    def run(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        step: Callable[[], Any] = functools.partial(work.send, None)
        while True:
            try:
                awaited = step()
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self.at or (self.again and self.at < self.waits < self.at + 5):
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                value = yield awaited
                step = functools.partial(work.send, value)
            except BaseException as error:  # noqa: BLE001 - a cancel like anything else is for what runs
                step = functools.partial(work.throw, error)


class World:
    """A daemon with two disks whose guests can be held up."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.daemon = Daemon(raise_internal_errors=True)
        self.faults = {name: self._disk(name) for name in ("one", "two")}

    def _disk(self, name: str) -> FaultNode:
        graph = self.daemon.graph
        memory = MemoryNode(f"{name}-memory", bytes(SIZE))
        graph.add(memory, named=False)
        fault = FaultNode(name, graph.attach(memory, f"node '{name}'", "file", writable=True))
        graph.add(fault, named=True)
        self.daemon.export(fault, name, writable=True)
        return fault

    def guest(self, name: str) -> Edge:
        return self.daemon.server.export(name).edge

    def target(self, name: str) -> FileNode:
        node = FileNode(name, MemoryStorage(SIZE, name=name))
        self.daemon.graph.add(node, named=True)
        return node

    async def create(self, *disks: str, name: str = "s") -> None:
        await self.daemon.snapshots.create(disks, name=name, scratch_directory=self.directory)

    def state(self) -> dict[str, Any]:
        """All that an operation might leave behind."""
        graph, snapshots = self.daemon.graph, self.daemon.snapshots
        edges = [edge for node in graph.nodes() for edge in graph.parents(node)]
        return {
            "nodes": [node.name for node in graph.nodes()],
            "edges": sorted((str(edge), edge.node.name, edge.writable, edge.busy) for edge in edges),
            "gates": [str(edge) for edge in edges if edge._gate is not None],
            "disks": [self.guest(name).node.name for name in self.faults],
            "checks": [node.name for node in graph.nodes() if node.check is not None],
            "exports": [export.name for export in self.daemon.server.exports()],
            "jobs": [job.job_id for job in self.daemon.jobs.jobs()],
            "snapshots": ([taken.name for taken in snapshots.sets()], sorted(snapshots._names), len(snapshots._making)),
            "files": open_files(Path("/")),
        }

    async def settle(self) -> None:
        """Returns when everything that was begun has ended."""
        here = asyncio.current_task()
        quiet = 0
        while quiet < 10:  # what ends a task may begin another a turn later
            left = self.daemon.snapshots._kept | asyncio.all_tasks() - {here}
            quiet = 0 if left else quiet + 1
            await (asyncio.wait(left) if left else asyncio.sleep(0))

    async def with_slow_guests(self, operation: Operation, cancels: Cancels) -> bool:
        """Runs it while each disk has a write in flight, which ends once it is waited for. Whether it ended well."""

        async def run() -> bool:
            try:
                await cancels.run(operation())
            except asyncio.CancelledError:
                return False
            return True

        held = {name: fault.hold("write") for name, fault in self.faults.items()}
        writing = [asyncio.ensure_future(self.guest(name).pwrite(0, name.encode())) for name in held]
        for hold in held.values():
            await hold.reached()
        running = asyncio.ensure_future(run())
        edges = {name: self.guest(name) for name in held}
        while held:
            for name in list(held):
                if edges[name]._gate is not None or running.done():
                    held.pop(name).release()
            await asyncio.sleep(0)
        await asyncio.gather(*writing)
        return await running

    async def guests_go_on(self) -> None:
        for name in self.faults:
            await self.guest(name).pwrite(512, b"more")
            assert bytes(await self.guest(name).pread(512, 4)) == b"more"


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("fleecer.daemon.scratches.OPENING_S", 0)  # as where a file system takes longer
    made = World(tmp_path)
    await made.create("one", name="first")  # starts the threads, so that their descriptors are counted from the start
    await made.daemon.snapshots.delete("first")
    yield made
    await made.daemon.close()
    await made.settle()
    assert not made.daemon.graph.nodes()
    await running_pool().close()


async def cancel_everywhere(
    world: World,
    operation: Operation,
    *,
    again: bool,
    prepare: Callable[[], Awaitable[None]] | None = None,
    take_back: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Checks `operation`; `take_back` undoes it where it ended well. Returns at how many waits it was cancelled."""
    before = world.state()
    for at in range(1, WAITS_MAX):
        if prepare is not None:
            await prepare()
        cancels = Cancels(at, again=again)
        ended_well = await world.with_slow_guests(operation, cancels)
        if ended_well and take_back is not None:
            await take_back()
        await world.settle()
        after = world.state()
        for what, was in before.items():
            assert after[what] == was, f"{what} after it was cancelled at wait {at}"
        await world.guests_go_on()
        if cancels.waits < at:
            assert ended_well
            return at - 1
    raise AssertionError(f"it still waits after {WAITS_MAX} times")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("there", ["none", "one before", "one half-way"])
async def test_a_snapshot_whose_maker_is_cancelled_is_there_whole_or_not_at_all(
    world: World, there: str, again: bool
) -> None:
    if there != "none":
        await world.create(*(["one", "two"] if there == "one before" else ["two"]), name="before")
    count = await cancel_everywhere(
        world,
        lambda: world.create("one", "two"),
        again=again,
        take_back=lambda: world.daemon.snapshots.delete("s"),
    )
    assert count >= 2, "the scratches, and the disks' rest"


@pytest.mark.parametrize("again", [False, True])
async def test_a_snapshot_that_cannot_be_is_undone_also_if_its_maker_is_cancelled_meanwhile(
    world: World, again: bool
) -> None:
    world.daemon.export(world.faults["one"], "two@s", export_id="other")  # the name that the second part would get

    async def fail() -> None:
        with pytest.raises(UsageError, match="export name 'two@s' is taken"):
            await world.create("one", "two")

    assert await cancel_everywhere(world, fail, again=again) >= 3, "and the undoing"


@pytest.mark.parametrize("again", [False, True])
async def test_an_end_goes_on_when_whoever_asked_for_it_is_cancelled(world: World, again: bool) -> None:

    async def prepare() -> None:
        await world.create("one", "two")
        for name in ("one", "two"):
            await world.guest(name).pwrite(0, b"something to keep")

    delete = functools.partial(world.daemon.snapshots.delete, "s")
    assert await cancel_everywhere(world, delete, again=again, prepare=prepare) >= 1


@pytest.mark.parametrize("again", [False, True])
async def test_backups_whose_starter_is_cancelled_all_run_or_none(world: World, again: bool) -> None:
    targets = {name: world.target(f"target-{name}") for name in ("one", "two")}

    async def start() -> None:
        requests = [
            BackupRequest(f"job-{name}", world.faults[name], target, "none") for name, target in targets.items()
        ]
        await world.daemon.start_backups(requests)

    async def take_back() -> None:
        assert len(world.daemon.jobs.jobs()) == 2
        await world.daemon.jobs.cancel_all()

    assert await cancel_everywhere(world, start, again=again, take_back=take_back) >= 1


@pytest.mark.parametrize("again", [False, True])
async def test_backups_that_cannot_be_are_taken_back_also_if_their_starter_is_cancelled(
    world: World, again: bool
) -> None:
    """Somebody else takes the job's name while the disks come to rest."""
    target, other = world.target("target"), world.target("other")
    rival = BackupRequest("job", world.faults["two"], other, "none")
    rivals: list[asyncio.Future[Any]] = []

    async def fail() -> None:
        rivals.append(asyncio.ensure_future(world.daemon.start_backups([rival])))
        try:
            await asyncio.sleep(0)
            with pytest.raises(UsageError, match="job id 'job' is taken"):
                await world.daemon.start_backups([BackupRequest("job", world.faults["one"], target, "none")])
        finally:
            rivals[-1].add_done_callback(lambda _: world.daemon.jobs.find("job").ask_to_cancel())

    assert await cancel_everywhere(world, fail, again=again) >= 2


@pytest.mark.parametrize("again", [False, True])
async def test_a_filter_goes_also_if_whoever_takes_it_out_is_cancelled(world: World, again: bool) -> None:
    graph = world.daemon.graph
    cuts: list[Any] = []

    async def prepare() -> None:
        scratch = FileNode(graph.fresh_name(), MemoryStorage(SIZE))
        graph.add(scratch, named=False)
        edge = graph.attach(scratch, "test", "scratch", writable=True)
        cuts[:] = await cut(graph, [Plan(world.faults["one"], edge, "direct", fresh=True)])

    assert await cancel_everywhere(world, lambda: uncut(graph, cuts[0]), again=again, prepare=prepare) >= 1
