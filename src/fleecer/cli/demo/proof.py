"""The proof that an image is the disk as it was at one instant.

It rests on the writer's journal and on a copy of the disk from before the first write, on nothing that Fleecer says.
An image of instant t holds, in every block, the last write before t, whole. Writes acknowledged before t are before it,
those issued after t are not; those in flight at t may be either. So there is such a t exactly if

    the latest issue of a write that is in the image  <  the earliest acknowledgement of a write that is not,

and it is the right one if t may lie between the request for the snapshot and its answer. All other blocks are as
they were at first.
"""

from __future__ import annotations

import bisect
import operator
from typing import NamedTuple

from fleecer.cli.demo.disk import BLOCK_BYTES
from fleecer.cli.demo.writer import NEVER, Journal, Write, read_stamp
from fleecer.errors import FleecerError
from fleecer.units import MiB


class ProofFailedError(FleecerError):
    """The image is not the disk at that instant."""


class Verdict(NamedTuple):
    """What was proven: of `blocks` blocks, `written` hold a write and the rest is as at first; `in_flight` writes were
    in flight at the instant, `later` were issued after it."""

    blocks: int
    written: int
    in_flight: int
    later: int


def prove(image_path: str, first_path: str, journal: Journal, asked: int, answered: int) -> Verdict:
    """Checks the raw image against the journal and the copy from before the first write.

    `asked` and `answered` are when the snapshot was asked for and known to be made, on the journal's clock. Raises
    ProofFailedError that names the block or the writes at fault.
    """
    included: Write | None = None  # the write in the image that was issued last
    excluded: Write | None = None  # the write not in the image that was acknowledged first
    blocks = written = 0
    with open(image_path, "rb") as image, open(first_path, "rb") as first:
        while piece := image.read(MiB):
            before = first.read(MiB)
            if len(before) != len(piece):
                raise ProofFailedError(f"the image does not end where the disk does, at {first.tell()} bytes")
            for start in range(0, len(piece), BLOCK_BYTES):
                content = piece[start : start + BLOCK_BYTES]
                history = journal.writes.get(blocks, [])
                held = _writes_held(blocks, content, before[start : start + BLOCK_BYTES], history)
                blocks += 1
                written += held > 0
                if held and (included is None or history[held - 1].issued > included.issued):
                    included = history[held - 1]
                if held < len(history) and (excluded is None or history[held].acknowledged < excluded.acknowledged):
                    excluded = history[held]
        if first.read(1):
            raise ProofFailedError(f"the image ends at {image.tell()} bytes, the disk does not")
    start_of = max(asked, included.issued if included else 0)
    end_of = min(answered, excluded.acknowledged if excluded else NEVER)
    if included is not None and excluded is not None and included.issued > excluded.acknowledged:
        raise ProofFailedError(
            f"write {included.number} is in the image, write {excluded.number} is not, "
            "though it was acknowledged before the other was issued: that is no single instant"
        )
    if start_of > end_of:
        raise ProofFailedError("the image is of an instant before the snapshot was asked for, or after it was made")
    writes = [write for history in journal.writes.values() for write in history]
    in_flight = sum(write.issued < end_of and write.acknowledged > start_of for write in writes)
    return Verdict(blocks, written, in_flight, sum(write.issued > end_of for write in writes))


def _writes_held(block: int, content: bytes, first: bytes, history: list[Write]) -> int:
    """How many of the block's writes are in it: it must hold the last of those whole, or be as at first."""
    if content == first:
        return 0
    stamp = read_stamp(content)
    if stamp is None or stamp[0] != block:
        raise ProofFailedError(f"block {block} holds neither what it held at first nor one whole write to it")
    at = bisect.bisect_left(history, stamp[1], key=operator.attrgetter("number"))
    if at == len(history) or history[at].number != stamp[1]:
        raise ProofFailedError(f"block {block} holds write {stamp[1]}, which was never made to it")
    return at + 1
