"""What every node of the block graph is: six operations on a range of bytes, and data about itself.

A node is a source or a transformer of bytes: a file, a format over a file, a filter. Parents never hold a node, they
hold an `Edge` (edge.py), which checks the range, the permission and the gate; a node may therefore assert them.

Invariants that every node keeps:
- Offsets and lengths are bytes, 0 <= offset, 0 < length, offset + length <= size rounded up to the node's alignment
  (writes to a growable node may pass that).
- What `pread` returns is private: no later write changes it, and the node keeps no reference to it.
- What `pwrite` is given is not changed by the caller until the call returns, and not kept after it.
- When an operation returns, its effect is visible to every later operation; it is durable only after a later `flush`.
- No operation is cancelled from outside; one that fails raises `IoError` or another `FleecerError` and leaves, for
  every sector of a write's range, the old or the new bytes.
- A node never learns who its parents are.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fleecer.block.inflight import InFlight
from fleecer.ranges import Buffer, ReadAtOnce, WriteAtOnce
from fleecer.storage.api import Ended, ReadEnded
from fleecer.units import MiB

if TYPE_CHECKING:
    from fleecer.block.edge import Edge

HOLE = 1
"""Status flag: nothing is allocated there, a write may need space (NBD base:allocation, NBD_STATE_HOLE)."""
ZERO = 2
"""Status flag: reads as zeroes (NBD base:allocation, NBD_STATE_ZERO)."""


class Extent(NamedTuple):
    """A run of bytes of one kind. `flags` is an or of HOLE and ZERO; 0 (plain data) is always a safe answer."""

    length: int
    flags: int


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a node can do, as data. The edge above splits, pads and refuses accordingly.

    request_alignment_bytes  offsets and lengths of reads and writes must be multiples (a power of two); the edge pads
    preferred_bytes          requests aligned to this are served best (a power of two, at least 512)
    transfer_max_bytes       longest read or write in one call; the edge splits
    cluster_size_bytes       unit of allocation, 1 where there is none
    zero_is_fast             `zero` never writes the zeroes out one by one
    can_discard              `discard` may free space (it never fails for lack of it)
    growable                 a write beyond `size` extends the node
    reads_zero_when_new      bytes never written read as zero, and cost no space
    """

    request_alignment_bytes: int = 1
    preferred_bytes: int = 4096
    transfer_max_bytes: int = 32 * MiB
    cluster_size_bytes: int = 1
    zero_is_fast: bool = True
    can_discard: bool = True
    growable: bool = False
    reads_zero_when_new: bool = False


class Problem(NamedTuple):
    """Why a node was given up: from then on it refuses to write or flush, until it is opened anew.

    `corrupt` says that the image contradicts itself; `span` is the offset and length of what was met, where known.
    """

    message: str
    corrupt: bool = False
    span: tuple[int, int] | None = None


_SHORT_CUTS = (
    ("pread", "reader"),
    ("pread", "begin_pread"),
    ("pwrite", "writer"),
    ("pwrite", "serialising_writer"),
    ("flush", "begin_flush"),
)


