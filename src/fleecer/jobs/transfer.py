"""Copying one node into another, and comparing two, at the cost of the data in them, not of their size.

What the source's block status calls zero is never read; zeroes found in data are not written either, so that holes stay
holes and a copy is no fatter than its content.

Invariants:
- At most `STEPS_AT_ONCE` steps of `STEP_BYTES` are in flight.
- The first failure, or a cancel of the task, lets no further step begin; it is raised once those begun have ended, so
  nothing is in flight on either edge when `copy` or `compare` is left, however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from fleecer import spares
from fleecer.block.edge import Edge
from fleecer.block.node import ZERO
from fleecer.errors import UsageError, quoted
from fleecer.ranges import Buffer, align_down, is_zero
from fleecer.units import GiB, KiB, MiB

STEP_BYTES = 1 * MiB
STEPS_AT_ONCE = 8
ZERO_STEP_BYTES = 1 * GiB
ZERO_UNIT_BYTES = 4 * KiB
"""Zeroes in data are left out in units of this, or of the target's cluster if that is larger."""


@dataclasses.dataclass(slots=True)
class Progress:
    """How far a transfer is, in bytes.

    data     what is to be read: measured before the first step, so that it does not grow while people watch
    read     of that, read so far
    written  written so far: less than `read` by the zeroes found in data
    """

    data: int = 0
    read: int = 0
    written: int = 0


Report = Callable[[Progress], None]
"""Is told of each step that ended. Must not wait."""


class _Run(NamedTuple):
    start: int
    end: int
    zero: bool


async def copy(source: Edge, target: Edge, *, target_is_zero: bool, report: Report | None = None) -> Progress:
    """Makes `target` read as `source`, which must not change meanwhile. Nothing is flushed.

    `target_is_zero` says that the target reads as zeroes now, so that holes cost nothing; otherwise they are zeroed. A
    larger target keeps what is beyond the source's end. Raises what a read or write raised; the target then holds
    a part, in no order.
    """
    if target.size < source.size:
        raise UsageError(
            f"target {quoted(target.node.name)} has {target.size} bytes, too few for the source's {source.size}"
        )
    progress = Progress(data=await _measure(source))
    unit = max(ZERO_UNIT_BYTES, target.node.limits.cluster_size_bytes)

    async def step(run: _Run) -> None:
        if run.zero:
            await target.zero(run.start, run.end - run.start)
            return
        data = await source.pread(run.start, run.end - run.start)
        progress.read += len(data)
        progress.data = max(progress.data, progress.read)
        written = 0
        for start, end in _pieces_with_data(data, run.start, unit):
            await target.pwrite(start, memoryview(data)[start - run.start : end - run.start])
            written += end - start
        if written < len(data) and not target_is_zero:
            await _zero_between(target, data, run.start, unit)
        spares.give(data)
        progress.written += written
        if report is not None:
            report(progress)

    async with contextlib.aclosing(_copy_steps(source, target_is_zero)) as steps:
        await _work_off(steps, step)
    return progress


async def compare(left: Edge, right: Edge, *, report: Report | None = None) -> int | None:
    """Whether both read the same up to the end of `left`: None, or the offset of a byte that differs.

    Ranges that both block statuses call zero are equal unread. `right` must not be the smaller one.
    """
    progress = Progress(data=await _measure(left))
    differing: list[int] = []

    async def step(run: _Run) -> None:
        length = run.end - run.start
        ours, theirs = await left.pread(run.start, length), await right.pread(run.start, length)
        if bytes(ours) != bytes(theirs):
            at = next(i for i in range(length) if ours[i] != theirs[i])
            differing.append(run.start + at)
        for buffer in (ours, theirs):
            spares.give(buffer)
        progress.read += length
        progress.data = max(progress.data, progress.read)
        if report is not None:
            report(progress)

    async with contextlib.aclosing(_compare_steps(left, right)) as steps:
        await _work_off(steps, step, enough=lambda: bool(differing))
    return min(differing, default=None)


async def _measure(source: Edge) -> int:
    """How many bytes of `source` are not known to be zero."""
    return sum([run.end - run.start async for run in _runs(source, source.size) if not run.zero])


async def _runs(edge: Edge, size: int) -> AsyncGenerator[_Run, None]:
    """The node's block status from 0 to `size`."""
    offset = 0
    while offset < size:
        for extent in await edge.block_status(offset, size - offset):
            yield _Run(offset, offset + extent.length, bool(extent.flags & ZERO))
            offset += extent.length


async def _copy_steps(source: Edge, target_is_zero: bool) -> AsyncGenerator[_Run, None]:
    async for run in _runs(source, source.size):
        if not run.zero:
            for step in _cut(run, STEP_BYTES):
                yield step
        elif not target_is_zero:
            for step in _cut(run, ZERO_STEP_BYTES):
                yield step


async def _compare_steps(left: Edge, right: Edge) -> AsyncGenerator[_Run, None]:
    """Steps over everything that is not zero on both sides."""
    size = left.size
    if not size:
        return
    lefts, rights = _runs(left, size), _runs(right, size)
    ours, theirs = await anext(lefts), await anext(rights)
    offset = 0
    while True:
        end = min(ours.end, theirs.end)
        if not (ours.zero and theirs.zero):
            for step in _cut(_Run(offset, end, zero=False), STEP_BYTES):
                yield step
        offset = end
        if offset == size:
            return
        if ours.end == end:
            ours = await anext(lefts)
        if theirs.end == end:
            theirs = await anext(rights)


def _cut(run: _Run, step_bytes: int) -> list[_Run]:
    """The run in steps, cut at multiples of `step_bytes`."""
    steps: list[_Run] = []
    start = run.start
    while start < run.end:
        end = min(align_down(start, step_bytes) + step_bytes, run.end)
        steps.append(_Run(start, end, run.zero))
        start = end
    return steps


def _pieces_with_data(data: Buffer, offset: int, unit: int) -> list[tuple[int, int]]:
    """The ranges of `data`, which stands at `offset`, that are not zero, in units aligned to `unit` on the disk."""
    if is_zero(data):
        return []
    pieces: list[tuple[int, int]] = []
    view = memoryview(data)
    for run in _cut(_Run(offset, offset + len(data), zero=False), unit):
        if is_zero(view[run.start - offset : run.end - offset]):
            continue
        if pieces and pieces[-1][1] == run.start:
            pieces[-1] = (pieces[-1][0], run.end)
        else:
            pieces.append((run.start, run.end))
    return pieces


async def _zero_between(target: Edge, data: Buffer, offset: int, unit: int) -> None:
    """Zeroes what `_pieces_with_data` leaves out."""
    position = offset
    for start, end in (*_pieces_with_data(data, offset, unit), (offset + len(data), offset + len(data))):
        if position < start:
            await target.zero(position, start - position)
        position = end


async def _work_off(
    steps: AsyncIterator[_Run], do: Callable[[_Run], Awaitable[None]], *, enough: Callable[[], bool] = lambda: False
) -> None:
    """Does the steps in order of their start, several at a time, until `enough`, a failure or a cancel."""
    failures: list[BaseException] = []
    turn = asyncio.Lock()

    async def work() -> None:
        while True:
            try:
                async with turn:
                    step = None if failures or enough() else await anext(steps, None)
                if step is None:
                    return
                await do(step)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised below, after the others ended
                failures.append(error)
                return

    ended = asyncio.gather(*(asyncio.ensure_future(work()) for _ in range(STEPS_AT_ONCE)))
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            failures.insert(0, error)
    if failures:
        raise failures[0]
