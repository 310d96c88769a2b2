"""Rules that keep snapshots true, each taken out of the program on purpose: what a search must find to be trusted.

`BREAKS` names what each does; docs/INVARIANTS.md names the rules.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from fleecer.block.copier import Copier, Snapshot
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import open_qcow2
from fleecer.block.nodes.qcow2.allocator import Allocator
from fleecer.block.nodes.qcow2.commit import Committer
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.errors import IoError
from fleecer.ranges import Buffer

Break = Callable[[pytest.MonkeyPatch], None]


def _changes_do_not_wait_for_frozen_reads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fleecer.block.fleecing.Copier", functools.partial(Copier, freeze=False))


def _copies_do_not_serialise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fleecer.testing.sim.world.open_qcow2", functools.partial(open_qcow2, serialise=False))


def _old_data_is_not_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Copier, "must_preserve", lambda *_: False)


def _a_wait_between_choosing_and_freezing(patch: pytest.MonkeyPatch) -> None:
    read_run = SnapshotAccessNode._read_run

    async def late(self: SnapshotAccessNode, holder: Snapshot | None, offset: int, length: int) -> Buffer:
        await asyncio.sleep(0)
        return await read_run(self, holder, offset, length)

    patch.setattr(SnapshotAccessNode, "_read_run", late)


def _done_before_the_copy_is_made(patch: pytest.MonkeyPatch) -> None:
    perform = Copier._perform

    async def hasty(self: Copier, copy: Any) -> None:
        copy.snapshot.done.set(copy.start, copy.end)
        await perform(self, copy)

    patch.setattr(Copier, "_perform", hasty)


def _a_break_is_not_noticed_after_a_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshot, "check", lambda _: None)


def _maps_reach_the_file_before_counts(patch: pytest.MonkeyPatch) -> None:
    store_counts, store_maps = Committer._store_counts, Committer._store_maps
    patch.setattr(Committer, "_store_counts", store_maps)
    patch.setattr(Committer, "_store_maps", store_counts)


def _no_flush_between_data_and_maps(patch: pytest.MonkeyPatch) -> None:
    async def unflushed(self: Committer, batch: Any) -> None:
        await self._write(batch.counts)
        await self._write(batch.table_entries)

    patch.setattr(Committer, "_store_counts", unflushed)


def _no_flush_at_the_end(patch: pytest.MonkeyPatch) -> None:
    async def unflushed(self: Committer, batch: Any) -> None:
        await self._write(batch.maps)
        if batch.l1_entries:
            await self._image.file.flush()
        await self._write(batch.l1_entries)

    patch.setattr(Committer, "_store_maps", unflushed)


def _freed_clusters_are_used_at_once(patch: pytest.MonkeyPatch) -> None:
    def free_at_once(self: Allocator, offset: int, count: int = 1) -> None:
        for cluster in range(offset >> self._bits, (offset >> self._bits) + count):
            slice_ = self._cached(cluster)
            assert slice_ is not None
            self._width.put(slice_.data, cluster % self._per_slice, 0)
            self.cache.mark_dirty(slice_)
            self._cursor = min(self._cursor, cluster)

    patch.setattr(Allocator, "free", free_at_once)


def _a_failed_flush_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    flush = FileNode.flush

    async def forgetful(self: FileNode) -> None:
        try:
            await flush(self)
        except IoError:
            self._poison = None
            raise

    patch.setattr(FileNode, "flush", forgetful)


def _a_full_scratch_fails_the_guest(patch: pytest.MonkeyPatch) -> None:
    take = Copier.take

    def strict(self: Copier, *args: Any, **options: Any) -> Snapshot:
        return take(self, *args, **(options | {"on_error": "break-guest-write"}))

    patch.setattr(Copier, "take", strict)


def _a_slow_copy_is_waited_for_without_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Copier, "_next_deadline", lambda *_: None)


BREAKS: dict[str, Break] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _changes_do_not_wait_for_frozen_reads,
        _copies_do_not_serialise,
        _old_data_is_not_kept,
        _a_wait_between_choosing_and_freezing,
        _done_before_the_copy_is_made,
        _a_break_is_not_noticed_after_a_read,
        _maps_reach_the_file_before_counts,
        _no_flush_between_data_and_maps,
        _no_flush_at_the_end,
        _freed_clusters_are_used_at_once,
        _a_failed_flush_is_forgotten,
        _a_full_scratch_fails_the_guest,
        _a_slow_copy_is_waited_for_without_end,
    )
}
