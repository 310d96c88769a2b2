"""The backup job, in the first fleecing scheme (a target whose backing is the live disk) and for full copies."""

from __future__ import annotations

import asyncio
import errno

import pytest
from tests.backup_world import CLUSTER, SIZE, World
from tests.fleecing_world import together
from tests.qcow2_world import checked, file_edge, new_image
from tests.serving_world import turns

from fleecer.block.edge import Edge
from fleecer.block.node import ZERO, Node
from fleecer.block.nodes.qcow2 import open_qcow2, read_header
from fleecer.block.nodes.raw import RawNode
from fleecer.errors import FleecerError, IoError, PermissionConflict, SnapshotBroken, UsageError
from fleecer.jobs import BackupJob, BackupRequest, start_backups
from fleecer.ranges import Buffer
from fleecer.testing.memory import MemoryNode, random_turns

ACTIVE = ["created", "running"]


# sync=none: the target reads as the disk did.


@pytest.mark.parametrize("seed", range(25))
async def test_every_byte_read_through_the_target_is_an_old_one_under_load(seed: int) -> None:
    world = World(seed, pause=random_turns(seed) if seed % 5 else None)
    disk, guest, storage = world.disk()
    target, _, _ = await world.overlay("B", disk)
    reader = world.reader(target)
    going = True

    async def write_all() -> None:
        for _ in range(3):
            for offset in world.random.sample(range(0, SIZE, CLUSTER), k=6):
                await guest.pwrite(offset, world.random.randbytes(min(CLUSTER, SIZE - offset)))

    async def change() -> None:
        for _ in range(15):
            await world.change(guest)

    async def read(image: bytes) -> None:
        while going:
            await (world.read(reader, image) if world.random.random() < 0.6 else world.status(reader, image))
            await asyncio.sleep(0)

    async def guests() -> None:
        nonlocal going
        await together(write_all(), change(), change())
        going = False

    before = asyncio.ensure_future(change())  # the cut is made under load
    await asyncio.sleep(0)
    (job,) = await world.start((disk, target))
    image = bytes(storage.data)  # nothing has run since the gates opened
    await together(guests(), *(read(image) for _ in range(3)))
    await before
    assert bytes(await reader.pread(0, SIZE)) == image
    await job.cancel()
    await world.graph.drain_and_detach(reader)
    await world.graph.remove("B")
    assert [node.name for node in world.graph.nodes()] == ["A"]


async def test_a_reader_that_comes_while_old_data_is_copied_waits_for_it() -> None:
    world = World()
    disk, guest, storage = world.disk()
    target, file, _ = await world.overlay("B", disk)
    reader = world.reader(target)
    await world.start((disk, target))
    old = bytes(storage.data)
    held = file.hold("write")
    writing = asyncio.ensure_future(guest.pwrite(100, b"new"))
    await held.reached()
    reading = asyncio.ensure_future(reader.pread(0, CLUSTER))
    elsewhere = await reader.pread(CLUSTER, CLUSTER)
    await turns()
    assert not reading.done()
    assert not writing.done()
    assert storage.data == old, "the disk was changed before its old data was safe"
    held.release()
    assert bytes(await reading) == old[:CLUSTER]
    await writing
    assert bytes(elsewhere) == old[CLUSTER : 2 * CLUSTER]


async def test_two_disks_are_cut_at_one_instant() -> None:
    for seed in range(10):
        world = World(seed, pause=random_turns(seed))
        first, one, _ = world.disk("one")
        second, two, _ = world.disk("two")
        targets = [(await world.overlay(f"B{at}", disk))[0] for at, disk in enumerate((first, second))]
        stop = asyncio.Event()

        async def count(one: Edge, two: Edge, stop: asyncio.Event) -> None:
            """What it writes to the second disk it has written to the first before."""
            number = 0
            while not stop.is_set():
                number += 1
                await one.pwrite(0, number.to_bytes(8, "big"))
                await two.pwrite(0, number.to_bytes(8, "big"))

        await one.pwrite(0, bytes(8))
        await two.pwrite(0, bytes(8))
        counting = asyncio.ensure_future(count(one, two, stop))
        await turns(world.random.randrange(100))
        await world.start((first, targets[0]), (second, targets[1]))
        await turns(30)
        stop.set()
        await counting
        numbers = [int.from_bytes(await world.reader(target).pread(0, 8), "big") for target in targets]
        assert numbers[0] - 1 <= numbers[1] <= numbers[0], f"the disks are of two instants: {numbers}"


