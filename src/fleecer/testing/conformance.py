"""The contract of a node (block/node.py) as checks that any node can be run through.

    subject = Subject("my driver", make_node)
    await check_node(subject, "reads are private")        # one of CASES; raises AssertionError

A case opens a fresh node, uses it through an `Edge` as every parent does, and closes it. Random cases take a seed. What
a sink such as null-co cannot promise, because it keeps nothing, is left out for it by `cases_for`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from fleecer.block.edge import Edge
from fleecer.block.node import HOLE, ZERO, Node
from fleecer.errors import IoError, PermissionConflict
from fleecer.ranges import is_power_of_two, is_zero
from fleecer.units import KiB, MiB

SIZE_MIN_BYTES = 256 * KiB

STEPS = 120
"""Requests in a random case."""


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A kind of node to be checked.

    `make(directory)` gives, as a context manager, a new writable node of at least SIZE_MIN_BYTES with any content; on
    exit it closes what is below the node as well. `keeps_data` is False for a node that forgets what is written;
    `keeps_sectors_whole` for one to a server that does not promise it where requests overlap.
    """

    name: str
    make: Callable[[str], AbstractAsyncContextManager[Node]]
    keeps_data: bool = True
    keeps_sectors_whole: bool = True


Case = Callable[[Edge, random.Random], Awaitable[None]]


async def check_node(subject: Subject, case: str, directory: str, seed: int = 0) -> None:
    """Runs one case of CASES on a fresh node. Raises AssertionError where the node breaks the contract."""
    async with subject.make(directory) as node:
        assert node.size >= SIZE_MIN_BYTES, f"the node has {node.size} bytes, the checks need {SIZE_MIN_BYTES}"
        edge = Edge(node, "conformance", subject.name, writable=True)
        await CASES[case](edge, random.Random(seed))  # noqa: S311 - not for secrets
        assert not edge.busy, f"{edge.busy} requests were left in flight"


def cases_for(subject: Subject) -> list[str]:
    """The names of the cases that hold for `subject`."""
    return [
        name
        for name, case in CASES.items()
        if (subject.keeps_data or name in _CASES_OF_SINKS)
        and (subject.keeps_sectors_whole or case is not _overlapping_requests_leave_old_or_new_sectors)
    ]


async def _reads_are_private(edge: Edge, generator: random.Random) -> None:
    for length in (512, 4096, 65536, 100_000):
        old = generator.randbytes(length)
        await edge.pwrite(0, old)
        first = await edge.pread(0, length)
        again = await edge.pread(0, length)
        new = generator.randbytes(length)
        await edge.pwrite(0, new)
        assert first == old, "a later write changed what had been read"
        assert await edge.pread(0, length) == new, "read after write"
        assert first == old, "a later read changed what had been read"
        await edge.zero(0, length)
        assert again == old, "a later zero changed what had been read"
        now = await edge.pread(0, length)
        if not memoryview(now).readonly:
            memoryview(now)[:] = b"\xaa" * length
            assert is_zero(await edge.pread(0, length)), "the node kept a reference to what it had returned"


async def _written_data_is_not_kept(edge: Edge, generator: random.Random) -> None:
    for length in (1, 4096, 65536):
        data = bytearray(generator.randbytes(length))
        written = bytes(data)
        await edge.pwrite(4096, data)
        data[:] = bytes(length)
        assert await edge.pread(4096, length) == written, "the node kept the caller's buffer"


async def _random_requests_match_a_model(edge: Edge, generator: random.Random) -> None:
    size = SIZE_MIN_BYTES
    # Only near either end, so that requests meet each other and the node's end.
    base = edge.size - size
    model = bytearray(generator.randbytes(size))
    await edge.pwrite(base, bytes(model))
    for step in range(STEPS):
        length = min(generator.choice([1, 511, 512, 513, 4096, 5000, 65536, 70_000, size]), size)
        offset = generator.choice([0, size - length, generator.randrange(size - length + 1)])
        end = offset + length
        what = f"step {step}: {length} bytes at {offset} of the last {size}"
        match generator.choice(["read", "read", "write", "write", "zero", "discard", "flush", "status"]):
            case "read":
                assert await edge.pread(base + offset, length) == model[offset:end], f"read differs, {what}"
            case "write":
                data = generator.randbytes(length)
                await edge.pwrite(base + offset, data, fua=step % 8 == 0, serialising=step % 4 == 0)
                model[offset:end] = data
            case "zero":
                await edge.zero(base + offset, length, unmap=step % 2 == 0, serialising=step % 4 == 0)
                model[offset:end] = bytes(length)
            case "discard":
                await edge.discard(base + offset, length)
                model[offset:end] = await _discarded(edge, base + offset, model[offset:end])
            case "flush":
                await edge.flush()
            case _:
                await _check_status(edge, base + offset, length)
    assert await edge.pread(base, size) == model, "the end state differs"


