"""Scratch files: where snapshots put a disk's old data; and a few that are there before anybody asks for one.

To open a file takes a thread some 0.1 ms, and many times that beside busy guests where processors are few. A snapshot
of many disks waits for all of it, and guests for a part. So who serves disks for long keeps a scratch ready for each,
and opens the next once that is taken.

Invariants:
- A scratch has no name, and is as new: nothing was ever written to it.
- One that is ready is used only for its disk, in the disk's own directory, while the disk is as long as it was.
- What is ready is closed with its disk, or by `close`. That one cannot be opened beforehand is no failure: whoever
  needs it will hear of that.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from fleecer.block.node import Node
from fleecer.block.nodes.file import FileNode
from fleecer.errors import IoError, UsageError, quoted
from fleecer.export import Export
from fleecer.storage.file import FileStorage, open_unlinked
from fleecer.storage.pool import running_pool

OPENING_S = 0.003
"""How long guests wait while scratches are opened. It mostly takes a tenth of that, or as many turns of the loop."""

READY_MAX = 64
"""Descriptors are limited; snapshots of more disks at once are rare."""

READY_AFTER_S = 0.2
"""How long after disks are served, or scratches taken, others are opened: not while a snapshot is being made."""

_NO_PLACE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""What a directory answers that will never take a scratch file."""

Opening = asyncio.Future[list[FileStorage]]


class Scratches:
    """Opens scratches for the snapshots of one daemon.

    `disks` tells what is served. `watch` and `keep` take futures and coroutines that shutting down waits for.
    """

    def __init__(
        self,
        disks: Callable[[], list[Export]],
        watch: Callable[[Opening], Opening],
        keep: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._disks = disks
        self._watch = watch
        self._keep = keep
        self._ready: dict[Export, tuple[str, FileStorage]] = {}  # with the directory it is in
        self._keeps_ready = False
        self._due: asyncio.TimerHandle | None = None

    async def open(self, disks: Sequence[Export], directory: str | None) -> dict[Export, FileStorage]:
        """A scratch for each disk, beside its image unless a `directory` is named; they are the caller's.

        Raises what the first failed with, IoError or UsageError. Then, or if cancelled, nothing is the caller's, and
        those that are still being opened are closed later.
        """
        found: dict[Export, FileStorage] = {}
        places: dict[str, list[Export]] = {}
        openings: dict[Opening, list[Export]] = {}
        try:
            for disk in disks:
                place = directory or _image_directory(disk)
                if (ready := self._take_ready(disk, place)) is not None:
                    found[disk] = ready
                else:
                    places.setdefault(place, []).append(disk)
            openings = {self._open(place, there): there for place, there in places.items()}
            if not running_pool().linger(openings, OPENING_S):
                await asyncio.wait(openings, return_when=asyncio.FIRST_EXCEPTION)
            _check_opened(openings)
            for opening, there in openings.items():
                found.update(zip(there, opening.result(), strict=True))
        except BaseException:
            for storage in found.values():
                self._keep(storage.close())
            for opening in openings:
                opening.add_done_callback(self._close_unwanted)
            raise
        finally:
            self._make_ready_soon()
        return found

    def keep_ready(self) -> None:
        """From now on has scratches opened beforehand, a moment from now and whenever some were taken."""
        self._keeps_ready = True
        self._make_ready_soon()

    def forget(self, disk: Export) -> None:
        """The disk is no longer served."""
        if disk in self._ready:
            self._discard(disk)

    def close(self) -> None:
        """Closes what is ready, and keeps nothing ready any more."""
        self._keeps_ready = False
        if self._due is not None:
            self._due.cancel()
        for disk in list(self._ready):
            self._discard(disk)

    def _open(self, place: str, disks: list[Export]) -> Opening:
        """Begins to open those of a directory, in one thread: one for each would take longer."""
        return self._watch(open_unlinked(place, [disk.edge.size for disk in disks]))

    def _take_ready(self, disk: Export, place: str) -> FileStorage | None:
        if not self._fits(disk, place):
            return None
        return self._ready.pop(disk)[1]

    def _fits(self, disk: Export, place: str) -> bool:
        """Whether what is ready for the disk is in that directory, and of its length."""
        where, storage = self._ready.get(disk, ("", None))
        return storage is not None and where == place and storage.size == disk.edge.size

    def _make_ready_soon(self) -> None:
        if self._keeps_ready and self._due is None:
            self._due = asyncio.get_running_loop().call_later(READY_AFTER_S, self._make_ready)

    def _make_ready(self) -> None:
        self._due = None
        places: dict[str, list[Export]] = {}
        for disk in self._disks():
            try:
                place = _image_directory(disk)
            except (UsageError, OSError):
                continue  # whoever takes a snapshot of it has to name a place
            if not self._fits(disk, place):
                self.forget(disk)
                if len(self._ready) + sum(map(len, places.values())) < READY_MAX:
                    places.setdefault(place, []).append(disk)
        for place, there in places.items():
            self._open(place, there).add_done_callback(functools.partial(self._made_ready, place, there))

    def _made_ready(self, place: str, disks: list[Export], opening: Opening) -> None:
        if opening.exception() is not None:
            return
        served = self._disks() if self._keeps_ready else []
        for disk, storage in zip(disks, opening.result(), strict=True):
            if disk in served and disk not in self._ready:
                self._ready[disk] = (place, storage)
            else:
                self._keep(storage.close())

    def _discard(self, disk: Export) -> None:
        self._keep(self._ready.pop(disk)[1].close())

    def _close_unwanted(self, opening: Opening) -> None:
        if opening.exception() is None:
            for storage in opening.result():
                self._keep(storage.close())


def _check_opened(openings: Iterable[Opening]) -> None:
    """Raises what the first that failed did so with, and what to do about it."""
    error = next((opening.exception() for opening in openings if opening.done() and opening.exception()), None)
    if isinstance(error, IoError) and error.errno in _NO_PLACE:
        detail = f"{os.strerror(error.errno)}; choose another place with --scratch-dir"
        raise IoError(error.errno, error.node, error.operation, detail=detail) from error
    if error is not None:
        raise error


def _image_directory(disk: Export) -> str:
    """Where the disk's image is: the place for its scratch unless another is named."""
    node: Node = disk.edge.node
    while node.children:
        node = node.children[0].node
    if isinstance(node, FileNode) and isinstance(node.storage, FileStorage) and not node.storage.is_block_device:
        return node.storage.directory()
    raise UsageError(f"disk {quoted(disk.name)} is no local image file, so name a place for its scratch: --scratch-dir")