async def test_either_all_disks_are_cut_or_none() -> None:
    world = World()
    first, guest, _ = world.disk("one")
    second, _, _ = world.disk("two")
    target, _, _ = await world.overlay("B1", first)
    wrong = MemoryNode("B2", SIZE - 512)
    world.graph.add(wrong, named=True)
    with pytest.raises(
        UsageError, match=r"^target 'B2' has 328668 bytes, the disk 'two' has 329180; they must be equal$"
    ):
        await world.start((first, target), (second, wrong))
    assert not world.table.jobs()
    assert guest.node is first
    assert not world.graph.parents(target)
    assert not world.graph.parents(wrong)
    await guest.pwrite(0, b"z")
    assert bytes(await world.reader(target).pread(0, 1)) == b"z", "the target is in use although the job was refused"


async def test_disks_that_were_cut_are_given_back_if_a_later_one_refuses() -> None:
    world = World()
    first, guest, _ = world.disk("one")
    second, _, _ = world.disk("two")
    targets = [(await world.overlay(f"B{at}", disk))[0] for at, disk in enumerate((first, second))]
    nodes = world.graph.nodes()
    with pytest.raises(UsageError, match=r"^node name 'cbw' is taken; choose another$"):
        await world.start((first, targets[0]), (second, targets[1]), filter_name="cbw")
    assert guest.node is first
    assert world.graph.nodes() == nodes
    assert not any(world.graph.parents(target) for target in targets)
    await world.start((first, targets[0]))  # as if nothing had been


async def test_copies_ask_to_be_serialised_exactly_if_the_disk_is_below_the_target() -> None:
    asked: list[bool] = []

    class Spy(RawNode):
        async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
            asked.append(serialising)
            await super().pwrite(offset, data, serialising)

        async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
            asked.append(serialising)
            await super().zero(offset, length, unmap, serialising)

    world = World()
    disk, guest, _ = world.disk()
    await guest.zero(CLUSTER, CLUSTER)
    above, _, _ = await world.overlay("B", disk)
    beside = MemoryNode("beside", SIZE)
    world.graph.add(beside, named=True)
    for node, expected in ((above, True), (beside, False)):
        target = Spy(f"spy-{node.name}", world.graph.attach(node, "spy", "file", writable=True))
        world.graph.add(target, named=True)
        (job,) = await world.start((disk, target))
        await guest.pwrite(0, b"x" * 2 * CLUSTER)
        await guest.zero(CLUSTER, CLUSTER)
        await job.cancel()
        assert asked
        assert set(asked) == {expected}
        asked.clear()


async def test_a_target_shows_errors_once_its_job_is_cancelled_and_never_new_data() -> None:
    world = World()
    disk, guest, _ = world.disk()
    target, _, below = await world.overlay("B", disk)
    reader = world.reader(target)
    above = RawNode("over", world.graph.attach(target, "node 'over'", "file"))
    world.graph.add(above, named=True)
    indirect = world.reader(above)
    (job,) = await world.start((disk, target))
    held = below.hold("read", late=True)
    in_flight = asyncio.ensure_future(reader.pread(2 * CLUSTER, 512))
    await held.reached()
    await guest.pwrite(0, b"new")
    await job.cancel()
    assert guest.node is disk
    await guest.pwrite(2 * CLUSTER, bytes(512))
    held.release()
    text = r"^snapshot 'job-B' is broken: fleecing job 'job-B' has ended$"
    for request in (in_flight, reader.pread(0, 10), reader.block_status(0, 10), indirect.pread(CLUSTER, 10)):
        with pytest.raises(SnapshotBroken, match=text):
            await request
    assert world.statuses("job-B") == [*ACTIVE, "aborting", "concluded"]
    assert (
        "BLOCK_JOB_CANCELLED",
        {"device": "job-B", "type": "backup", "len": SIZE, "offset": 0, "speed": 0},
    ) in world.events
    assert job.error == ""


async def test_a_full_target_breaks_the_job_with_its_cause_and_the_guest_sees_nothing() -> None:
    world = World()
    disk, guest, storage = world.disk()
    target, file, _ = await world.overlay("B", disk)
    reader = world.reader(target)
    (job,) = await world.start((disk, target))
    await guest.pwrite(0, b"first")
    assert await reader.pread(0, 512)
    file.fail("write", errno=errno.ENOSPC, times=None)
    await guest.pwrite(CLUSTER, b"second")
    assert storage.data[CLUSTER : CLUSTER + 6] == b"second"
    for request in (reader.pread(0, 512), reader.block_status(4 * CLUSTER, 512)):
        with pytest.raises(SnapshotBroken, match=r"copying its old data failed: write of .* No space left on device"):
            await request
    await job.concluded()
    assert "No space left on device" in job.error
    assert world.statuses("job-B") == [*ACTIVE, "aborting", "concluded"]
    (completed,) = [data for name, data in world.events if name == "BLOCK_JOB_COMPLETED"]
    assert completed["error"] == job.error
    assert guest.node is disk, "the filter must go with the job"
    with pytest.raises(SnapshotBroken, match="No space left on device"):
        await reader.pread(0, 512)


