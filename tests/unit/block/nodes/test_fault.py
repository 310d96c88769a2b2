"""The fault filter: what fails, how often, and what is held where."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fleecer import eager
from fleecer.block.edge import Edge
from fleecer.block.nodes.fault import FaultNode, Operation
from fleecer.errors import IoError
from fleecer.testing.memory import MemoryNode

REQUESTS: dict[Operation, Callable[[FaultNode], Coroutine[Any, Any, object]]] = {
    "read": lambda node: node.pread(4096, 512),
    "write": lambda node: node.pwrite(4096, b"n" * 512),
    "write zeroes": lambda node: node.zero(4096, 512),
    "discard": lambda node: node.discard(4096, 4096),
    "flush": lambda node: node.flush(),
    "block status": lambda node: node.block_status(4096, 512),
}


def make() -> tuple[FaultNode, MemoryNode]:
    disk = MemoryNode("disk0", b"o" * 16384)
    return FaultNode("fault0", Edge(disk, "node 'fault0'", "file", writable=True)), disk


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("operation", REQUESTS)
async def test_a_rule_fails_its_operation_once_and_no_other(operation: Operation) -> None:
    node, disk = make()
    failure = node.fail(operation, errno=errno.ENOSPC)
    for other, request in REQUESTS.items():
        if other != operation:
            await request(node)
    before = bytes(disk.data)
    with pytest.raises(IoError, match=f"{operation}.* on 'fault0'") as caught:
        await REQUESTS[operation](node)
    assert caught.value.errno == errno.ENOSPC
    assert disk.data == before
    await REQUESTS[operation](node)
    assert failure.hits == 1


async def test_rules_count_what_passes_and_what_fails() -> None:
    node, _ = make()
    node.fail("read", after=2, times=2)
    outcomes = []
    for _ in range(6):
        try:
            await node.pread(0, 1)
            outcomes.append("ok")
        except IoError:
            outcomes.append("failed")
    assert outcomes == ["ok", "ok", "failed", "failed", "ok", "ok"]
    lasting = node.fail("read", times=None)
    for _ in range(5):
        with pytest.raises(IoError):
            await node.pread(0, 1)
    assert lasting.hits == 5
    node.clear()
    await node.pread(0, 1)


async def test_rules_match_only_requests_that_touch_their_range() -> None:
    node, _ = make()
    node.fail("write", 4096, 512, times=None)
    await node.pwrite(4000, bytes(96))
    await node.pwrite(4608, b"x")
    for offset, length in ((4095, 2), (4607, 1), (0, 16384), (4200, 1)):
        with pytest.raises(IoError):
            await node.pwrite(offset, bytes(length))


async def test_a_late_failure_comes_after_the_child_has_done_it() -> None:
    node, disk = make()
    node.fail("write", late=True)
    with pytest.raises(IoError):
        await node.pwrite(0, b"n")
    assert disk.data[:1] == b"n"


@pytest.mark.parametrize("operation", REQUESTS)
@pytest.mark.parametrize("late", [False, True])
async def test_a_breakpoint_holds_one_request_and_lets_others_pass(operation: Operation, late: bool) -> None:
    node, disk = make()
    hold = node.hold(operation, late=late)
    before = bytes(disk.data)
    held = asyncio.create_task(_ignoring_result(REQUESTS[operation](node)))
    await hold.reached()
    assert hold.is_reached
    changes = operation in {"write", "write zeroes", "discard"}
    assert (bytes(disk.data) != before) == (late and changes)
    await REQUESTS[operation](node)
    assert not held.done()
    hold.release()
    await held
    assert eager.start(_ignoring_result(REQUESTS[operation](node))) is None


async def _ignoring_result(request: Coroutine[Any, Any, object]) -> None:
    await request


async def test_a_breakpoint_on_a_range_ignores_the_rest() -> None:
    node, _ = make()
    hold = node.hold("read", 512, 512)
    await node.pread(0, 512)
    await node.pread(1024, 512)
    assert not hold.is_reached
    held = asyncio.create_task(node.pread(0, 2048))
    await hold.reached()
    hold.release()
    hold.release()
    await held


async def test_a_breakpoint_released_before_it_is_reached_holds_nobody() -> None:
    node, _ = make()
    node.hold("read").release()
    assert await node.pread(0, 1) == b"o"


async def test_clear_lets_held_requests_go() -> None:
    node, _ = make()
    holds = [node.hold("read"), node.hold("write")]
    tasks = [asyncio.create_task(_ignoring_result(node.pread(0, 1)))]
    await holds[0].reached()
    node.clear()
    await asyncio.gather(*tasks)
    await node.pwrite(0, b"x")
    assert not holds[1].is_reached


async def test_a_held_request_may_fail_afterwards() -> None:
    node, _ = make()
    hold = node.hold("flush")
    held = asyncio.create_task(node.flush())
    await hold.reached()
    node.fail("flush")
    hold.release()
    with pytest.raises(IoError):
        await held


async def test_a_filter_follows_its_child_and_passes_serialising_on() -> None:
    node, disk = make()
    seen: list[bool] = []

    class Recording(MemoryNode):
        async def pwrite(self, offset: int, data: Any, serialising: bool = False) -> None:
            seen.append(serialising)
            await super().pwrite(offset, data, serialising)

        async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
            seen.append(serialising)
            await super().zero(offset, length, unmap, serialising)

    node.child.node = Recording("disk1", 8192)
    await node.pwrite(0, b"x", serialising=True)
    await node.zero(0, 1, serialising=True)
    await node.pwrite(0, b"x")
    assert seen == [True, True, False]
    assert node.size == 8192
    assert node.children == (node.child,)
    assert node.limits == disk.limits
    reader = FaultNode("fault1", Edge(disk, "node 'fault1'", "file"))
    assert reader.read_only
