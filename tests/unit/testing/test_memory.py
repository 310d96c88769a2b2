"""The fakes themselves: they must behave like the real thing, and fail as they are told."""

from __future__ import annotations

import asyncio
import errno

import pytest
from tests.storage_world import read_at_once

from fleecer.errors import IoError
from fleecer.storage.api import Storage, StorageLimits
from fleecer.testing.memory import FaultyStorage, MemoryStorage, random_turns


async def test_with_a_pause_reads_and_writes_of_one_range_tear_each_other() -> None:
    """As they do on a real file: this is what makes the fake worth testing against."""
    torn = 0
    for seed in range(20):
        storage = MemoryStorage(b"o" * 4096, pause=random_turns(seed))
        _, data = await asyncio.gather(storage.pwrite(0, b"n" * 4096), storage.pread(0, 4096))
        torn += len(set(bytes(data))) > 1
    assert torn > 5


async def test_a_write_past_the_end_counts_once_all_of_it_is_done() -> None:
    storage = MemoryStorage(512, pause=random_turns(1))
    writing = asyncio.ensure_future(storage.pwrite(512, b"n" * 4096))
    while len(storage.data) < 512 + 4096:
        assert storage.size == 512
        await asyncio.sleep(0)
    await writing
    assert storage.size == 512 + 4096


async def test_without_a_pause_everything_is_done_inline() -> None:
    storage = MemoryStorage(4096)
    assert storage.try_pwrite(10, b"abc")
    assert read_at_once(storage, 9, 5) == b"\0abc\0"
    assert read_at_once(storage, 4090, 100) is None
    assert await storage.pread(4090, 100) == bytes(100)
    slow = MemoryStorage(4096, pause=random_turns(1))
    assert not slow.try_pwrite(0, b"x")
    assert read_at_once(slow, 0, 1) is None
    assert slow.data[0] == 0


async def test_the_same_seed_gives_the_same_schedule() -> None:
    async def order(seed: int) -> list[int]:
        done: list[int] = []
        storage = MemoryStorage(4096, pause=random_turns(seed))

        async def write(number: int) -> None:
            await storage.pwrite(0, bytes(1024))
            done.append(number)

        await asyncio.gather(*(write(number) for number in range(8)))
        return done

    orders = [await order(seed) for seed in range(6)]
    assert orders == [await order(seed) for seed in range(6)]
    assert len({tuple(found) for found in orders}) > 1


async def test_a_storage_that_cannot_grow_is_full_at_its_end() -> None:
    storage = MemoryStorage(4096, limits=StorageLimits(growable=False))
    for request in (storage.pwrite(4095, b"xy"), storage.zero(4096, 1, unmap=True)):
        with pytest.raises(IoError) as caught:
            await request
        assert caught.value.errno == errno.ENOSPC
    assert storage.size == 4096


async def test_pages_of_zeroes_are_holes() -> None:
    storage = MemoryStorage(bytes(4096) + b"x" + bytes(8191))
    assert await storage.extents(100, 8192) == [(3996, False), (4096, True), (100, False)]
    await storage.truncate(100)
    await storage.truncate(200)
    assert storage.size == 200


async def test_a_faulty_storage_fails_as_told_and_else_hands_on() -> None:
    inner = MemoryStorage(b"o" * 4096)
    faulty = FaultyStorage(inner)
    storage: Storage = faulty
    assert (storage.name, storage.size, storage.read_only, storage.is_block_device) == ("memory", 4096, False, False)
    assert storage.identity == inner.identity
    assert storage.limits == inner.limits
    failures = [
        faulty.fail(operation, after=1, errno=errno.ENXIO)
        for operation in ("read", "write", "write zeroes", "discard", "flush", "block status", "resize")
    ]

    async def all_seven() -> list[object]:
        requests = (
            storage.pread(0, 1),
            storage.pwrite(0, b"x"),
            storage.zero(0, 1, unmap=True),
            storage.discard(0, 4096),
            storage.sync(),
            storage.extents(0, 1),
            storage.truncate(4096),
        )
        return [await asyncio.gather(request, return_exceptions=True) for request in requests]

    def failed(outcomes: list[object]) -> list[bool]:
        return [isinstance(outcome, list) and isinstance(outcome[0], IoError) for outcome in outcomes]

    assert read_at_once(storage, 0, 1) is None
    assert storage.try_pwrite(0, b"x") is False
    assert failed(await all_seven()) == [False] * 7
    assert failed(await all_seven()) == [True] * 7
    assert failed(await all_seven()) == [False] * 7
    assert [failure.hits for failure in failures] == [1] * 7
    assert storage.try_pwrite(0, b"y")
    assert read_at_once(storage, 0, 1) == b"y"


async def test_a_write_that_fails_half_way_leaves_its_first_bytes() -> None:
    inner = MemoryStorage(b"o" * 4096)
    storage = FaultyStorage(inner)
    storage.fail("write", errno=errno.ENOSPC, written_bytes=3)
    storage.fail("write zeroes", written_bytes=2)
    with pytest.raises(IoError):
        await storage.pwrite(0, b"nnnnn")
    with pytest.raises(IoError):
        await storage.zero(10, 5, unmap=True)
    assert inner.data[:16] == b"nnnooooooo\0\0oooo"