async def test_under_break_guest_write_the_guest_is_told_and_the_target_stays_true() -> None:
    world = World()
    disk, guest, storage = world.disk()
    target, file, _ = await world.overlay("B", disk)
    reader = world.reader(target)
    (job,) = await world.start((disk, target), on_error="break-guest-write")
    image = bytes(storage.data)
    file.fail("write", errno=errno.ENOSPC)
    with pytest.raises(IoError, match="No space left") as caught:
        await guest.pwrite(CLUSTER, b"second")
    assert caught.value.errno == errno.ENOSPC
    assert storage.data == image
    await guest.pwrite(CLUSTER, b"again")
    assert bytes(await reader.pread(0, SIZE)) == image
    await job.cancel()


async def test_a_target_is_used_for_one_instant_only() -> None:
    world = World()
    disk, guest, _ = world.disk()
    target, _, _ = await world.overlay("B", disk)
    (job,) = await world.start((disk, target), auto_dismiss=True)
    await guest.pwrite(0, b"x")
    await job.cancel()
    with pytest.raises(UsageError, match=r"^target 'B' holds the past of an earlier instant; make a new one for each$"):
        await world.start((disk, target))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_one_disk_can_have_several_targets_of_several_instants(order: tuple[int, int]) -> None:
    world = World()
    disk, guest, storage = world.disk()
    targets = [(await world.overlay(f"B{at}", disk))[0] for at in range(2)]
    readers = [world.reader(target) for target in targets]
    jobs, images = [], []
    for at, target in enumerate(targets):
        jobs += await world.start((disk, target))
        images.append(bytes(storage.data))
        for offset in range(at * 100, SIZE, 2 * CLUSTER):
            await guest.pwrite(offset, world.random.randbytes(3000))
    for reader, image in zip(readers, images, strict=True):
        assert bytes(await reader.pread(0, SIZE)) == image
    for at in order:
        await jobs[at].cancel()
        await guest.pwrite(CLUSTER, world.random.randbytes(CLUSTER))
        for other in set(order) - {at}:
            if jobs[other].state == "running":
                assert bytes(await readers[other].pread(0, SIZE)) == images[other]
    assert guest.node is disk


async def test_two_targets_of_one_disk_may_be_started_together() -> None:
    world = World()
    disk, guest, storage = world.disk()
    targets = [(await world.overlay(f"B{at}", disk))[0] for at in range(2)]
    jobs = await world.start(*((disk, target) for target in targets))
    image = bytes(storage.data)
    await guest.pwrite(0, world.random.randbytes(SIZE))
    for target in targets:
        assert bytes(await world.reader(target).pread(0, SIZE)) == image
    for job in jobs:
        await job.cancel()
    assert guest.node is disk


async def test_a_base_and_an_overlay_that_are_both_live_are_cut_together_under_load() -> None:
    world = World(pause=random_turns(5))
    base, _, _ = world.disk("base")
    middle, _, _ = await world.overlay("top", base)
    guest = world.graph.attach(middle, "export 'top'", "nbd", writable=True)
    targets = []
    for name, node in (("B1", base), ("B2", middle)):
        targets.append((await world.overlay(name, node))[0])
    stop = False

    async def load() -> None:
        while not stop:
            await world.change(guest)

    loads = [asyncio.ensure_future(load()) for _ in range(3)]
    await turns()
    async with asyncio.timeout(10):
        await world.start((base, targets[0]), (middle, targets[1]))
    stop = True
    await asyncio.gather(*loads)


# sync=full: the target becomes the disk of that instant.