async def _discarded(edge: Edge, offset: int, old: bytes | bytearray) -> bytes:
    """What is left after a discard, each byte of which must be zero or as it was."""
    left = bytes(await edge.pread(offset, len(old)))
    wrong = [at for at, byte in enumerate(left) if byte not in {0, old[at]}]
    assert not wrong, f"discard left byte {wrong[0]} neither zero nor as it was"
    return left


async def _check_status(edge: Edge, offset: int, length: int) -> int:
    """Checks one answer of block status, and returns how far it went."""
    extents = await edge.block_status(offset, length)
    assert extents, "block status told nothing"
    assert all(extent.length > 0 for extent in extents), f"an extent is empty: {extents}"
    assert all(0 <= extent.flags <= HOLE | ZERO for extent in extents), f"unknown flags: {extents}"
    told = sum(extent.length for extent in extents)
    assert told <= length, f"block status told of {told} bytes, {length} were asked for"
    kinds = [extent.flags for extent in extents]
    assert all(a != b for a, b in itertools.pairwise(kinds)), f"equal neighbours are not merged: {extents}"
    at = offset
    for extent in extents:
        if extent.flags & ZERO:
            assert is_zero(await edge.pread(at, extent.length)), f"ZERO was said of data at {at}"
        at += extent.length
    return told


async def _zeroes_read_as_zero(edge: Edge, generator: random.Random) -> None:
    for unmap in (True, False):
        for offset, length in ((0, 65536), (4096, 4096), (1000, 3), (70_000, 100_000), (edge.size - 513, 513)):
            await edge.pwrite(0, generator.randbytes(SIZE_MIN_BYTES))
            await edge.pwrite(edge.size - 4096, generator.randbytes(4096))
            before = await edge.pread(offset - 1, 1) if offset else b""
            after = await edge.pread(offset + length, 1) if offset + length < edge.size else b""
            await edge.zero(offset, length, unmap=unmap)
            assert is_zero(await edge.pread(offset, length)), f"zero (unmap={unmap}) left data in {offset}+{length}"
            assert (await edge.pread(offset - 1, 1) if offset else b"") == before, "zero touched the byte before"
            if after:
                assert await edge.pread(offset + length, 1) == after, "zero touched the byte after"


async def _discards_leave_zero_or_old(edge: Edge, generator: random.Random) -> None:
    size = SIZE_MIN_BYTES
    for offset, length in ((0, size), (65536, 65536), (1000, 100_000), (5, 7)):
        old = generator.randbytes(size)
        await edge.pwrite(0, old)
        await edge.discard(offset, length)
        left = await _discarded(edge, offset, old[offset : offset + length])
        assert await edge.pread(0, offset or 1) == (old[:offset] or left[:1]), "discard touched what lies before"
        tail = size - offset - length
        if tail:
            assert await edge.pread(offset + length, tail) == old[offset + length :], "discard touched what lies after"
        again = await edge.pread(offset, length)
        assert again == left, "what a discard left changed between two reads"


async def _status_never_lies(edge: Edge, generator: random.Random) -> None:
    await edge.zero(0, SIZE_MIN_BYTES)
    for offset in (0, 65536, 65536 + 4096, 200_000):
        await edge.pwrite(offset, b"\x01" + bytes(511))
    await edge.zero(100_000, 50_000, unmap=False)
    await edge.discard(0, 4096)
    position = 0
    while position < edge.size:
        position += await _check_status(edge, position, edge.size - position)
    for _ in range(50):
        offset = generator.randrange(SIZE_MIN_BYTES)
        await _check_status(edge, offset, generator.randint(1, edge.size - offset))


async def _flush_may_be_repeated(edge: Edge, generator: random.Random) -> None:
    data = generator.randbytes(8192)
    await edge.flush()
    await edge.pwrite(0, data)
    await edge.flush()
    await edge.flush()
    await asyncio.gather(*(edge.flush() for _ in range(5)))
    await edge.pwrite(100, b"fua", fua=True)
    await edge.zero(200, 100, fua=True)
    await edge.discard(0, 1, fua=True)
    await edge.flush()
    assert await edge.pread(4096, 4096) == data[4096:], "flush changed data"


