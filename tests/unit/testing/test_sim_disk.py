"""The simulated disk keeps its fault model: what is promised at the top of disk.py, clause by clause."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.storage_world import read_at_once

from fleecer.errors import IoError
from fleecer.testing.sim.disk import PAGE_BYTES, SECTOR_BYTES, STALL_S, Faults, Kind, SimDisk, heavy_tailed
from fleecer.testing.sim.loop import simulate

OLD, NEW = bytes([1]) * PAGE_BYTES, bytes([2]) * PAGE_BYTES


def run(
    program: Callable[[SimDisk], Coroutine[Any, Any, None]], *, seed: int = 0, faults: Faults | None = None
) -> SimDisk:
    """Runs `program` with a recorded disk of one page of OLD; returns the disk."""
    disk = SimDisk(OLD, random.Random(seed), faults=faults, record=True)
    simulate(program(disk))
    return disk


def states(disk: SimDisk, at: int | None = None) -> set[bytes]:
    """All that may be on the medium after a power cut."""
    return {bytes(state) for state in disk.crash_states(random.Random(0), at=at)}


def sectors_of(medium: bytes) -> list[int]:
    """What each sector is filled with; asserts that none is torn."""
    sectors = [medium[start : start + SECTOR_BYTES] for start in range(0, len(medium), SECTOR_BYTES)]
    assert all(len(set(sector)) == 1 for sector in sectors)
    return [sector[0] for sector in sectors]


def test_latencies_are_short_mostly_and_a_thousand_times_longer_now_and_then() -> None:
    draw = heavy_tailed(random.Random(1), typical_s=1e-4, longest_s=1.0)
    drawn = sorted(draw() for _ in range(10_000))
    assert drawn[5_000] < 1e-3
    assert drawn[-1] > 0.1
    assert drawn[-1] <= 1.0


def test_a_write_in_flight_may_be_seen_in_part_and_requests_overtake_each_other() -> None:
    async def program(disk: SimDisk) -> None:
        ended: list[str] = []

        async def write(data: bytes, name: str) -> None:
            await disk.pwrite(0, data)
            ended.append(name)

        async def read() -> None:
            found = await disk.pread(0, PAGE_BYTES)
            kinds.add(len(set(found)))

        await asyncio.gather(write(NEW, "first"), write(OLD, "second"), read())
        orders.add(tuple(ended))

    kinds: set[int] = set()
    orders: set[tuple[str, ...]] = set()
    for seed in range(60):
        run(program, seed=seed)
    assert kinds == {1, 2}
    assert orders == {("first", "second"), ("second", "first")}


def test_a_write_past_the_end_counts_once_all_of_it_is_done() -> None:
    sizes: set[int] = set()

    async def program(disk: SimDisk) -> None:
        writing = asyncio.ensure_future(disk.pwrite(PAGE_BYTES, NEW))
        while not writing.done():
            sizes.add(disk.size)
            assert disk.size == PAGE_BYTES or writing.done()
            await asyncio.sleep(1e-5)
        assert disk.size == 2 * PAGE_BYTES
        await asyncio.gather(disk.zero(3 * PAGE_BYTES, 1, unmap=True), disk.pwrite(0, NEW))
        assert disk.size == 3 * PAGE_BYTES + 1

    for seed in range(10):
        run(program, seed=seed)
    assert sizes == {PAGE_BYTES}


def test_until_a_sync_each_sector_of_a_write_may_be_on_the_medium_or_not() -> None:
    async def program(disk: SimDisk) -> None:
        await disk.pwrite(0, NEW)

    disk = run(program)
    assert len(states(disk)) == 2 ** (PAGE_BYTES // SECTOR_BYTES)
    assert all(set(sectors_of(state)) <= {1, 2} for state in states(disk))
    assert states(disk, at=0) == {OLD}


def test_after_a_sync_that_came_later_it_is_durable() -> None:
    async def program(disk: SimDisk) -> None:
        await disk.pwrite(0, NEW)
        await disk.sync()

    assert states(run(program)) == {NEW}


def test_a_sync_does_not_cover_a_write_that_had_not_ended_when_it_began() -> None:
    async def program(disk: SimDisk) -> None:
        held = disk.hold("sync")
        syncing = asyncio.create_task(disk.sync())
        await held.reached()
        await disk.pwrite(0, NEW)
        held.release()
        await syncing

    assert OLD in states(run(program))


def test_a_failed_sync_leaves_in_doubt_what_it_should_have_kept_and_a_later_one_does_not_help() -> None:
    async def program(disk: SimDisk) -> None:
        await disk.pwrite(0, NEW)
        with pytest.raises(IoError):
            await disk.sync()
        await disk.sync()

    disk = run(program, faults=Faults({1: "EIO"}))
    assert bytes(disk.data) == NEW, "what is read comes from the cache"
    assert OLD in states(disk)


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
def test_a_failed_write_has_changed_any_part_of_its_range_in_whole_sectors(kind: Kind) -> None:
    async def program(disk: SimDisk) -> None:
        with pytest.raises(IoError) as caught:
            await disk.pwrite(0, NEW)
        assert caught.value.errno == getattr(errno, kind)
        await disk.sync()

    found = {tuple(sectors_of(bytes(run(program, seed=seed, faults=Faults({0: kind})).data))) for seed in range(40)}
    assert len(found) > 2
    assert OLD in states(run(program, faults=Faults({0: kind})))


def test_a_stall_takes_minutes_and_ends() -> None:
    async def program(disk: SimDisk) -> None:
        await disk.pwrite(0, NEW)
        assert asyncio.get_running_loop().time() >= STALL_S

    assert bytes(run(program, faults=Faults({0: "stall"})).data) == NEW


def test_a_short_request_is_done_in_two_parts_and_whole_at_the_end() -> None:
    async def program() -> None:
        disk = SimDisk(OLD, random.Random(0), faults=Faults({0: "short"}), latency=lambda: 1.0)
        writing = asyncio.create_task(disk.pwrite(0, NEW))
        await asyncio.sleep(1.5)
        assert set(disk.data) == {1, 2}
        await writing
        assert bytes(disk.data) == NEW

    simulate(program())


def test_a_flip_changes_one_bit_of_what_is_read_and_says_nothing() -> None:
    async def program(disk: SimDisk) -> None:
        found = bytes(await disk.pread(0, PAGE_BYTES))
        assert sum((one ^ other).bit_count() for one, other in zip(found, OLD, strict=True)) == 1
        assert bytes(await disk.pread(0, PAGE_BYTES)) == OLD

    run(program, faults=Faults({0: "flip"}))


def test_for_good_means_every_later_request_of_the_kind() -> None:
    async def program(disk: SimDisk) -> None:
        for _ in range(3):
            with pytest.raises(IoError):
                await disk.pwrite(0, NEW)
        assert bytes(await disk.pread(0, SECTOR_BYTES)) in (OLD[:SECTOR_BYTES], NEW[:SECTOR_BYTES])
        faults.stop()
        await disk.pwrite(0, NEW)

    faults = Faults({0: "EIO"}, for_good=True)
    run(program, faults=faults)
    assert faults.hit == ["write:EIO"] * 3


def test_who_is_cancelled_while_a_request_is_under_way_hears_of_it_when_it_has_ended() -> None:
    async def program(disk: SimDisk) -> None:
        writing = asyncio.create_task(disk.pwrite(0, NEW))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        assert not disk.in_flight

    for seed in range(20):
        assert bytes(run(program, seed=seed).data) == NEW


def test_what_is_done_at_once_is_in_doubt_like_any_other() -> None:
    async def program() -> SimDisk:
        disk = SimDisk(OLD, random.Random(0), record=True, inline=1.0)
        assert disk.try_pwrite(0, NEW)
        assert read_at_once(disk, 0, PAGE_BYTES) == NEW
        return disk

    assert {OLD, NEW} < states(simulate(program()))