@pytest.mark.parametrize("seed", range(12))
async def test_a_full_backup_is_the_disk_of_its_instant_whatever_is_written(seed: int) -> None:
    world = World(seed, pause=random_turns(seed) if seed % 3 else None)
    disk, guest, storage = world.disk()
    target = MemoryNode("B", SIZE, pause=world.pause)
    world.graph.add(target, named=True)

    async def change() -> None:
        for _ in range(20):
            await world.change(guest)

    before = asyncio.ensure_future(change())
    await asyncio.sleep(0)
    (job,) = await world.start((disk, target), sync="full", fresh=bool(seed % 2))
    image = bytes(storage.data)
    await together(change(), change())
    await job.concluded()
    await before
    assert job.error == ""
    assert target.data == image
    assert world.statuses("job-B") == [*ACTIVE, "waiting", "pending", "concluded"]
    assert (job.progress_current, job.progress_total) == (SIZE, SIZE)
    assert guest.node is disk
    (again,) = await world.start((disk, target), sync="full", job_id="again")  # the same target, as of now
    await again.concluded()
    assert target.data == storage.data


async def test_holes_stay_holes_in_a_full_backup() -> None:
    world = World()
    disk, guest, storage = world.disk()
    await guest.zero(CLUSTER, 3 * CLUSTER)
    image = await new_image(SIZE)
    edge = file_edge(image)
    target = await open_qcow2(edge, name="B", header=await read_header(edge, "B"), backing=None, read_only=False)
    world.graph.add(target, named=True)
    (job,) = await world.start((disk, target), sync="full", fresh=True)
    await job.concluded()
    extents = await world.reader(target).block_status(0, SIZE)
    assert [(e.length, bool(e.flags & ZERO)) for e in extents] == [
        (CLUSTER, False),
        (3 * CLUSTER, True),
        (SIZE - 4 * CLUSTER, False),
    ]
    assert bytes(await world.reader(target).pread(0, SIZE)) == bytes(storage.data)
    assert len(image.data) < 9 * CLUSTER  # three clusters of data, and the tables
    await world.graph.close()
    report = await checked(image)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_a_full_backup_to_a_target_over_the_disk_itself_can_be_read_before_and_after_its_end() -> None:
    world = World()
    disk, guest, storage = world.disk()
    await guest.zero(CLUSTER, CLUSTER)
    target, file, _ = await world.overlay("B", disk)
    reader = world.reader(target)
    held = file.hold("write")
    (job,) = await world.start((disk, target), sync="full", fresh=True)
    image = bytes(storage.data)
    await held.reached()
    writing = asyncio.ensure_future(guest.pwrite(0, bytes(SIZE)))
    await turns()
    held.release()
    await writing
    assert bytes(await reader.pread(0, SIZE)) == image
    await job.concluded()
    assert job.error == ""
    await guest.pwrite(0, b"\xff" * SIZE)
    assert bytes(await reader.pread(0, SIZE)) == image, "it has the whole disk, so it needs the job no more"
    with pytest.raises(UsageError, match="holds the past of an earlier instant"):
        await world.start((disk, target), job_id="again")


async def test_what_a_target_is_made_of_shows_errors_too_once_the_past_is_gone() -> None:
    world = World()
    disk, guest, storage = world.disk()
    image, file, _ = await world.overlay("B", disk)
    target = RawNode("target", world.graph.attach(image, "node 'target'", "file", writable=True))
    world.graph.add(target, named=True)
    readers = [world.reader(image), world.reader(target)]
    (job,) = await world.start((disk, target))
    old = bytes(storage.data)
    await guest.pwrite(0, b"new" * CLUSTER)
    assert [bytes(await reader.pread(0, SIZE)) for reader in readers] == [old] * 2
    await job.cancel()
    for reader in readers:
        with pytest.raises(SnapshotBroken):
            await reader.pread(0, 512)
    assert len(await world.reader(file).pread(0, 512)) == 512, "below the image there is no past, only bytes"
    world.graph.forget(readers[1])
    await world.graph.remove("target")
    with pytest.raises(UsageError, match="holds the past of an earlier instant"):
        await world.start((disk, image), job_id="again")


async def test_the_past_is_kept_while_the_disk_changes_hands() -> None:
    world = World()
    disk, guest, storage = world.disk()
    target, _, _ = await world.overlay("B", disk)
    (job,) = await world.start((disk, target))
    image = bytes(storage.data)
    await world.graph.drain_and_detach(guest)  # the last one who used the disk
    guest = world.graph.attach(world.graph.top(disk), "export 'again'", "nbd", writable=True)
    await guest.pwrite(0, b"new" * CLUSTER)
    assert bytes(await world.reader(target).pread(0, SIZE)) == image
    await job.cancel()
    assert guest.node is disk
    assert world.graph.parents(disk)[-1] is guest