async def _partial_requests_change_only_their_bytes(edge: Edge, generator: random.Random) -> None:
    size = SIZE_MIN_BYTES
    model = bytearray(generator.randbytes(size))
    await edge.pwrite(0, bytes(model))
    unit = 4096
    for offset, length in (
        (unit, 2 * unit),  # whole units
        (unit, 100),  # partial, left
        (2 * unit - 100, 100),  # partial, right
        (unit + 100, 100),  # inside one
        (2 * unit - 1, 2),  # across a border
        (3 * unit - 50, 2 * unit + 100),  # partial at both ends
        (0, 1),
        (size - 1, 1),
    ):
        data = generator.randbytes(length)
        await edge.pwrite(offset, data)
        model[offset : offset + length] = data
        assert await edge.pread(offset, length) == data, f"read after write of {length} bytes at {offset}"
        assert await edge.pread(0, size) == model, f"a write of {length} bytes at {offset} changed other bytes"


async def _requests_at_the_end_are_right(edge: Edge, generator: random.Random) -> None:
    size = edge.size
    for length in (1, 511, 512, 513, 4097, 70_000):
        data = generator.randbytes(length)
        await edge.pwrite(size - length, data)
        assert await edge.pread(size - length, length) == data, f"the last {length} bytes"
    assert edge.size == size, "a write inside the node changed its size"
    await edge.zero(size - 100, 100)
    assert is_zero(await edge.pread(size - 100, 100)), "zero at the end"
    await edge.discard(size - 100, 100)
    assert await _check_status(edge, size - 1, 1) == 1
    assert edge.size == size, "the node's size changed"


