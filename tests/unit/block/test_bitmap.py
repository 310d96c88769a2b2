"""The sparse bitmap against a plain set of numbers, and what it keeps in memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from fleecer.block.bitmap import Bitmap

CHUNK = 1 << 15
END = 4 * CHUNK


def bits_of(bitmap: Bitmap) -> set[int]:
    return {bit for start, end, value in bitmap.runs(0, END) if value for bit in range(start, end)}


def some_range(rng: random.Random) -> tuple[int, int]:
    """One that begins or ends where a chunk does, as often as not."""
    edges = [rng.randrange(5) * CHUNK + rng.choice((-1, 0, 1)), rng.randrange(END), rng.randrange(5) * CHUNK]
    start, end = sorted(max(0, min(END, edge)) for edge in rng.sample(edges, 2))
    return start, end


@pytest.mark.parametrize("seed", range(30))
def test_bitmaps_are_sets_of_numbers_however_they_share(seed: int) -> None:
    rng = random.Random(seed)
    bitmaps = [(Bitmap(), set[int]()) for _ in range(3)]
    for _ in range(12):
        bitmap, model = rng.choice(bitmaps)
        start, end = some_range(rng)
        match rng.randrange(4):
            case 0 | 1:
                bitmap.set(start, end)
                model.update(range(start, end))
            case 2:
                bitmap.clear(start, end)
                model.difference_update(range(start, end))
            case _:
                other, others = rng.choice(bitmaps)
                bitmap.update(other)
                model.update(others)
        for each, expected in bitmaps:
            assert bits_of(each) == expected
            assert each.count() == len(expected)
            assert each.any() == bool(expected)
            assert each.all(start, end) == expected.issuperset(range(start, end))
            assert start == END or each[start] == (start in expected)


def test_one_bit_and_runs_at_the_border_of_chunks() -> None:
    bitmap = Bitmap()
    bitmap.set(CHUNK - 1, CHUNK)
    bitmap.set(CHUNK, CHUNK + 1)
    assert list(bitmap.runs(0, 3 * CHUNK)) == [
        (0, CHUNK - 1, 0),
        (CHUNK - 1, CHUNK + 1, 1),
        (CHUNK + 1, 3 * CHUNK, 0),
    ]


def test_what_is_filled_or_shared_takes_no_memory() -> None:
    filled, copied = Bitmap(), Bitmap()
    tracemalloc.start()
    try:
        filled.set(0, 4096 * CHUNK)
        copied.update(filled)
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert filled.all(0, 4096 * CHUNK)
    assert taken_bytes < 4096 * CHUNK // 8 // 10
