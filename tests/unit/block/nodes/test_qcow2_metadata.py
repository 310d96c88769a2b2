"""The cache of table slices: what it may drop, and what it must not."""

from __future__ import annotations

import asyncio

from fleecer.block.nodes.qcow2.metadata import SliceCache

SLICE = 512


def cache_of(slices: int) -> tuple[SliceCache[bytearray], list[int]]:
    reads: list[int] = []

    async def read(offset: int) -> bytearray:
        reads.append(offset)
        return bytearray(SLICE)

    return SliceCache(SLICE, slices * SLICE, read), reads


async def fetch_many(cache: SliceCache[bytearray], count: int) -> None:
    for at in range(100, 100 + count):
        await cache.fetch(at * SLICE)


async def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache, reads = cache_of(4)
    for at in range(100):
        await cache.fetch(0)
        await cache.fetch((at + 1) * SLICE)
        assert len(cache.slices) <= 4
    assert reads.count(0) == 1


async def test_a_dirty_slice_stays_until_its_commit_is_through() -> None:
    cache, reads = cache_of(4)
    slice_ = await cache.fetch(0)
    cache.mark_dirty(slice_)
    await fetch_many(cache, 20)
    assert cache.slices[0] is slice_
    assert cache.take_dirty() == [slice_]
    assert not cache.dirty
    await fetch_many(cache, 20)
    assert cache.slices[0] is slice_
    slice_.pins -= 1
    await fetch_many(cache, 20)
    assert 0 not in cache.slices
    assert reads.count(0) == 1


async def test_a_slice_changed_after_it_was_taken_is_dirty_again() -> None:
    cache, _ = cache_of(4)
    slice_ = await cache.fetch(0)
    cache.mark_dirty(slice_)
    cache.take_dirty()
    cache.mark_dirty(slice_)
    assert cache.take_dirty() == [slice_]


async def test_a_read_under_way_when_its_place_gets_another_use_is_not_kept() -> None:
    content = bytearray(b"old table")
    waiting = asyncio.Event()

    async def read(offset: int) -> bytearray:
        found = bytearray(content)
        await waiting.wait()
        return found

    cache = SliceCache(SLICE, 4 * SLICE, read)
    fetching = asyncio.ensure_future(cache.fetch(SLICE))
    await asyncio.sleep(0)
    cache.forget(0, 4 * SLICE)
    content[:] = b"new table"
    waiting.set()
    assert (await fetching).data == b"new table"
    cache.forget(0, 4 * SLICE)
    assert not cache.slices


async def test_a_failed_read_fails_its_reader_and_the_next_tries_again() -> None:
    failures = [OSError("first")]

    async def read(offset: int) -> bytearray:
        await asyncio.sleep(0)
        if failures:
            raise failures.pop()
        return bytearray(SLICE)

    cache = SliceCache(SLICE, 4 * SLICE, read)
    results = await asyncio.gather(cache.fetch(0), cache.fetch(0), return_exceptions=True)
    assert isinstance(results[0], OSError)
    assert results[1] is cache.slices[0]