async def test_a_full_backup_goes_on_without_anybody_who_uses_the_disk() -> None:
    world = World()
    fault, guest = world.slow_disk()
    target = MemoryNode("T", SIZE)
    world.graph.add(target, named=True)
    held = fault.hold("read")
    (job,) = await world.start((fault, target), sync="full")
    await held.reached()
    await world.graph.drain_and_detach(guest)
    held.release()
    await turns()
    assert job.state == "concluded"
    assert job.error == ""
    assert len(world.graph.parents(fault)) == 0, "the filter goes with the job"


async def test_a_full_backup_is_durable_when_it_has_completed() -> None:
    world = World()
    disk, _, _ = world.disk()
    target, file, _ = await world.overlay("B", disk)
    held = file.hold("flush")
    (job,) = await world.start((disk, target), sync="full")
    await held.reached()
    assert job.state == "running"
    held.release()
    await job.concluded()
    assert job.error == ""


async def test_a_full_backup_whose_target_fails_concludes_with_the_cause() -> None:
    world = World()
    disk, guest, _ = world.disk()
    target, file, _ = await world.overlay("B", disk)
    file.fail("write", errno=errno.ENOSPC, times=None)
    (job,) = await world.start((disk, target), sync="full")
    await job.concluded()
    assert "No space left on device" in job.error
    assert world.statuses("job-B") == [*ACTIVE, "aborting", "concluded"]
    assert guest.node is disk
    with pytest.raises(FleecerError):
        await world.reader(target).pread(0, 512)


async def test_a_full_backup_that_is_cancelled_stops_soon_and_leaves_the_disk_alone() -> None:
    world = World()
    disk, guest, _ = world.disk()
    target, file, _ = await world.overlay("B", disk)
    held = file.hold("write")
    (job,) = await world.start((disk, target), sync="full")
    await held.reached()
    cancelling = asyncio.ensure_future(job.cancel())
    await turns()
    assert job.state == "aborting", "it waits for what is in flight"
    held.release()
    await cancelling
    assert job.progress_current < SIZE or world.statuses("job-B")[-2] == "aborting"
    assert guest.node is disk
    with pytest.raises(SnapshotBroken):
        await world.reader(target).pread(0, 512)


# Starting.


async def test_writers_that_would_pass_the_filter_by_are_refused_from_then_on() -> None:
    world = World()
    disk, _, _ = world.disk()
    target, _, _ = await world.overlay("B", disk)
    await world.start((disk, target))
    with pytest.raises(PermissionConflict):
        world.graph.attach(disk, "export 'second'", "nbd", writable=True)
    with pytest.raises(PermissionConflict):
        world.graph.attach(target, "export 'B'", "nbd", writable=True)


async def test_a_job_id_is_taken_once_also_by_two_who_come_at_the_same_time() -> None:
    world = World()
    disk, guest = world.slow_disk()
    targets = [(await world.overlay(f"B{at}", disk))[0] for at in range(2)]
    with pytest.raises(UsageError, match=r"^job id 'twice' is used twice; choose another$"):
        await start_backups(
            world.graph, world.table, [BackupRequest("twice", disk, t, "none") for t in targets], world.announce
        )

    async def start(target: Node) -> list[BackupJob]:
        return await start_backups(
            world.graph, world.table, [BackupRequest("same", disk, target, "none")], world.announce
        )

    held = disk.hold("write")
    writing = asyncio.ensure_future(guest.pwrite(0, b"x"))
    await held.reached()  # so that both have to wait for the disk
    starting = [asyncio.ensure_future(start(target)) for target in targets]
    await turns()
    held.release()
    outcomes = await asyncio.gather(*starting, return_exceptions=True)
    await writing
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [str(failure) for failure in failures] == ["job id 'same' is taken; choose another, or dismiss that job"]
    (job,) = world.table.jobs()
    await job.cancel()
    assert guest.node is disk, "the filter of the one that was refused was left behind"
    second = targets[1]
    assert second.check is None
    await world.start((disk, second))  # as if nothing had been


async def test_a_disk_that_does_not_come_to_rest_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleecer.block.fleecing.cut.__kwdefaults__", {"timeout_s": 0.01})
    world = World()
    fault, guest = world.slow_disk()
    target, _, _ = await world.overlay("B", fault)
    held = fault.hold("write")
    writing = asyncio.ensure_future(guest.pwrite(0, b"x"))
    await held.reached()
    with pytest.raises(IoError, match=r"did not end in 0\.01 s") as caught:
        await world.start((fault, target))
    assert caught.value.errno == errno.ETIMEDOUT
    held.release()
    await writing
    assert guest.node is fault
    assert not world.graph.parents(target)
    assert not world.table.jobs()
