"""null-co: nothing in, zeroes out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fleecer import eager
from fleecer.block.node import HOLE, ZERO, Extent
from fleecer.block.nodes.null import NullNode
from fleecer.ranges import is_zero
from fleecer.units import GiB, MiB


async def test_reads_are_zeroes_of_any_length() -> None:
    node = NullNode("null0", 64 * GiB)
    for length in (1, 4096, MiB, 3 * MiB + 1):
        data = await node.pread(0, length)
        assert len(data) == length
        assert is_zero(data)


@pytest.mark.parametrize(("read_zeroes", "flags"), [(True, HOLE | ZERO), (False, 0)])
async def test_status_says_zero_only_where_that_was_promised(read_zeroes: bool, flags: int) -> None:
    node = NullNode("null0", GiB, read_zeroes=read_zeroes)
    assert await node.block_status(512, GiB - 512) == [Extent(GiB - 512, flags)]
    assert node.limits.reads_zero_when_new == read_zeroes


@pytest.mark.parametrize(("latency_s", "waits"), [(0.0, False), (1e-9, True)])
async def test_requests_wait_only_where_there_is_latency(latency_s: float, waits: bool) -> None:
    node = NullNode("null0", GiB, latency_s=latency_s)

    async def read() -> None:
        await node.pread(0, 1)

    requests: list[Coroutine[Any, Any, None]] = [
        read(),
        node.pwrite(0, b"x"),
        node.zero(0, 1),
        node.discard(0, 1),
        node.flush(),
    ]
    tasks = [eager.start(request) for request in requests]
    assert [task is not None for task in tasks] == [waits] * 5
    await asyncio.gather(*(task for task in tasks if task is not None))
