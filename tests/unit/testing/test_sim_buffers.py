"""Buffers of simulations: what is given back is spoiled, and nothing else."""

from __future__ import annotations

import asyncio
import random

import pytest

from fleecer import spares
from fleecer.testing.sim.buffers import LENGTH_MIN, SPOILED, spoiled_when_given
from fleecer.testing.sim.disk import SimDisk
from fleecer.testing.sim.loop import simulate


def test_what_is_given_back_is_spoiled_and_nothing_else() -> None:
    with spoiled_when_given():
        whole, other, short = spares.take(LENGTH_MIN), spares.take(LENGTH_MIN), spares.take(LENGTH_MIN - 1)
        made_by_others = memoryview(bytearray(LENGTH_MIN))
        for buffer in (whole[1:], short, made_by_others, bytes(LENGTH_MIN), whole):
            spares.give(buffer)
    assert bytes(whole) == bytes([SPOILED]) * LENGTH_MIN
    assert not any(any(buffer) for buffer in (other, short, made_by_others))


def test_the_real_ones_are_back_afterwards_also_after_a_failure() -> None:
    before = (spares.LENGTH_MIN, spares.take, spares.give, spares.is_spare)

    async def fail() -> None:
        assert spares.give is not before[2]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        simulate(fail())
    assert (spares.LENGTH_MIN, spares.take, spares.give, spares.is_spare) == before


def test_a_simulated_disk_takes_what_a_buffer_holds_when_the_write_takes_effect() -> None:
    async def spoil_too_soon() -> bytes:
        disk = SimDisk(1024, random.Random(1), latency=lambda: 1.0, tearing=False)
        data = await disk.pread(0, 512)
        assert spares.is_spare(data)
        writing = asyncio.create_task(disk.pwrite(512, data))
        await asyncio.sleep(0)
        spares.give(data)
        await writing
        return bytes(disk.data[512:])

    assert simulate(spoil_too_soon()) == bytes([SPOILED]) * 512
