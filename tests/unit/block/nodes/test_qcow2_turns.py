"""Work on much of a qcow2 image gives others their turn: a request that spans gigabytes holds nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import pytest
from tests.qcow2_world import guest, new_image, open_image

from fleecer.block.edge import Edge
from fleecer.block.nodes.qcow2 import Qcow2Node, opening
from fleecer.testing.memory import MemoryStorage
from fleecer.units import KiB, MiB

SIZE = 24 * MiB


async def turns_beside(work: Coroutine[object, object, object], edge: Edge) -> int:
    """How many reads of the disk's last bytes end, one a turn, before `work` does."""
    running = asyncio.ensure_future(work)
    count = 0
    await asyncio.sleep(0)
    while not running.done():
        await edge.pread(SIZE - 512, 512)
        count += 1
        await asyncio.sleep(0)
    await running
    return count


async def backed(version: int) -> Qcow2Node:
    backing = MemoryStorage(b"b" * SIZE, name="backing", read_only=True)
    storage = await new_image(SIZE, version=version, backing_file="base", backing_format="raw")
    return await open_image(storage, backing=backing)


async def test_zeroes_written_out_over_a_backing_node_let_others_work_after_each_mebibyte() -> None:
    node = await backed(version=2)
    edge = guest(node)
    length = 20 * MiB + 300
    assert await turns_beside(edge.zero(MiB + 5, length), edge) >= 20
    assert bytes(await edge.pread(MiB, 5)) == b"b" * 5
    assert not any(await edge.pread(MiB + 5, length))
    assert bytes(await edge.pread(MiB + 5 + length, 100)) == b"b" * 100


async def test_a_zero_that_is_quick_does_not_wait() -> None:
    node = await backed(version=2)
    edge = guest(node)
    await edge.pwrite(0, b"makes the L2 table")
    assert await turns_beside(edge.zero(0, 1 * MiB), edge) == 0


async def test_the_frees_of_a_huge_discard_let_others_work_while_they_are_committed() -> None:
    storage = await new_image(SIZE, cluster_size=512)
    node = await open_image(storage)
    edge = guest(node)
    await edge.pwrite(0, b"x" * (20 * MiB))
    await node.flush()
    await edge.discard(0, 20 * MiB)
    freed = sum(count for _, count in node._writer._allocator.freed)
    assert freed == 20 * MiB // 512
    assert await turns_beside(node.flush(), edge) >= 2 * (freed // 4096)
    assert not any(await edge.pread(0, 20 * MiB))


async def test_a_search_of_many_tables_at_opening_lets_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await new_image(SIZE, cluster_size=4 * KiB)
    node = await open_image(made)
    for at in range(0, SIZE, 2 * MiB):
        await guest(node).pwrite(at, b"x" * 512)
    await node.close()
    made.data[79] |= 1  # dirty: refcounts prove nothing, so every table is looked at
    monkeypatch.setattr(opening, "_BYTES_BETWEEN_TURNS", 4 * KiB)
    edge = guest(node)
    assert await turns_beside(open_image(MemoryStorage(bytes(made.data)), read_only=True), edge) >= SIZE // (2 * MiB)


@pytest.mark.parametrize("work", ["read", "write"])
async def test_a_long_request_over_scattered_clusters_lets_others_work_after_each_mebibyte(work: str) -> None:
    node = await open_image(await new_image(SIZE))
    edge = guest(node)
    cluster = 64 * KiB
    for at in (*range(0, 20 * MiB, 2 * cluster), *range(cluster, 20 * MiB, 2 * cluster)):
        await edge.pwrite(at, bytes([at // cluster % 251]) * cluster)
    request = edge.pread(0, 20 * MiB) if work == "read" else edge.pwrite(0, b"w" * (20 * MiB))
    assert await turns_beside(request, edge) >= 18
    expected = [b"w" * cluster if work == "write" else bytes([at % 251]) * cluster for at in range(320)]
    assert bytes(await edge.pread(0, 20 * MiB)) == b"".join(expected)
