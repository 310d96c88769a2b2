"""Spare buffers: what is given back is used again, what is not ours never, and memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleecer import spares
from fleecer.units import KiB, MiB


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    spares._kept.clear()
    yield
    spares._kept.clear()


def kept_bytes() -> int:
    return sum(length * len(buffers) for length, buffers in spares._kept.items())


def test_a_buffer_given_back_is_taken_again_by_its_length() -> None:
    first, other = spares.take(256 * KiB), spares.take(64 * KiB)
    spares.give(first)
    spares.give(other)
    assert spares.take(256 * KiB) is first
    assert spares.take(64 * KiB) is other
    assert spares.take(64 * KiB) is not other


def test_one_that_was_not_taken_here_is_not_handed_out() -> None:
    for foreign in (bytearray(64 * KiB), bytes(64 * KiB), memoryview(spares.take(64 * KiB))):
        spares.give(foreign)
        assert spares.take(64 * KiB) is not foreign
    assert not kept_bytes()


@pytest.mark.parametrize("length", [1, spares.LENGTH_MIN - 1, spares.LENGTH_MAX + 1])
def test_short_and_very_long_ones_are_made_anew(length: int) -> None:
    buffer = spares.take(length)
    assert len(buffer) == length
    spares.give(buffer)
    assert not kept_bytes()


def test_memory_is_bounded_by_length_and_number_of_lengths() -> None:
    for length in range(spares.LENGTH_MIN, spares.LENGTH_MAX, 100 * KiB):
        for buffer in [spares.take(length) for _ in range(100)]:
            spares.give(buffer)
        assert length * len(spares._kept[length]) <= spares.KEPT_MAX_BYTES + length
    assert kept_bytes() <= spares.LENGTHS_MAX * (spares.KEPT_MAX_BYTES + 1 * MiB)
