"""Copy-before-write and snapshot reads: the past, or an error, whatever else goes on."""

from __future__ import annotations

import asyncio
import errno
from typing import Literal
from unittest import mock

import pytest
from tests.fleecing_world import CLUSTER, SIZE, Taken, World, together

from fleecer import eager
from fleecer.block.copier import Snapshot, natural_cluster_size
from fleecer.block.edge import Edge
from fleecer.block.fleecing import CUT_TIMEOUT_S, RETRY_S, RETRY_TIMEOUT_S, Plan, cut, release_scratch, uncut
from fleecer.block.graph import SNAPSHOT_ROLE
from fleecer.block.node import HOLE, ZERO, Extent
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.raw import RawNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.errors import IoError, NotFound, PermissionConflict, SnapshotBroken, UsageError
from fleecer.testing.memory import MemoryStorage, random_turns
from fleecer.units import GiB, KiB, MiB

Policy = tuple[str, float]


async def turns() -> None:
    """Lets everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


class Clock:
    """The loop's time, which stands still unless it is moved."""

    def __init__(self, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = loop.time()
        monkeypatch.setattr(loop, "time", lambda: self.now_s)

    async def advance(self, seconds: float) -> None:
        """Moves it on; whatever was due in the meantime has run on return."""
        self.now_s += seconds
        await turns()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(asyncio.get_running_loop(), monkeypatch)


def faulty(world: World, name: str, inner: str | Edge) -> tuple[FaultNode, Edge]:
    """A fault node above a node or a scratch, and an edge to it."""
    if isinstance(inner, Edge):
        node = inner.node
        world.graph.forget(inner)
    else:
        node = world.graph.find(inner)
    fault = FaultNode(name, world.graph.attach(node, name, "file", writable=True))
    world.graph.add(fault, named=False)
    return fault, world.graph.attach(fault, f"user of {name}", "file", writable=True)


def world_on_faulty_disk() -> tuple[World, FaultNode]:
    """A world whose guest and snapshots reach the disk through a fault node."""
    world = World()
    fault, edge = faulty(world, "slow", "disk")
    world.graph.forget(world.top)
    world.top = edge
    return world, fault


@pytest.mark.parametrize("seed", range(60))
async def test_snapshots_read_as_their_instant_under_random_load(seed: int) -> None:
    world = World(seed, pause=random_turns(seed) if seed % 4 else None)
    snapshots: list[Taken] = []

    async def guest() -> None:
        for _ in range(25):
            await world.change()
            await asyncio.sleep(0)

    async def operator() -> None:
        for _ in range(8):
            for _ in range(world.random.randrange(6)):
                await asyncio.sleep(0)
            if len(snapshots) < 3 or world.random.random() < 0.5:
                snapshots.append(await world.take())
            else:
                await world.drop(snapshots.pop(world.random.randrange(len(snapshots))))

    async def reader() -> None:
        for _ in range(40):
            if snapshots:
                taken = world.random.choice(snapshots)
                if taken.edge._gate is None:  # not being dropped
                    await (world.read(taken) if world.random.random() < 0.7 else world.status(taken))
            await asyncio.sleep(0)

    await together(guest(), guest(), guest(), operator(), reader(), reader())
    for taken in snapshots:
        await world.check_whole(taken)
    for taken in snapshots:
        await world.drop(taken)
    assert isinstance(world.top.node, type(world.graph.find("disk")))
    assert [node.name for node in world.graph.nodes()] == ["disk"]


async def test_a_cluster_is_copied_once_for_all_snapshots_that_need_it() -> None:
    world = World()
    first, second, third = await world.take(), await world.take(), await world.take()
    await world.top.pwrite(100, b"x" * 50)
    copier = first.fleece.copier
    assert [copier.preserved_bytes(t.fleece.snapshot) for t in (first, second, third)] == [0, 0, CLUSTER]
    for taken in (first, second, third):
        await world.check_whole(taken)


async def test_a_retired_snapshots_copies_stay_while_an_older_one_reads_them() -> None:
    world = World()
    first, second = await world.take(), await world.take()
    await world.top.pwrite(0, b"x")
    copier = first.fleece.copier
    assert copier.preserved_bytes(first.fleece.snapshot) == 0
    await world.drop(second)
    assert copier.preserved_bytes(first.fleece.snapshot) == CLUSTER, "what it still reads there counts for it"
    assert copier.preserved_bytes(second.fleece.snapshot) == 0
    await world.top.pwrite(3 * CLUSTER, b"y")  # now the copy goes to the first one's own scratch
    await world.check_whole(first)
    assert copier.preserved_bytes(first.fleece.snapshot) == 2 * CLUSTER
    await world.drop(first)
    assert [node.name for node in world.graph.nodes()] == ["disk"]


async def test_a_retired_snapshot_without_copies_goes_also_while_there_is_an_older_one() -> None:
    world = World()
    inner, _ = world.scratch()
    first = await world.take()
    fault, scratch = faulty(world, "faulty", inner)
    second = await world.take(scratch=scratch)
    held = fault.hold("write")
    writing = asyncio.ensure_future(world.top.pwrite(0, b"x"))
    await held.reached()  # a copy for both is on its way
    dropping = asyncio.ensure_future(world.drop(second))
    await writing
    assert first.fleece.copier.snapshots == (first.fleece.snapshot,)
    await world.check_whole(first)
    held.release()
    await dropping
    assert second.fleece.snapshot.scratch.node not in world.graph.nodes()


async def test_zeroes_are_preserved_without_space() -> None:
    world = World()
    await world.top.zero(0, SIZE)
    taken = await world.take()
    scratch = taken.fleece.snapshot.scratch.node
    await world.top.pwrite(0, b"x" * SIZE)
    await world.check_whole(taken)
    assert [e.flags for e in await scratch.block_status(0, SIZE)] == [3]


async def test_a_change_waits_for_a_read_of_its_range_and_no_other() -> None:
    world, fault = world_on_faulty_disk()
    taken = await world.take()
    held = fault.hold("read", 0, CLUSTER)
    reading = asyncio.ensure_future(taken.edge.pread(0, 512))
    await held.reached()
    writing = asyncio.ensure_future(world.top.pwrite(CLUSTER - 1, b"zz"))
    await world.top.pwrite(3 * CLUSTER, b"other")
    await turns()
    assert not writing.done(), "the change must wait for the frozen read"
    held.release()
    assert bytes(await reading) == taken.image[:512]
    await writing
    await world.check_whole(taken)


async def world_with_faulty_scratch(
    on_error: str = "break-snapshot", timeout_s: float = 15.0
) -> tuple[World, Taken, FaultNode]:
    world = World()
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    return world, await world.take(scratch=scratch, on_error=on_error, timeout_s=timeout_s), fault


async def test_a_scratch_that_is_full_breaks_the_snapshot_and_not_the_guest() -> None:
    world, taken, fault = await world_with_faulty_scratch()
    fault.fail("write", errno=errno.ENOSPC, times=None)
    broken: list[Snapshot] = []
    taken.fleece.snapshot.on_broken = broken.append
    await world.top.pwrite(0, b"new" * 10)
    assert bytes(world.disk.data[:30]) == b"new" * 10
    assert broken == [taken.fleece.snapshot]
    with pytest.raises(SnapshotBroken, match="No space left on device"):
        await taken.edge.pread(SIZE - 10, 10)
    with pytest.raises(SnapshotBroken):
        await taken.edge.block_status(0, 10)


@pytest.mark.parametrize("operation", ["read", "block status"])
async def test_a_break_is_told_to_a_request_that_was_in_flight(operation: Literal["read", "block status"]) -> None:
    """QEMU to this day: a read under way when the snapshot broke returns the guest's new data as success."""
    world, slow = world_on_faulty_disk()
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    taken = await world.take(scratch=scratch)
    held = slow.hold(operation, 0, 512)
    ask = taken.edge.pread if operation == "read" else taken.edge.block_status
    asking = asyncio.ensure_future(ask(0, 512))
    await held.reached()
    fault.fail("write", errno=errno.ENOSPC)
    await world.top.pwrite(CLUSTER, b"breaks it")
    assert taken.fleece.snapshot.broken is not None
    held.release()
    with pytest.raises(SnapshotBroken):
        await asking


async def test_a_break_frees_those_who_wait_for_another_copy() -> None:
    world, taken, fault = await world_with_faulty_scratch()
    held = fault.hold("write", 0, CLUSTER)
    stuck = asyncio.ensure_future(world.top.pwrite(0, b"waits for its copy"))
    await held.reached()
    fault.fail("write", errno=errno.ENOSPC)
    await world.top.pwrite(CLUSTER, b"breaks it")
    await turns()
    assert stuck.done(), "nobody needs the copy any more"
    held.release()
    await turns()
    assert taken.fleece.snapshot.broken is not None


async def test_break_guest_write_keeps_the_snapshot_whole() -> None:
    world, taken, fault = await world_with_faulty_scratch("break-guest-write")
    fault.fail("write", errno=errno.ENOSPC)
    before = bytes(world.disk.data)
    with pytest.raises(IoError) as failure:
        await world.top.pwrite(10, b"new")
    assert failure.value.errno == errno.ENOSPC
    assert bytes(world.disk.data) == before
    await world.top.pwrite(10, b"new")  # the failed copy was unmarked: this one copies again
    await world.check_whole(taken)
    assert bytes(world.disk.data[10:13]) == b"new"


async def test_a_failed_copy_is_tried_again_by_those_who_waited_for_it() -> None:
    world, taken, fault = await world_with_faulty_scratch("break-guest-write")
    held = fault.hold("write")
    fault.fail("write", errno=errno.EIO)
    first = asyncio.ensure_future(world.top.pwrite(0, b"one"))
    await held.reached()
    second = asyncio.ensure_future(world.top.pwrite(100, b"two"))
    await turns()
    assert not second.done()
    held.release()
    with pytest.raises(IoError):
        await first
    await second
    await world.check_whole(taken)


async def test_a_copy_that_takes_too_long_breaks_the_snapshot_and_lets_the_guest_go_on() -> None:
    world, taken, fault = await world_with_faulty_scratch(timeout_s=0.05)
    held = fault.hold("write")
    await world.top.pwrite(0, b"new")
    assert bytes(world.disk.data[:3]) == b"new"
    assert taken.fleece.snapshot.broken is not None
    assert "took longer than 0.05 s" in taken.fleece.snapshot.broken.cause
    await world.top.pwrite(CLUSTER, b"next")  # nobody waits for the stuck copy any more
    held.release()
    await turns()
    assert not taken.fleece.snapshot.done[0], "a copy given up must not be marked done"
    with pytest.raises(SnapshotBroken):
        await taken.edge.pread(0, 1)


async def test_a_copy_that_takes_too_long_fails_the_guest_if_so_chosen() -> None:
    world, taken, fault = await world_with_faulty_scratch("break-guest-write", timeout_s=0.05)
    held = fault.hold("write")
    with pytest.raises(IoError) as failure:
        await world.top.pwrite(0, b"new")
    assert failure.value.errno == errno.ETIMEDOUT
    held.release()
    await world.top.pwrite(0, b"new")
    await world.check_whole(taken)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one cluster, and room for two."""
    monkeypatch.setattr("fleecer.block.copier.COPY_MAX_BYTES", CLUSTER)
    monkeypatch.setattr("fleecer.block.copier.COPIES_MAX_BYTES", 2 * CLUSTER)


@pytest.mark.usefixtures("little_memory")
async def test_a_change_of_much_keeps_little_in_memory_and_holds_up_no_other() -> None:
    world = World()
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    taken = await world.take(scratch=scratch)
    held = [fault.hold("write", at * CLUSTER, 1) for at in range(9)]
    wiping = asyncio.ensure_future(world.top.discard(0, SIZE))
    await turns()
    assert [hold.is_reached for hold in held] == [True] * 2 + [False] * 7
    other = asyncio.ensure_future(world.top.pwrite(5 * CLUSTER, b"x"))
    await turns()
    assert held[5].is_reached, "every change may have one copy under way"
    for hold in held:
        hold.release()
    await wiping
    await other
    await world.check_whole(taken)


@pytest.mark.usefixtures("little_memory")
async def test_others_have_their_turn_while_much_is_copied_without_a_wait() -> None:
    world = World()
    taken = await world.take()
    wiping = asyncio.ensure_future(world.top.discard(0, SIZE))
    counts = []
    while not wiping.done():
        await asyncio.sleep(0)
        counts.append(taken.fleece.snapshot.done.count())
    assert counts[:4] == [2, 4, 6, 8]
    await world.check_whole(taken)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("on_error", ["break-snapshot", "break-guest-write"])
async def test_a_change_of_much_may_take_long_as_long_as_copies_for_it_end_well(on_error: str, clock: Clock) -> None:
    world, taken, fault = await world_with_faulty_scratch(on_error, timeout_s=10.0)
    held = [fault.hold("write", at * CLUSTER, 1) for at in range(9)]
    wiping = asyncio.ensure_future(world.top.discard(0, SIZE))
    for hold in held:  # 9 copies, 7 s each
        await hold.reached()
        await clock.advance(7.0)
        assert not wiping.done()
        hold.release()
        await turns()
    await wiping
    await world.check_whole(taken)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("on_error", ["break-snapshot", "break-guest-write"])
@pytest.mark.parametrize("hung", [0, 5, 8])
async def test_a_copy_that_hangs_ends_the_wait_however_many_ended_well_before(
    on_error: str, hung: int, clock: Clock
) -> None:
    world, taken, fault = await world_with_faulty_scratch(on_error, timeout_s=10.0)
    before = bytes(world.disk.data)
    held = [fault.hold("write", at * CLUSTER, 1) for at in range(9)]
    wiping = asyncio.ensure_future(world.top.zero(0, SIZE))
    for at in range(hung):
        await held[at].reached()
        await clock.advance(7.0)
        held[at].release()
        await turns()
    await held[hung].reached()
    await clock.advance(7.0)
    if hung < 7:
        held[hung + 1].release()  # that one was under way beside it: progress too
        await turns()
        await clock.advance(7.0)
    assert not wiping.done()
    await clock.advance(7.0)
    if on_error == "break-guest-write":
        with pytest.raises(IoError, match=r"copying its old data to faulty took longer than 10 s"):
            await wiping
        assert world.disk.data == before
    else:
        await wiping
        assert not any(world.disk.data)
        with pytest.raises(SnapshotBroken, match=r"copying its old data to faulty took longer than 10 s"):
            await taken.edge.pread(0, 1)
    fault.clear()
    await turns()


async def test_a_reader_that_hangs_ends_the_wait_too_and_one_of_a_broken_snapshot_is_not_waited_for(
    clock: Clock,
) -> None:
    world, slow = world_on_faulty_disk()
    taken = await world.take(timeout_s=10.0)
    held = slow.hold("read", 0, CLUSTER)
    reading = asyncio.ensure_future(taken.edge.pread(0, 512))
    await held.reached()
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await turns()
    await clock.advance(9.0)
    assert not writing.done()
    await clock.advance(2.0)
    await writing
    await world.top.pwrite(1, b"newer")
    held.release()
    with pytest.raises(SnapshotBroken, match="a read of the disk for it took longer than 10 s"):
        await reading


async def take_pair(world: World, older: Policy, newer: Policy) -> tuple[Taken, Taken, FaultNode]:
    """Two snapshots with policies of their own, (on_error, timeout_s); copies go to the newer one's faulty scratch."""
    first = await world.take(on_error=older[0], timeout_s=older[1])
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    return first, await world.take(scratch=scratch, on_error=newer[0], timeout_s=newer[1]), fault


LENIENT: Policy = ("break-snapshot", 15.0)
STRICT: Policy = ("break-guest-write", 15.0)


async def test_a_change_fails_if_the_snapshot_whose_scratch_is_full_says_so_and_none_breaks() -> None:
    world = World()
    older, newer, fault = await take_pair(world, LENIENT, STRICT)
    fault.fail("write", errno=errno.ENOSPC)
    before = bytes(world.disk.data)
    with pytest.raises(IoError) as failure:
        await world.top.pwrite(0, b"new")
    assert failure.value.errno == errno.ENOSPC
    assert world.disk.data == before
    await world.top.pwrite(0, b"new")
    for taken in (older, newer):
        await world.check_whole(taken)


@pytest.mark.parametrize("strict", ["older", "newer"])
async def test_a_change_fails_if_any_snapshot_says_so_for_which_the_disk_cannot_be_read(strict: str) -> None:
    world, slow = world_on_faulty_disk()
    older = await world.take(on_error="break-guest-write" if strict == "older" else "break-snapshot")
    newer = await world.take(on_error="break-guest-write" if strict == "newer" else "break-snapshot")
    slow.fail("read")
    with pytest.raises(IoError):
        await world.top.pwrite(0, b"new")
    await world.top.pwrite(0, b"new")
    for taken in (older, newer):
        await world.check_whole(taken)


@pytest.mark.parametrize("older_policy", [LENIENT, STRICT])
async def test_a_full_scratch_breaks_no_older_snapshot_that_has_room_of_its_own(older_policy: Policy) -> None:
    world = World()
    older, newer, fault = await take_pair(world, older_policy, LENIENT)
    fault.fail("write", errno=errno.ENOSPC, times=None)
    await asyncio.gather(world.top.pwrite(0, b"new"), world.top.discard(0, 3 * CLUSTER))
    await world.check_whole(older)
    assert older.fleece.snapshot.done.count() == 3
    with pytest.raises(SnapshotBroken, match="No space left on device"):
        await newer.edge.pread(0, 10)


async def test_a_change_does_not_fail_for_a_snapshot_that_has_its_copy() -> None:
    world = World()
    older = await world.take(on_error="break-guest-write")
    await world.top.pwrite(0, b"first")  # the older one has that cluster now
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    newer = await world.take(scratch=scratch)
    fault.fail("write")
    await world.top.pwrite(0, b"second")
    assert newer.fleece.snapshot.broken is not None
    await world.check_whole(older)


async def test_each_snapshot_is_waited_for_as_long_as_it_says(clock: Clock) -> None:
    world = World()
    older, newer, fault = await take_pair(world, ("break-snapshot", 20.0), ("break-snapshot", 5.0))
    held = fault.hold("write")
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await held.reached()
    await clock.advance(4.0)
    assert not is_broken(newer)
    await clock.advance(2.0)
    assert newer.fleece.snapshot.broken is not None
    assert "took longer than 5 s" in newer.fleece.snapshot.broken.cause
    await writing
    await world.check_whole(older)
    held.release()
    await turns()
    await world.check_whole(older)


@pytest.mark.parametrize("older_policy", [LENIENT, STRICT])
async def test_a_scratch_that_hangs_breaks_no_older_snapshot_that_has_a_good_one(
    older_policy: Policy, clock: Clock
) -> None:
    world = World()
    older, newer, fault = await take_pair(world, older_policy, LENIENT)
    fault.hold("write", 0, CLUSTER)
    held = fault.hold("write", CLUSTER, CLUSTER)
    changes = [asyncio.ensure_future(world.top.pwrite(0, b"one"))]
    await clock.advance(1.0)
    changes.append(asyncio.ensure_future(world.top.pwrite(CLUSTER, b"two")))  # late a second later: has its time too
    await held.reached()
    await clock.advance(LENIENT[1] + 5.0)
    await asyncio.gather(*changes)
    assert is_broken(newer)
    await world.check_whole(older)
    assert older.fleece.snapshot.done.count() == 2


async def test_the_scratch_of_a_snapshot_that_broke_or_ended_breaks_no_older_one(clock: Clock) -> None:
    for ended in (False, True):
        world = World()
        older, newer, fault = await take_pair(world, LENIENT, LENIENT)
        await world.top.pwrite(0, b"first")  # kept for the older one
        held = fault.hold("write", CLUSTER, CLUSTER)
        writing = asyncio.ensure_future(world.top.pwrite(CLUSTER, b"new"))
        await held.reached()
        copier = newer.fleece.copier
        if ended:
            assert not copier.retire(newer.fleece.snapshot)
        else:
            copier.break_snapshot(newer.fleece.snapshot, "as a test wants it")
        await clock.advance(LENIENT[1] + 1.0)
        await writing
        held.release()
        await turns()
        await world.check_whole(older)
        assert older.fleece.snapshot.done.count() == 1


async def test_a_scratch_that_fails_when_its_snapshot_has_ended_fails_no_change() -> None:
    world = World()
    older, newer, fault = await take_pair(world, LENIENT, STRICT)
    await world.top.pwrite(0, b"first")  # kept for the older one
    held = fault.hold("write")
    fault.fail("write")
    writing = asyncio.ensure_future(world.top.pwrite(CLUSTER, b"new"))
    await held.reached()
    assert not newer.fleece.copier.retire(newer.fleece.snapshot)
    held.release()
    await writing
    await world.check_whole(older)
    assert older.fleece.snapshot.done.count() == 1


async def test_a_slow_disk_is_no_fault_of_the_newest_scratch(clock: Clock) -> None:
    world, slow = world_on_faulty_disk()
    older, newer = await world.take(timeout_s=5.0), await world.take(timeout_s=5.0)
    held = slow.hold("read")
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await held.reached()
    await clock.advance(6.0)
    assert (is_broken(older), is_broken(newer)) == (True, True)
    held.release()
    await writing


async def test_what_is_read_only_when_its_snapshot_has_broken_goes_to_an_older_ones_scratch() -> None:
    world, slow = world_on_faulty_disk()
    older, newer = await world.take(), await world.take()
    held = slow.hold("read")
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await held.reached()
    newer.fleece.copier.break_snapshot(newer.fleece.snapshot, "as a test wants it")
    held.release()
    await writing
    await world.check_whole(older)
    assert older.fleece.snapshot.done.count() == 1


def is_broken(taken: Taken) -> bool:
    return taken.fleece.snapshot.broken is not None


async def take_pair_of_which_the_older_has_cluster_0(
    world: World, older: Policy, newer: Policy
) -> tuple[Taken, Taken, FaultNode]:
    """As `take_pair`, but the older snapshot has its own copy of cluster 0, so only the newer one needs another."""
    first = await world.take(on_error=older[0], timeout_s=older[1])
    await world.top.pwrite(0, b"between")
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    return first, await world.take(scratch=scratch, on_error=newer[0], timeout_s=newer[1]), fault


async def test_a_snapshot_that_waits_for_a_later_copy_only_is_late_in_time_and_nobody_waits_for_ever(
    clock: Clock,
) -> None:
    world = World()
    older, newer, fault = await take_pair_of_which_the_older_has_cluster_0(
        world, ("break-snapshot", 5.0), ("break-snapshot", 20.0)
    )
    held = [fault.hold("write", 0, CLUSTER), fault.hold("write", CLUSTER, CLUSTER)]
    changes = [asyncio.ensure_future(world.top.pwrite(0, b"one"))]
    await turns()
    changes.append(asyncio.ensure_future(world.top.pwrite(0, b"two" * CLUSTER)))  # clusters 0 to 2, 1 and 2 by itself
    await turns()
    await clock.advance(6.0)
    assert (is_broken(older), is_broken(newer)) == (True, False)
    assert not any(change.done() for change in changes)
    await clock.advance(15.0)
    assert is_broken(newer)
    assert all(change.done() for change in changes)
    for hold in held:
        hold.release()
    await turns()


async def test_a_change_of_which_any_copy_is_late_for_a_snapshot_that_says_so_fails(clock: Clock) -> None:
    world = World()
    older, newer, fault = await take_pair_of_which_the_older_has_cluster_0(
        world, ("break-guest-write", 5.0), ("break-snapshot", 20.0)
    )
    held = [fault.hold("write", 0, CLUSTER), fault.hold("write", CLUSTER, CLUSTER)]
    one = asyncio.ensure_future(world.top.pwrite(0, b"one"))
    await turns()
    two = asyncio.ensure_future(world.top.pwrite(0, b"two" * CLUSTER))
    await turns()
    await clock.advance(6.0)
    with pytest.raises(IoError, match="took longer than 5 s"):
        await two
    assert not one.done()
    for hold in held:
        hold.release()
    await one
    for taken in (older, newer):
        await world.check_whole(taken)


async def test_a_snapshots_time_begins_anew_when_the_scratch_that_held_a_change_up_is_given_up(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("COPY_MAX_BYTES", "COPIES_MAX_BYTES"):
        monkeypatch.setattr(f"fleecer.block.copier.{limit}", CLUSTER)  # one copy after the other
    world = World()
    fault, scratch = faulty(world, "older", world.scratch()[0])
    older = await world.take(scratch=scratch, timeout_s=5.0)
    await world.top.pwrite(0, b"between")
    newer_fault, scratch = faulty(world, "newer", world.scratch()[0])
    newer = await world.take(scratch=scratch, timeout_s=20.0)
    held = [newer_fault.hold("write"), fault.hold("write")]
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new" * CLUSTER))
    await turns()
    await clock.advance(21.0)
    assert is_broken(newer)
    assert not is_broken(older)  # what was being copied, it has already; its own scratch has all its time
    await clock.advance(5.0)
    assert is_broken(older)
    await writing
    for hold in held:
        hold.release()
    await turns()


async def test_a_change_fails_as_soon_as_a_snapshot_that_says_so_has_waited_long_enough(clock: Clock) -> None:
    world = World()
    own_fault, scratch = faulty(world, "own", world.scratch()[0])
    older = await world.take(scratch=scratch, on_error="break-guest-write", timeout_s=20.0)
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    newer = await world.take(scratch=scratch, timeout_s=5.0)
    held = [fault.hold("write"), own_fault.hold("write")]
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await held[0].reached()
    await clock.advance(6.0)
    assert newer.fleece.snapshot.broken is not None
    await held[1].reached()
    await clock.advance(18.0)
    assert not writing.done()
    await clock.advance(2.0)
    with pytest.raises(IoError, match="copying its old data to own took longer than 20 s"):
        await writing
    for hold in held:
        hold.release()
    await turns()
    await world.top.pwrite(0, b"new")
    await world.check_whole(older)


@pytest.mark.parametrize("held_up", ["the disk", "the scratch", "readers"])
async def test_of_those_that_wait_equally_long_the_one_that_fails_the_change_keeps_the_others_whole(
    clock: Clock, held_up: str
) -> None:
    world, slow = world_on_faulty_disk()
    older, newer, fault = await take_pair(world, ("break-snapshot", 5.0), ("break-guest-write", 5.0))
    both = (older, newer)
    held = [fault.hold("write")] if held_up == "the scratch" else [slow.hold("read")]
    reading = []
    if held_up == "readers":
        held.append(slow.hold("read"))
        reading = [asyncio.ensure_future(world.check_whole(taken)) for taken in both]
        await turns()
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    for hold in held:
        await hold.reached()
    await turns()
    await clock.advance(6.0)
    with pytest.raises(IoError, match="took longer than 5 s"):
        await writing
    for hold in held:
        hold.release()
    await turns()
    await asyncio.gather(*reading)
    for taken in both:
        await world.check_whole(taken)


async def test_a_copy_that_nobody_needs_any_more_writes_nothing_to_a_scratch_that_may_be_gone() -> None:
    world, slow = world_on_faulty_disk()
    taken = await world.take(timeout_s=0.01)
    scratch = taken.fleece.snapshot.scratch
    held = slow.hold("read")
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await held.reached()
    await writing
    await release_scratch(world.graph, taken.fleece)
    assert scratch.node not in world.graph.nodes(), "nothing was in flight on it"
    held.release()
    await turns()
    loop = asyncio.get_running_loop()
    left = [task for task in eager._waiting if task.get_loop() is loop and not task.done()]
    assert not left, "the copy must not wait at the gate of a scratch that is gone"


async def test_another_cluster_size_is_refused_while_snapshots_share_one() -> None:
    world = World()
    await world.take()
    nodes = world.graph.nodes()
    plan = Plan(world.top.node, world.scratch()[0], "other", share=True, cluster_size_bytes=2 * CLUSTER)
    with pytest.raises(
        UsageError, match=r"^cluster size 8192 for 'other': the snapshots of node 'disk' have one of 4096"
    ):
        await cut(world.graph, [plan])
    assert [node for node in world.graph.nodes() if node is not plan.scratch.node] == nodes
    plan.cluster_size_bytes = None
    (fleece,) = await cut(world.graph, [plan])
    assert fleece.copier.cluster_size_bytes == CLUSTER


async def test_a_copy_under_way_when_a_newer_snapshot_is_taken_serves_only_the_older() -> None:
    world, taken, fault = await world_with_faulty_scratch("break-guest-write", timeout_s=0.05)
    held = fault.hold("write")
    with pytest.raises(IoError):
        await world.top.pwrite(0, b"new")  # gives up waiting; its copy is still under way
    newer = await world.take()
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await asyncio.sleep(0)
    held.release()
    await writing
    await world.check_whole(newer)
    await world.check_whole(taken)


async def test_a_failure_for_a_newer_snapshot_leaves_an_older_one_that_has_its_copy_whole() -> None:
    world = World()
    older = await world.take()
    await world.top.pwrite(0, b"first")
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    newer = await world.take(scratch=scratch)
    fault.fail("write", times=None)
    await world.top.pwrite(0, b"second")
    assert newer.fleece.snapshot.broken is not None
    assert older.fleece.snapshot.broken is None
    await world.top.pwrite(CLUSTER, b"third")
    await world.check_whole(older)


async def test_a_discarded_range_is_refused_and_not_copied_any_more() -> None:
    world = World()
    taken = await world.take()
    await world.top.pwrite(0, b"old data is preserved")
    await taken.edge.discard(10, 3 * CLUSTER)  # inward: clusters 1 and 2
    await world.top.pwrite(CLUSTER, b"x" * CLUSTER)
    assert taken.fleece.snapshot.done.count() == 1
    assert bytes(await taken.edge.pread(0, CLUSTER)) == taken.image[:CLUSTER]
    with pytest.raises(IoError) as failure:
        await taken.edge.pread(CLUSTER, 1)
    assert failure.value.errno == errno.EACCES
    with pytest.raises(IoError):
        await taken.edge.block_status(2 * CLUSTER, CLUSTER)


async def test_a_discard_frees_the_scratch_unless_another_snapshot_reads_it() -> None:
    world = World()
    older = await world.take()
    scratch, storage = world.scratch()
    newer = await world.take(scratch=scratch)
    await world.top.pwrite(0, b"x" * SIZE)
    await newer.edge.discard(0, CLUSTER)
    await world.check_whole(older)
    await older.edge.discard(0, CLUSTER)
    assert not any(storage.data[:CLUSTER])
    assert any(storage.data[CLUSTER : 2 * CLUSTER])
    await newer.edge.discard(8 * CLUSTER, SIZE - 8 * CLUSTER)  # the short last cluster goes too
    await older.edge.discard(8 * CLUSTER, SIZE - 8 * CLUSTER)
    with pytest.raises(IoError):
        await older.edge.pread(SIZE - 1, 1)


async def test_a_snapshot_cannot_be_written_to() -> None:
    world = World()
    taken = await world.take()
    for attempt in (taken.edge.pwrite(0, b"x"), taken.edge.zero(0, 1)):
        with pytest.raises(IoError, match="a snapshot cannot be written to"):
            await attempt
    await taken.edge.flush()


async def test_preserved_status_tells_what_is_in_the_scratch() -> None:
    world = World()
    taken = await world.take()
    await world.top.pwrite(CLUSTER, b"x")
    node = taken.edge.node
    extents = await node.preserved_status(100, SIZE - 100)  # type: ignore[attr-defined]
    assert [tuple(e) for e in extents] == [(CLUSTER - 100, 0), (CLUSTER, 1), (SIZE - 2 * CLUSTER, 0)]


async def test_a_long_read_of_a_snapshot_lets_others_work_after_each_mebibyte() -> None:
    world = World(size=16 * MiB)
    taken = await world.take()
    reader = SnapshotAccessNode("reader", taken.edge.node.children[0], taken.fleece.copier, taken.fleece.snapshot)
    for at in range(0, 16 * MiB, 64 * CLUSTER):
        await world.top.pwrite(at, b"x")
    at_once = reader.reader()
    assert at_once is not None
    assert not at_once(0, memoryview(bytearray(2 * MiB)))
    assert at_once(0, memoryview(bytearray(1 * MiB)))
    running = asyncio.ensure_future(reader.pread(0, 16 * MiB))
    count = 0
    while not running.done():
        await asyncio.sleep(0)
        count += 1
    assert count >= 16
    assert await running == taken.image


async def test_preserved_status_of_many_runs_stops_early() -> None:
    world = World(size=4 * MiB)
    taken = await world.take()
    for at in range(0, 4 * MiB, 2 * CLUSTER):
        await world.top.pwrite(at, b"x")
    node = taken.edge.node
    extents = await node.preserved_status(0, 4 * MiB)  # type: ignore[attr-defined]
    assert [tuple(extent) for extent in extents] == [(CLUSTER, 1), (CLUSTER, 0)] * 32


async def test_a_discard_waits_for_reads_of_its_range() -> None:
    world = World()
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    taken = await world.take(scratch=scratch)
    await world.top.pwrite(0, b"x")
    held = fault.hold("read", 0, 512)
    reading = asyncio.ensure_future(taken.edge.pread(0, 512))
    await held.reached()
    discarding = asyncio.ensure_future(taken.edge.discard(0, CLUSTER))
    await turns()
    assert not discarding.done(), "what the scratch holds must not go while it is looked at"
    held.release()
    assert await reading == taken.image[:512]
    await discarding


async def test_what_a_scratch_holds_is_told_without_asking_it() -> None:
    world = World()
    await world.top.zero(2 * CLUSTER, 2 * CLUSTER)
    fault, scratch = faulty(world, "faulty", world.scratch()[0])
    taken = await world.take(scratch=scratch)
    for cluster in range(1, 5):
        await world.top.pwrite(cluster * CLUSTER, b"x")
    fault.fail("block status")
    told = await taken.edge.block_status(CLUSTER + 100, 4 * CLUSTER - 200)
    assert told == [Extent(CLUSTER - 100, 0), Extent(2 * CLUSTER, HOLE | ZERO), Extent(CLUSTER - 100, 0)]


async def test_status_of_what_lies_here_and_there_asks_the_disk_once() -> None:
    world = World(size=64 * CLUSTER)
    await world.top.zero(20 * CLUSTER, 4 * CLUSTER)
    taken = await world.take()
    for cluster in (3, 10, 21):
        await world.top.pwrite(cluster * CLUSTER, b"x")
    asked: list[tuple[int, int]] = []
    status = taken.fleece.copier.source.block_status

    async def counted(offset: int, length: int) -> list[Extent]:
        asked.append((offset, length))
        return await status(offset, length)

    with mock.patch.object(Edge, "block_status", lambda self, offset, length: counted(offset, length)):
        node = taken.edge.node
        told = await node.block_status(100, 40 * CLUSTER)
        data, blank = Extent(20 * CLUSTER - 100, 0), Extent(4 * CLUSTER, HOLE | ZERO)
        assert told == [data, blank, Extent(16 * CLUSTER + 100, 0)]
        assert asked == [(100, 40 * CLUSTER)]
        asked.clear()
        assert await node.block_status(10 * CLUSTER, CLUSTER) == [Extent(CLUSTER, 0)]
        assert asked == [], "a scratch knows what it holds"


async def test_status_stops_where_that_of_the_disk_does() -> None:
    world = World(size=64 * CLUSTER)
    taken = await world.take()
    await world.top.pwrite(3 * CLUSTER, b"x")
    short = [Extent(CLUSTER, 0), Extent(CLUSTER, HOLE | ZERO)]
    with mock.patch.object(Edge, "block_status", mock.AsyncMock(return_value=short)):
        assert await taken.edge.node.block_status(0, 8 * CLUSTER) == short
        assert await taken.edge.node.block_status(2 * CLUSTER, 8 * CLUSTER) == [
            Extent(2 * CLUSTER, 0)  # of the disk, and of the scratch, which hides the disk's second extent
        ]


async def test_status_of_many_runs_stops_early() -> None:
    world = World(size=4 * MiB)
    taken = await world.take()
    for at in range(0, 4 * MiB, 2 * CLUSTER):
        await world.top.pwrite(at, b"x")
    assert await taken.edge.block_status(0, 4 * MiB) == [Extent(64 * CLUSTER, 0)]


# The unit of copying.


@pytest.mark.parametrize(
    ("disk_bytes", "block_bytes", "cluster_bytes"),
    [
        (1 * MiB, 512, 4 * KiB),
        (1024 * GiB, 4096, 4 * KiB),
        (1024 * GiB + 1, 4096, 8 * KiB),
        (4 << 40, 4096, 16 * KiB),
        (64 << 40, 4096, 64 * KiB),
        (1 * MiB, 16 * KiB, 16 * KiB),
        (1 * MiB, 1 * MiB, 64 * KiB),
    ],
)
def test_the_unit_of_copying_follows_block_and_disk(disk_bytes: int, block_bytes: int, cluster_bytes: int) -> None:
    assert natural_cluster_size(disk_bytes, block_bytes) == cluster_bytes


async def test_a_change_is_copied_for_as_far_as_it_goes_and_changes_in_a_row_ahead() -> None:
    ahead = 64 * KiB // CLUSTER
    world = World(size=5 * ahead * CLUSTER + CLUSTER // 2)
    taken = await world.take()

    async def copied(cluster: int) -> list[tuple[int, int]]:
        await world.top.pwrite(cluster * CLUSTER + 5, b"x")
        done = taken.fleece.snapshot.done
        return [(first, end) for first, end, is_done in done.runs(0, 5 * ahead + 1) if is_done]

    assert await copied(5) == [(5, 6)]
    assert await copied(2) == [(2, 3), (5, 6)]
    assert await copied(3) == [(2, ahead)], "the next in a row"
    assert await copied(4) == [(2, ahead)]
    assert await copied(ahead) == [(2, 2 * ahead)]
    held = taken.fleece.copier.freeze(taken.fleece.snapshot, (3 * ahead - 1) * CLUSTER, CLUSTER)
    assert await copied(2 * ahead) == [(2, 2 * ahead + 1)], "a reader is there"
    taken.fleece.copier.thaw(taken.fleece.snapshot, held)
    assert await copied(2 * ahead + 1) == [(2, 3 * ahead)]
    assert await copied(5 * ahead - 1) == [(2, 3 * ahead), (5 * ahead - 1, 5 * ahead)]
    assert await copied(5 * ahead) == [(2, 3 * ahead), (5 * ahead - 1, 5 * ahead + 1)], "and no further than the disk"
    await world.check_whole(taken)


async def test_what_every_reader_gave_back_is_not_copied_whatever_comes_and_goes() -> None:
    world = World()
    older, newer = await world.take(), await world.take()
    await older.edge.discard(0, 2 * CLUSTER)
    await newer.edge.discard(0, CLUSTER)
    await world.drop(await world.take())  # makes the copier find anew what needs no copy
    await world.top.pwrite(0, b"x" * 2 * CLUSTER)
    assert not newer.fleece.snapshot.done[0]
    assert newer.fleece.snapshot.done[1], "one of them still reads it"
    assert bytes(await newer.edge.pread(CLUSTER, CLUSTER)) == newer.image[CLUSTER : 2 * CLUSTER]


async def test_an_ended_snapshot_answers_no_read_also_to_who_still_holds_it() -> None:
    world = World()
    older, newer = await world.take(), await world.take()
    below = world.graph.attach(newer.fleece.filter, "somebody", SNAPSHOT_ROLE)
    access = SnapshotAccessNode("access", below, newer.fleece.copier, newer.fleece.snapshot)
    world.graph.add(access, named=True)
    reader = world.graph.attach(access, "late reader", "nbd")
    await world.drop(newer)
    await world.top.pwrite(0, b"new" * CLUSTER)  # copied for the older one alone
    for attempt in (reader.pread(0, 512), reader.block_status(0, 512)):
        with pytest.raises(SnapshotBroken, match="is broken: it has ended"):
            await attempt
    await world.check_whole(older)


async def test_a_discard_that_races_a_copy_leaves_nothing_in_the_scratch() -> None:
    world = World()
    inner, storage = world.scratch()
    fault, scratch = faulty(world, "faulty", inner)
    taken = await world.take(scratch=scratch)
    held = fault.hold("write", 0, CLUSTER)
    writing = asyncio.ensure_future(world.top.pwrite(0, b"x"))
    await held.reached()
    discarding = asyncio.ensure_future(taken.edge.discard(0, CLUSTER))
    await turns()
    held.release()
    await writing
    await discarding
    assert not any(storage.data)


def three_disks() -> tuple[World, list[Edge]]:
    world = World()
    tops = [world.top]
    for index in (1, 2):
        node = FileNode(f"disk{index}", MemoryStorage(SIZE))
        world.graph.add(node, named=True)
        tops.append(world.graph.attach(node, f"export {index}", "nbd", writable=True))
    return world, tops


def plans(world: World, tops: list[Edge]) -> list[Plan]:
    return [Plan(top.node, world.scratch()[0], "s", share=True, fresh=True) for top in tops]


async def test_many_disks_are_cut_while_all_are_drained() -> None:
    world, tops = three_disks()
    fault, edge = faulty(world, "slow", "disk2")
    world.graph.forget(tops[2])
    tops[2] = edge
    held = fault.hold("write")
    late = asyncio.ensure_future(tops[2].pwrite(0, b"in flight when the cut is asked for"))
    await held.reached()
    cutting = asyncio.ensure_future(cut(world.graph, plans(world, tops)))
    await turns()
    first = asyncio.ensure_future(tops[0].pwrite(0, b"after the instant"))
    await turns()
    assert not cutting.done()
    assert not first.done(), "no disk may change while another is not at rest"
    held.release()
    fleeces = await cutting
    assert len({id(fleece.filter) for fleece in fleeces}) == 3
    await late
    await first
    assert fleeces[0].snapshot.done[0], "the write that waited at the gate is after the instant"
    assert not fleeces[2].snapshot.done[0], "the write that was in flight is before it"


async def test_all_disks_are_cut_or_none() -> None:
    world, tops = three_disks()
    wanted = plans(world, tops)
    world.graph.attach(world.graph.find("disk2"), "writer with a name", "nbd", writable=True)
    world.graph.edges_to_cover = lambda node, target=None: [e for e in world.graph.parents(node) if e in tops]  # type: ignore[method-assign]
    with pytest.raises(PermissionConflict, match="writer with a name"):
        await cut(world.graph, wanted)
    assert [top.node.driver for top in tops] == ["file"] * 3
    await tops[0].pwrite(0, b"nothing is copied")
    assert not any(plan.scratch.node.storage.data for plan in wanted if any(plan.scratch.node.storage.data))  # type: ignore[attr-defined]


async def test_a_cut_that_fails_takes_back_the_filters_it_put_in() -> None:
    world, tops = three_disks()
    wanted = plans(world, tops)
    wanted[0].filter_name = wanted[1].filter_name = "one name for two"
    with pytest.raises(UsageError, match="node name 'one name for two' is taken"):
        await cut(world.graph, wanted)
    disks = [world.graph.find(name) for name in ("disk", "disk1", "disk2")]
    assert [world.graph.parents(disk) for disk in disks] == [(top,) for top in tops]
    assert [world.graph.top(disk) for disk in disks] == disks
    wanted[1].filter_name = None
    assert len(await cut(world.graph, wanted)) == 3, "as if the first had not been tried"


async def test_a_cut_follows_a_filter_that_goes_while_it_waits_for_its_turn() -> None:
    world, fault = world_on_faulty_disk()
    first = await world.take()
    held = fault.hold("write")
    late = asyncio.ensure_future(world.top.pwrite(0, b"x"))
    await held.reached()
    dropping = asyncio.ensure_future(world.drop(first))
    await turns()
    taking = asyncio.ensure_future(world.take())  # of the filter, which is about to go
    await turns()
    assert not taking.done()
    held.release()
    await late
    await dropping
    second = await taking
    assert second.fleece.filter is not first.fleece.filter
    assert world.top.node is second.fleece.filter
    await world.top.pwrite(0, b"changed")
    await world.check_whole(second)


async def test_a_cut_whose_disk_goes_while_it_waits_for_its_turn_is_refused() -> None:
    world, fault = world_on_faulty_disk()
    node = FileNode("other", MemoryStorage(SIZE))
    world.graph.add(node, named=True)
    held = fault.hold("write")
    late = asyncio.ensure_future(world.top.pwrite(0, b"x"))
    await held.reached()
    taking = asyncio.ensure_future(world.take())
    await turns()
    other = asyncio.ensure_future(cut(world.graph, [Plan(node, world.scratch()[0], "s")]))
    await turns()
    await world.graph.remove("other")
    held.release()
    await late
    await taking
    with pytest.raises(NotFound, match=r"^node 'other' does not exist$"):
        await other


async def test_a_target_that_the_disk_depends_on_is_refused() -> None:
    world, _ = world_on_faulty_disk()
    world.graph.forget(world.top)
    for target in ("slow", "disk"):
        scratch = world.graph.attach(world.graph.find(target), "job", "target", writable=True)
        with pytest.raises(UsageError, match=f"^target '{target}' is the disk 'slow' itself, or is part of it$"):
            await cut(world.graph, [Plan(world.graph.find("slow"), scratch, "s")])
        world.graph.forget(scratch)


@pytest.mark.parametrize("between", [False, True])
async def test_what_may_grow_has_no_snapshot(between: bool) -> None:
    world = World()
    world.graph.forget(world.top)
    disk = world.graph.find("disk")
    if between:
        edge = world.graph.attach(disk, "node 'filter'", "file", writable=True, may_grow=True)
        world.graph.add(RawNode("filter", edge), named=True)
    plan = Plan(disk, world.scratch()[0], "s")
    holder = world.graph.find("filter") if between else disk
    above = world.graph.attach(holder, "node 'image'", "file", writable=True, may_grow=True)
    with pytest.raises(PermissionConflict, match=r"may make node 'disk' grow, and what grows has no snapshot"):
        await cut(world.graph, [plan])
    world.graph.forget(above)
    world.graph.attach(holder, "export", "nbd", writable=True)
    await cut(world.graph, [plan])


async def test_a_filter_whose_disk_does_not_come_to_rest_is_taken_out_when_it_does(clock: Clock) -> None:
    world, slow = world_on_faulty_disk()
    taken = await world.take()
    held = slow.hold("write", 0, CLUSTER)
    writing = asyncio.ensure_future(world.top.pwrite(0, b"new"))
    await held.reached()
    await world.graph.drain_and_detach(taken.edge)
    ending = asyncio.ensure_future(uncut(world.graph, taken.fleece))
    await turns()
    await clock.advance(CUT_TIMEOUT_S + 1)
    with pytest.raises(IoError, match="did not end in 5 s"):
        await ending
    assert isinstance(world.top.node, CopyBeforeWriteNode)
    await clock.advance(RETRY_S)
    await turns()
    assert isinstance(world.top.node, CopyBeforeWriteNode)
    await clock.advance(RETRY_TIMEOUT_S + 1)
    assert await world.top.pread(2 * CLUSTER, 10)  # it holds nobody up meanwhile
    held.release()
    await writing
    await clock.advance(2 * RETRY_S)
    await turns()
    assert not isinstance(world.top.node, CopyBeforeWriteNode)


async def test_a_disk_that_does_not_come_to_rest_fails_the_cut_and_goes_on() -> None:
    world, fault = world_on_faulty_disk()
    held = fault.hold("write")
    stuck = asyncio.ensure_future(world.top.pwrite(0, b"x"))
    await held.reached()
    with pytest.raises(IoError, match=r"1 requests of user of slow \(file\) did not end in 0.05 s"):
        await cut(world.graph, plans(world, [world.top]), timeout_s=0.05)
    await world.top.pread(CLUSTER, 1)
    held.release()
    await stuck


async def test_the_disk_cannot_be_written_past_the_filter() -> None:
    world = World()
    await world.take()
    with pytest.raises(PermissionConflict, match="does not share that"):
        world.graph.attach(world.graph.find("disk"), "export 'other'", "nbd", writable=True)
    assert world.graph.top(world.graph.find("disk")) is world.top.node
