"""The delay filter, on a loop whose time is counted instead of waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fleecer import eager
from fleecer.block.edge import Edge
from fleecer.block.nodes.delay import DelayNode
from fleecer.block.nodes.fault import Operation
from fleecer.testing.memory import MemoryNode


def make(delays_s: dict[Operation, float]) -> DelayNode:
    disk = MemoryNode("disk0", b"o" * 8192)
    return DelayNode("delay0", Edge(disk, "node 'delay0'", "file", writable=True), delays_s)


def requests_of(node: DelayNode) -> dict[Operation, Coroutine[Any, Any, object]]:
    return {
        "read": node.pread(0, 512),
        "write": node.pwrite(0, b"n"),
        "write zeroes": node.zero(0, 1),
        "discard": node.discard(0, 4096),
        "flush": node.flush(),
        "block status": node.block_status(0, 512),
    }


OPERATIONS: list[Operation] = ["read", "write", "write zeroes", "discard", "flush", "block status"]


@pytest.mark.parametrize("delayed", OPERATIONS)
async def test_only_the_named_operation_waits_and_as_long_as_told(
    delayed: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    node = make({delayed: 0.25})
    for operation, request in requests_of(node).items():
        await request
        assert slept == ([0.25] if operation == delayed else [])
        slept.clear()


async def test_requests_wait_side_by_side_and_before_the_child_sees_them() -> None:
    node = make({"write": 0.01})
    disk = node.child.node
    assert isinstance(disk, MemoryNode)
    tasks = [eager.start(node.pwrite(i, b"n")) for i in range(20)]
    assert bytes(disk.data[:20]) == b"o" * 20
    await asyncio.gather(*(task for task in tasks if task is not None))
    assert bytes(disk.data[:20]) == b"n" * 20