async def _disjoint_requests_do_not_disturb_each_other(edge: Edge, generator: random.Random) -> None:
    unit = SIZE_MIN_BYTES // 32 - 37  # disjoint requests that still share sectors and clusters
    data = [generator.randbytes(unit) for _ in range(32)]
    order = list(range(32))
    generator.shuffle(order)
    await asyncio.gather(*(edge.pwrite(i * unit, data[i]) for i in order))

    async def request(i: int) -> None:
        match i % 4:
            case 0:
                data[i] = data[i][::-1]
                await edge.pwrite(i * unit, data[i])
            case 1:
                assert await edge.pread(i * unit, unit) == data[i], f"read {i} beside other requests"
            case 2:
                data[i] = bytes(unit)
                await edge.zero(i * unit, unit)
            case _:
                data[i] = data[i][: unit // 2 + 3] + b"\x77" + data[i][unit // 2 + 4 :]
                await edge.pwrite(i * unit + unit // 2 + 3, b"\x77")

    for _ in range(4):
        generator.shuffle(order)
        await asyncio.gather(*(request(i) for i in order), edge.flush())
    assert await edge.pread(0, 32 * unit) == b"".join(data), "the end state differs"


async def _neighbours_in_one_sector_keep_their_bytes(edge: Edge, generator: random.Random) -> None:
    model = bytearray(generator.randbytes(4096))
    await edge.pwrite(0, bytes(model))
    writes: list[Coroutine[Any, Any, None]] = []
    for at in generator.sample(range(4096), 200):
        model[at] ^= 0xFF
        writes.append(edge.pwrite(at, bytes([model[at]])))
    await asyncio.gather(*writes)
    assert await edge.pread(0, 4096) == model, "concurrent writes of single bytes lost one another"


async def _overlapping_requests_leave_old_or_new_sectors(edge: Edge, generator: random.Random) -> None:
    length = 16 * KiB
    for _ in range(4):
        versions = [bytes([generator.randrange(1, 255)]) * length for _ in range(4)]
        await edge.pwrite(0, versions[0])
        reads = [edge.pread(0, length) for _ in range(3)]
        writes = [edge.pwrite(0, version) for version in versions[1:]]
        requests: list[Coroutine[Any, Any, object]] = [*reads, *writes]
        generator.shuffle(requests)
        found = [bytes(memoryview(result)) for result in await asyncio.gather(*requests) if result is not None]  # type: ignore[arg-type]
        for data in [*found, bytes(await edge.pread(0, length))]:
            for at in range(0, length, 512):
                sector = data[at : at + 512]
                assert any(sector == version[:512] for version in versions), f"the sector at {at} is torn"


async def _requests_outside_are_refused(edge: Edge, generator: random.Random) -> None:
    size = edge.size
    await edge.pwrite(size - 4096, generator.randbytes(4096))
    before = bytes(await edge.pread(size - 4096, 4096))
    attempts: list[tuple[Coroutine[Any, Any, object], int]] = [
        (edge.pread(size - 1, 2), errno.EINVAL),
        (edge.pread(size, 1), errno.EINVAL),
        (edge.pread(-1, 1), errno.EINVAL),
        (edge.pwrite(size - 1, b"xx"), errno.ENOSPC),
        (edge.pwrite(size, b"x"), errno.ENOSPC),
        (edge.zero(size - 1, 2), errno.ENOSPC),
        (edge.discard(size - 1, 2), errno.EINVAL),
        (edge.block_status(size - 1, 2), errno.EINVAL),
    ]
    for attempt, expected in attempts:
        code = await _error_number(attempt)
        assert code == expected, f"a request outside the node ended with error {code}, not {expected}"
    assert edge.size == size, "a refused write changed the size"
    assert await edge.pread(size - 4096, 4096) == before, "a refused request changed data"


async def _error_number(attempt: Awaitable[object]) -> int:
    """The number of the IoError that `attempt` ends with, 0 if it succeeds."""
    try:
        await attempt
    except IoError as error:
        return error.errno
    return 0


async def _reading_edges_cannot_write(edge: Edge, generator: random.Random) -> None:
    await edge.pwrite(0, generator.randbytes(4096))
    before = bytes(await edge.pread(0, 4096))
    reader = Edge(edge.node, "conformance", "reader")
    for attempt in (reader.pwrite(0, b"x"), reader.zero(0, 512), reader.discard(0, 4096)):
        code = await _error_number(attempt)
        assert code == errno.EPERM, f"an edge that may only read tried to write; error {code}, not EPERM"
    assert await reader.pread(0, 4096) == before, "a refused request changed data"


async def _the_node_describes_itself(edge: Edge, generator: random.Random) -> None:
    node, limits = edge.node, edge.node.limits
    assert node.name, "the node has no name"
    assert node.driver, "the node has no driver"
    assert not node.read_only, "a writable node was asked for"
    assert is_power_of_two(limits.request_alignment_bytes)
    assert is_power_of_two(limits.preferred_bytes), "preferred size is no power of two"
    assert limits.preferred_bytes >= 512, "preferred size is below 512"
    assert is_power_of_two(limits.cluster_size_bytes)
    assert 64 * KiB <= limits.transfer_max_bytes <= 1024 * MiB
    assert (node.padding is not None) == (limits.request_alignment_bytes > 1)
    node.read_only = True
    try:
        Edge(node, "conformance", "writer", writable=True)
    except PermissionConflict:
        pass
    else:
        raise AssertionError("a writing edge to a read-only node was made")
    finally:
        node.read_only = False


async def _sinks_answer_in_full(edge: Edge, generator: random.Random) -> None:
    for length in (1, 512, 4096, 100_000, SIZE_MIN_BYTES):
        offset = generator.randrange(edge.size - length + 1)
        await edge.pwrite(offset, bytes(length))
        await edge.zero(offset, length)
        await edge.discard(offset, length)
        assert len(await edge.pread(offset, length)) == length, "a read was short"
        await _check_status(edge, offset, length)
    await edge.flush()


CASES: dict[str, Case] = {
    "reads are private": _reads_are_private,
    "written data is not kept": _written_data_is_not_kept,
    "random requests match a model": _random_requests_match_a_model,
    "zeroes read as zero": _zeroes_read_as_zero,
    "discards leave zero or old": _discards_leave_zero_or_old,
    "status never lies": _status_never_lies,
    "flush may be repeated": _flush_may_be_repeated,
    "partial requests change only their bytes": _partial_requests_change_only_their_bytes,
    "requests at the end are right": _requests_at_the_end_are_right,
    "disjoint requests do not disturb each other": _disjoint_requests_do_not_disturb_each_other,
    "neighbours in one sector keep their bytes": _neighbours_in_one_sector_keep_their_bytes,
    "overlapping requests leave old or new sectors": _overlapping_requests_leave_old_or_new_sectors,
    "requests outside are refused": _requests_outside_are_refused,
    "reading edges cannot write": _reading_edges_cannot_write,
    "the node describes itself": _the_node_describes_itself,
    "answers are complete": _sinks_answer_in_full,
}
"""Every check by its name, which is what it says of the node."""

_CASES_OF_SINKS = {
    "status never lies",
    "requests outside are refused",
    "reading edges cannot write",
    "the node describes itself",
    "answers are complete",
}
