"""Who is cancelled while a qcow2 image works for him stops nothing half-way, and harms nobody else."""

from __future__ import annotations

import asyncio

import pytest
from tests.qcow2_world import HeldStorage, checked, guest, new_image, open_image, settle

from fleecer.block.nodes.qcow2.metadata import SingleFlight, SliceCache
from fleecer.errors import UsageError
from fleecer.testing.memory import MemoryStorage
from fleecer.units import KiB, MiB

CLUSTER = 64 * KiB


async def test_work_that_was_begun_ends_though_whoever_wanted_it_is_cancelled() -> None:
    flights, gate = SingleFlight(), asyncio.get_running_loop().create_future()
    ended: list[str] = []

    async def work() -> None:
        await gate
        ended.append("work")

    first = asyncio.ensure_future(flights.run("key", work))
    second = asyncio.ensure_future(flights.run("key", work))
    third = asyncio.ensure_future(flights.run("key", work))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.sleep(0)
    gate.set_result(None)
    await third
    assert ended == ["work"]
    assert first.cancelled()
    assert second.cancelled()


async def test_what_the_work_raises_is_raised_to_who_had_it_done_and_to_no_other() -> None:
    flights, gate = SingleFlight(), asyncio.get_running_loop().create_future()

    async def work() -> None:
        await gate
        raise UsageError("no")

    first = asyncio.ensure_future(flights.run("key", work))
    second = asyncio.ensure_future(flights.run("key", work))
    await asyncio.sleep(0)
    gate.set_result(None)
    with pytest.raises(UsageError):
        await first
    await second


async def test_a_cancelled_reader_takes_a_slice_from_nobody() -> None:
    gate = asyncio.get_running_loop().create_future()

    async def read(_offset: int) -> bytearray:
        await gate
        return bytearray(CLUSTER)

    cache = SliceCache[bytearray](CLUSTER, 10 * CLUSTER, read)
    readers = [asyncio.ensure_future(cache.fetch(0)) for _ in range(3)]
    await asyncio.sleep(0)
    readers[1].cancel()
    await asyncio.sleep(0)
    gate.set_result(None)
    assert (await readers[0]) is (await readers[2])


@pytest.mark.parametrize("part", ["counts", "tables"])
async def test_a_cancelled_flush_leaves_the_image_whole_and_others_flushes_going(part: str) -> None:
    storage = HeldStorage(0, name="image")
    await new_image(MiB, storage)
    node = await open_image(storage)
    disk = guest(node)
    await disk.pwrite(0, b"x" * CLUSTER)
    hold = storage.hold("flush" if part == "counts" else "write")
    flushing = [asyncio.ensure_future(disk.flush()) for _ in range(3)]
    await hold.reached.wait()
    flushing[0].cancel()
    flushing[1].cancel()
    await settle()
    hold.released.set()
    await flushing[2]
    await disk.pwrite(CLUSTER, b"y" * CLUSTER)
    await disk.flush()
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0)


async def test_an_image_is_closed_only_after_the_commit_that_a_cancelled_flush_left_running() -> None:
    storage = HeldStorage(0, name="image")
    await new_image(MiB, storage)
    node = await open_image(storage)
    disk = guest(node)
    await disk.pwrite(0, b"x" * CLUSTER)
    hold = storage.hold("write")
    flushing = asyncio.ensure_future(disk.flush())
    await hold.reached.wait()
    flushing.cancel()
    closing = asyncio.ensure_future(node.close())
    await settle()
    assert not closing.done()
    hold.released.set()
    await closing
    again = await open_image(MemoryStorage(bytes(storage.data)))
    assert await guest(again).pread(0, CLUSTER) == b"x" * CLUSTER
