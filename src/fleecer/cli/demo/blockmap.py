"""The drawing of a snapshot: what of it is still shared with the disk, preserved in its scratch, or zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click

from fleecer.net.nbd_client import ALLOCATION, NbdClient
from fleecer.units import GiB, format_size

PRESERVED_CONTEXT = "fleecer:preserved"
COLUMNS = 64
ROWS = 10
_ZERO = 2  # NBD_STATE_ZERO
_PRESERVED = 1

_LOOKS = {"preserved": ("#", "red"), "shared": ("o", "green"), "zero": (".", None)}
"""Kinds and how a cell looks that has some of it; the first kind that a cell has wins."""


class Run(NamedTuple):
    """A range of one kind."""

    start: int
    end: int
    kind: str


async def read_map(client: NbdClient) -> list[Run]:
    """The runs of a snapshot, from a connection that negotiated base:allocation and `PRESERVED_CONTEXT`."""
    size, offset, runs = client.info.size, 0, list[Run]()
    while offset < size:
        answer = await client.block_status(offset, min(size - offset, GiB))
        for start, end, allocation, preserved in _both(offset, answer[ALLOCATION], answer[PRESERVED_CONTEXT]):
            kind = "preserved" if preserved & _PRESERVED else "zero" if allocation & _ZERO else "shared"
            runs.append(Run(start, end, kind))
            offset = end
    return runs


def _both(
    offset: int, left: list[tuple[int, int]], right: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int, int]]:
    """Two lists of (length, flags) from one offset on as (start, end, flags, flags), to the end of the shorter one."""
    lefts, rights = iter(left), iter(right)
    try:
        (left_length, left_flags), (right_length, right_flags) = next(lefts), next(rights)
        while True:
            length = min(left_length, right_length)
            yield offset, offset + length, left_flags, right_flags
            offset, left_length, right_length = offset + length, left_length - length, right_length - length
            if not left_length:
                left_length, left_flags = next(lefts)
            if not right_length:
                right_length, right_flags = next(rights)
    except StopIteration:
        return


def draw(runs: list[Run], size: int) -> list[str]:
    """The map as lines of text: a cell for each 1/640 of the disk, and a legend with totals."""
    cells = COLUMNS * ROWS
    cell_bytes = -(-size // cells)
    order = list(_LOOKS)
    kinds = [len(order) - 1] * -(-size // cell_bytes)
    totals = dict.fromkeys(order, 0)
    for run in runs:
        totals[run.kind] += run.end - run.start
        for cell in range(run.start // cell_bytes, (run.end - 1) // cell_bytes + 1):
            kinds[cell] = min(kinds[cell], order.index(run.kind))
    looks = [_look(order[kind]) for kind in kinds]
    lines = ["".join(looks[start : start + COLUMNS]) for start in range(0, len(looks), COLUMNS)]
    legend = "   ".join(f"{_look(kind)} {kind} {format_size(totals[kind])}" for kind in order)
    return [*lines, f"{legend}   (a sign: {format_size(cell_bytes)})"]


def _look(kind: str) -> str:
    sign, colour = _LOOKS[kind]
    return click.style(sign, fg=colour) if colour else sign