class Node(abc.ABC):
    """One node. Subclasses set `size`, `limits`, `read_only` and `children` before anything is attached to them."""

    driver: ClassVar[str] = ""

    __slots__ = ("check", "children", "limits", "name", "on_problem", "padding", "problem", "read_only", "size")

    def __init_subclass__(cls) -> None:
        """Who overrides `pread`, `pwrite` or `flush` alone gets every request there: none takes a short cut past it."""
        super().__init_subclass__()
        for operation, short_cut in _SHORT_CUTS:
            if operation in cls.__dict__ and short_cut not in cls.__dict__:
                setattr(cls, short_cut, getattr(Node, short_cut))

    def __init__(self, name: str, size: int, *, limits: Limits, read_only: bool = False) -> None:
        self.name = name
        self.size = size
        self.limits = limits
        self.read_only = read_only
        self.children: tuple[Edge, ...] = ()
        # Called by the edge after each read or status, before its outcome is used: raises once what is read through
        # this node has become untrue (a fleecing target whose snapshot broke).
        self.check: Callable[[], None] | None = None
        self.problem: Problem | None = None
        # Called once, when `problem` is set while the node is in use. Must not raise, wait or call back (graph.py).
        self.on_problem: Callable[[Node], None] | None = None
        # Claims for read-modify-write, shared by all edges to this node (edge.py); only where padding is needed.
        self.padding = InFlight() if limits.request_alignment_bytes > 1 else None

    # What needs no wait is done without a coroutine: that is most requests, and half of what one costs.

    def reader(self) -> ReadAtOnce | None:
        """What reads from here without a wait, past nodes that only hand on; None where nothing can be had at once.

        It is good for requests inside the node, until the caller gives way to the event loop or begins another request.
        """
        return None

    def writer(self) -> WriteAtOnce | None:
        """What writes from here without a wait, not serialising; see `reader`."""
        return None

    def serialising_writer(self) -> WriteAtOnce | None:
        """What writes from here without a wait where nothing else is in flight in the range, nor any look-up of it.

        That is all that a serialising write is for (`pwrite`), if it is over before anything else can happen.
        """
        return None

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """Begins what `pread` does, where that takes one request to a file and nothing has to be waited for before it.

        For requests inside the node that could not be read at once. `ended` hears of the end in a later turn of the
        event loop, once. False, with nothing done and nobody told, if it takes more: use `pread`. Raises FleecerError
        where `pread` would at once. What `reader` and `writer` gave is as good as before.
        """
        return False

    def begin_flush(self, ended: Ended) -> bool:
        """Begins what `flush` does, where a file has to be synced for that and nothing else.

        `ended` hears of the end once, perhaps before this returns. False, with nothing done and nobody told, if it
        takes more, or nothing at all: use `flush`.
        """
        return False

    @abc.abstractmethod
    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes from `offset`. Raises IoError; then nothing was changed."""

    @abc.abstractmethod
    async def pwrite(self, offset: int, data: Buffer, serialising: bool = False) -> None:
        """Writes all of `data` at `offset`.

        `serialising` asks that this request and every overlapping one on this node wait for each other, from before
        the node looks up where the bytes live (QEMU's BDRV_REQ_SERIALISING). Filters pass it on; a node without a
        look-up may ignore it.
        """

    @abc.abstractmethod
    async def zero(self, offset: int, length: int, unmap: bool = True, serialising: bool = False) -> None:
        """Makes the range read as zeroes. With `unmap` space may be freed; without, it stays, or is, allocated."""

    @abc.abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """The range's content is no longer needed: a hint. Afterwards each byte reads as zero or as it was."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Returns when every write, zero and discard that returned before this call is on stable storage.

        A failure is final: each later flush of the node fails too, until it is opened anew.
        """

    @abc.abstractmethod
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """What the range holds, from `offset` on: at least one extent, in order, together at most `length` bytes.

        The answer may stop early; ask again from there. ZERO is said only where reads return zeroes; neighbours of
        equal kind are merged.
        """

    def give_up(self, problem: Problem) -> None:
        """Notes why the node refuses work from now on, and tells whoever wants to know. Only the first time counts."""
        if self.problem is None:
            self.problem = problem
            if self.on_problem is not None:
                self.on_problem(self)

    async def close(self) -> None:
        """Flushes nothing, waits for nothing in flight (the edges did), gives descriptors and locks back."""
        return


def merge_extents(extents: list[Extent]) -> list[Extent]:
    """The same runs with equal neighbours joined and empty ones dropped."""
    merged: list[Extent] = []
    for extent in extents:
        if not extent.length:
            continue
        if merged and merged[-1].flags == extent.flags:
            merged[-1] = Extent(merged[-1].length + extent.length, extent.flags)
        else:
            merged.append(extent)
    return merged
