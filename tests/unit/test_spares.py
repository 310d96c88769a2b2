"""Spare buffers: what is given back is used again, what is not ours never, and memory is bounded."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest

from fleecer import spares
from fleecer.ranges import Buffer
from fleecer.units import KiB, MiB


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    spares._kept.clear()
    yield
    spares._kept.clear()


def memory_of(buffer: Buffer) -> object:
    """What a buffer is a view of."""
    return memoryview(buffer).obj


def kept_bytes() -> int:
    return sum(length * len(buffers) for length, buffers in spares._kept.items())


def test_a_buffer_given_back_is_taken_again_by_its_length() -> None:
    first, other = spares.take(256 * KiB), spares.take(64 * KiB)
    spares.give(first)
    spares.give(other)
    assert memory_of(spares.take(256 * KiB)) is memory_of(first)
    assert memory_of(spares.take(64 * KiB)) is memory_of(other)
    assert memory_of(spares.take(64 * KiB)) is not memory_of(other)


def test_one_that_was_not_taken_here_is_not_handed_out() -> None:
    whole = spares.take(128 * KiB)
    for foreign in (bytearray(64 * KiB), bytes(64 * KiB), memoryview(bytes(64 * KiB)), memoryview(whole)[64 * KiB :]):
        spares.give(foreign)
        assert memory_of(spares.take(64 * KiB)) is not memory_of(foreign)
    assert not kept_bytes()


@pytest.mark.parametrize("length", [1, spares.LENGTH_MIN - 1, spares.LENGTH_MAX + 1])
def test_short_and_very_long_ones_are_made_anew(length: int) -> None:
    buffer = spares.take(length)
    assert len(buffer) == length
    spares.give(buffer)
    assert not kept_bytes()


def test_memory_is_bounded_by_length_and_number_of_lengths() -> None:
    for length in range(spares.LENGTH_MIN, spares.LENGTH_MAX, 100 * KiB):
        for buffer in [spares.take(length) for _ in range(150)]:
            spares.give(buffer)
        assert length * len(spares._kept[length]) <= spares.KEPT_MAX_BYTES + length
    assert kept_bytes() <= spares.LENGTHS_MAX * (spares.KEPT_MAX_BYTES + 1 * MiB)


@pytest.mark.parametrize("length", [spares.LENGTH_MIN, 100_000, spares.LENGTH_MAX, spares.LENGTH_MAX + 1])
def test_large_buffers_begin_with_a_page(length: int) -> None:
    for _ in range(3):
        buffer = spares.take(length)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        assert address % mmap.PAGESIZE == 0, "the kernel copies slowly to memory that begins just after that"
