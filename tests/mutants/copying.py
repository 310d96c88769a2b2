"""Mistakes in copy-before-write and in the two ways to read the past."""

from tests.mutants.mutant import Mutant

_COPIER = "block/copier.py"
_ACCESS = "block/nodes/snapshot_access.py"
_FILTER = "block/nodes/copy_before_write.py"

MUTANTS = [
    Mutant(
        "done-before-copied",
        _COPIER,
        """
                self._settled.set(first, stop)
                self._copies.append(copy)
""",
        """
                self._settled.set(first, stop)
                self._newest.done.set(first, stop)
                self._copies.append(copy)
""",
        "old data is in a scratch before it is marked done",
    ),
    Mutant(
        "copy-not-waited-for",
        _COPIER,
        """
            if under_way := self._under_way(first, end):
""",
        """
            if (under_way := self._under_way(first, end)) and not mine:
""",
        "a change starts only when the old data is in a scratch",
    ),
    Mutant(
        "others-copy-not-waited-for",
        _COPIER,
        """
            if under_way := self._under_way(first, end):
""",
        """
            if under_way := [copy for copy in self._under_way(first, end) if copy in mine]:
""",
        "a change waits for the copies of its clusters whoever started them",
    ),
    Mutant(
        "settled-while-being-copied",
        _COPIER,
        """
        if self._copies and self._under_way(first, end):
            return True
""",
        "",
        "a cluster on its way to a scratch is not there yet",
    ),
    Mutant(
        "frozen-reads-forgotten-once-settled",
        _COPIER,
        """
                if snapshot.frozen.overlaps(start, length):
                    return True
""",
        """
                pass
""",
        "a change of what is preserved still waits for those who read it from the disk",
    ),
    Mutant(
        "copied-at-once-while-read",
        _COPIER,
        """
        if self._is_busy(first, end):
            return False
        return self._is_settled(first, end) or self._copied_at_once(first, self._end_ahead(first, end))
""",
        """
        if self._is_settled(first, end):
            return not self._is_busy(first, end)
        return self._copied_at_once(first, self._end_ahead(first, end))
""",
        "what is copied at once may still be read from the disk by a snapshot",
    ),
    Mutant(
        "settled-writes-look-for-nobody",
        _COPIER,
        """
        if self._copies or any(len(snapshot.frozen) for snapshot in self._snapshots):
            return functools.partial(self._write_preserved, write)
""",
        "",
        "a change of what is preserved still waits for those who read it from the disk, or copy it",
    ),
    Mutant(
        "settled-by-its-first-cluster",
        _COPIER,
        """
        is_settled = self._settled[cluster] and offset + len(data) <= (cluster + 1) * size
""",
        """
        is_settled = self._settled[cluster]
""",
        "all clusters that a change touches are preserved before it",
    ),
    Mutant(
        "copied-at-once-but-not-written",
        _COPIER,
        """
        done = snapshot.fresh if blank else snapshot.scratch.try_pwrite(start, data, snapshot.serialising)
""",
        """
        done = snapshot.fresh if blank else snapshot.scratch.try_pwrite(start, data, snapshot.serialising) or True
""",
        "a copy that could not be made at once is not marked",
    ),
    Mutant(
        "copied-at-once-as-if-nobody-read",
        _COPIER,
        """
        done = snapshot.fresh if blank else snapshot.scratch.try_pwrite(start, data, snapshot.serialising)
""",
        """
        done = snapshot.fresh if blank else snapshot.scratch.try_pwrite(start, data)
""",
        "a copy into an image over the disk waits for who reads the disk through that image",
        tests=("tests/unit/block/test_at_once.py::test_what_is_copied_at_once_is_written_as_the_snapshot_wants_it",),
    ),
    Mutant(
        "copied-at-once-and-marked-too-far",
        _COPIER,
        """
                self._settled.set(start, stop)
        self._copied_to = end
""",
        """
                newest.done.set(stop, stop + 1)
                self._settled.set(start, stop + 1)
        self._copied_to = end
""",
        "only what was copied at once is marked",
    ),
    Mutant(
        "copied-ahead-while-read",
        _COPIER,
        "            if stop > end and not self._is_busy(end, stop):",
        "            if stop > end:",
        "what is copied ahead may still be read from the disk by a snapshot, or on its way into a scratch",
        # With so few clusters as the simulation's disks have, there is hardly anything ahead.
        tests=(
            "tests/unit/block/test_copier.py::test_a_change_is_copied_for_as_far_as_it_goes_and_changes_in_a_row_ahead",
        ),
    ),
    Mutant(
        "status-of-a-scratch-taken-from-the-disk",
        _ACCESS,
        "            if run.flags is not None:",
        "            if run.flags is not None and not on_disk:",
        "block status of what a scratch holds is the scratch's, also between what the disk holds",
    ),
    Mutant(
        "held-clusters-are-told-blank",
        _COPIER,
        """
        if blank:
            self.blank.set(first, end)
""",
        """
        self.blank.set(first, end)
""",
        "only zeroes are told to be zero",
    ),
    Mutant(
        "frozen-reads-not-waited-for",
        _COPIER,
        """
        await self._reads_ended(first, end, since_s, offset, length)
""",
        "",
        "a change waits for reads of its range by snapshots",
    ),
    Mutant(
        "frozen-reads-waited-for-before-done",
        _COPIER,
        """
        mine: list[_Copy] = []
        while self._newest is not None or self._copies:
            self._start_copies(first, end, mine)
            for copy in mine:
                if copy.error is not None and copy.fails_change:
                    raise copy.error
                since_s = max(since_s, copy.over_at_s)
            if under_way := self._under_way(first, end):
                now_s = loop.time()
                self._look_for_late(under_way, since_s, now_s, offset, length)
                if under_way[0] in self._copies:
                    await done_in_time(under_way[0].ended(), self._next_deadline(since_s, now_s))
                since_s = max(since_s, *(copy.over_at_s for copy in (*under_way, *mine)))
            elif self._newest is None or self._settled.all(first, end):
                break
            else:
                await asyncio.sleep(0)  # much was copied without a wait: others have their turn before the rest is
        await self._reads_ended(first, end, since_s, offset, length)
""",
        """
        mine: list[_Copy] = []
        await self._reads_ended(first, end, since_s, offset, length)
        while self._newest is not None or self._copies:
            self._start_copies(first, end, mine)
            for copy in mine:
                if copy.error is not None and copy.fails_change:
                    raise copy.error
                since_s = max(since_s, copy.over_at_s)
            if under_way := self._under_way(first, end):
                now_s = loop.time()
                self._look_for_late(under_way, since_s, now_s, offset, length)
                if under_way[0] in self._copies:
                    await done_in_time(under_way[0].ended(), self._next_deadline(since_s, now_s))
                since_s = max(since_s, *(copy.over_at_s for copy in (*under_way, *mine)))
            elif self._newest is None or self._settled.all(first, end):
                break
            else:
                await asyncio.sleep(0)
""",
        "done is set before frozen reads are waited for",
    ),
    Mutant(
        "frozen-reads-of-the-newest-only",
        _COPIER,
        """
        for snapshot in sorted(self._readable(), key=_gives_way) if self._freeze else ():
""",
        """
        for snapshot in self._readable()[-1:]:
""",
        "a change waits for the reads of every snapshot",
    ),
    Mutant(
        "no-look-after-a-failed-copy",
        _COPIER,
        """
                since_s = max(since_s, *(copy.over_at_s for copy in (*under_way, *mine)))
""",
        """
                since_s = max(since_s, *(copy.over_at_s for copy in (*under_way, *mine)))
                if under_way[0].error is not None:
                    break
""",
        "who waited for a copy that failed looks again",
    ),
    Mutant(
        "failed-copy-stays-marked",
        _COPIER,
        """
        copy.error = error
        if copy.given_up:
            return
        self._copies.remove(copy)
        self._look_again()
""",
        """
        copy.error = error
        if copy.given_up:
            return
        self._copies.remove(copy)
""",
        "a failed copy is unmarked",
    ),
    Mutant(
        "unmarked-after-the-wake",
        _COPIER,
        """
        copy.error = error
        if copy.given_up:
            return
        self._copies.remove(copy)
        self._look_again()
""",
        """
        copy.error = error
        if copy.given_up:
            return
        self._copies.remove(copy)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._look_again)
""",
        "a failed copy is unmarked before its waiters wake",
    ),
    Mutant(
        "copy-wakes-nobody",
        _COPIER,
        """
                copy.snapshot.hold(copy.start, copy.end, blank=blank)
                self._copies.remove(copy)
                copy.wake()
""",
        """
                copy.snapshot.hold(copy.start, copy.end, blank=blank)
                self._copies.remove(copy)
""",
        "the end of a copy wakes those who wait for it",
    ),
    Mutant(
        "given-up-copy-goes-on-to-the-scratch",
        _COPIER,
        """
            if copy.given_up:
                return  # and the scratch may be gone
""",
        "",
        "a copy given up touches no scratch, which may be gone",
    ),
    Mutant(
        "useless-copy-not-given-up",
        _COPIER,
        """
        self._look_again()
        self._give_up_useless([])
""",
        """
        self._look_again()
""",
        "a change does not wait for a copy that nobody needs any more",
    ),
    Mutant(
        "copy-for-an-older-snapshot-counts",
        _COPIER,
        """
            if copy.snapshot in serving:  # one for an older snapshot does not help this one
                self._settled.set(copy.start, copy.end)
""",
        """
            self._settled.set(copy.start, copy.end)
""",
        "a copy for an older snapshot does not count for a newer",
    ),
    Mutant(
        "retired-scratches-not-counted",
        _COPIER,
        """
        serving = self._snapshots[self._snapshots.index(self._newest) :]
""",
        """
        serving = [self._newest]
""",
        "what a retired snapshot preserved is not copied again, later, for an older one",
    ),
    Mutant(
        "retired-scratch-dropped-while-read",
        _COPIER,
        """
            if old.living or (kept and old.done.any()):  # else nothing in it is for an older one
                kept.append(old)
""",
        """
            if old.living:
                kept.append(old)
""",
        "a retired snapshot's scratch stays while an older one reads it",
    ),
    Mutant(
        "newest-scratch-read-first",
        _COPIER,
        """
        for holder in self._snapshots[self._snapshots.index(snapshot) :]:
            held, end = holder.done.run(first, end)
""",
        """
        for holder in reversed(self._snapshots[self._snapshots.index(snapshot) :]):
            held, end = holder.done.run(first, end)
""",
        "a snapshot reads the first scratch, from its own on, that holds a cluster",
    ),
    Mutant(
        "copies-go-to-the-oldest",
        _COPIER,
        """
        self._newest = readable[-1] if readable else None
""",
        """
        self._newest = readable[0] if readable else None
""",
        "old data goes to the newest snapshot's scratch",
    ),
    Mutant(
        "all-break-for-one-scratch",
        _COPIER,
        """
            self._copy_failed(copy, error, [copy.snapshot] if copy.is_read else self._needing(copy.start, copy.end))
""",
        """
            self._copy_failed(copy, error, self._needing(copy.start, copy.end))
""",
        "a scratch that fails breaks its own snapshot and no other",
    ),
    Mutant(
        "unreadable-disk-breaks-nobody",
        _COPIER,
        """
            self._copy_failed(copy, error, [copy.snapshot] if copy.is_read else self._needing(copy.start, copy.end))
""",
        """
            self._copy_failed(copy, error, [copy.snapshot] if copy.is_read else [])
""",
        "where the disk cannot be read all snapshots that need the copy break, and the change goes on",
    ),
    Mutant(
        "change-goes-on-without-its-copy",
        _COPIER,
        """
                if copy.error is not None and copy.fails_change:
                    raise copy.error
                since_s""",
        """
                if copy.error is not None and copy.fails_change:
                    return
                since_s""",
        "under break-guest-write a change whose copy failed does not happen",
    ),
    Mutant(
        "breaks-although-the-change-fails",
        _COPIER,
        """
        for snapshot in () if copy.fails_change else concerned:
""",
        """
        for snapshot in concerned:
""",
        "under break-guest-write every snapshot stays whole",
    ),
    Mutant(
        "fresh-taken-for-granted",
        _COPIER,
        """
            elif not copy.snapshot.fresh:
                await scratch.zero""",
        """
            elif copy.snapshot.fresh:
                await scratch.zero""",
        "zeroes are copied to a scratch that may hold something else",
    ),
    Mutant(
        "copy-without-a-deadline",
        _COPIER,
        """
        return min((deadline for deadline in deadlines if deadline > now_s), default=None)
""",
        """
        return max((deadline + 1e6 for deadline in deadlines if deadline > now_s), default=None)
""",
        "a change waits for a copy no longer than the snapshot says",
    ),
    Mutant(
        "reader-without-a-deadline",
        _COPIER,
        """
            deadline = since_s + snapshot.timeout_s if snapshot.timeout_s else None
            if reading""",
        """
            deadline = None
            if reading""",
        "a change waits for a snapshot's reader no longer than the snapshot says",
    ),
    Mutant(
        "late-change-passes-silently",
        _COPIER,
        """
        self.break_snapshot(snapshot, cause)

    def _give_up(""",
        """

    def _give_up(""",
        "a snapshot whose copy took too long breaks",
    ),
    Mutant(
        "last-cluster-left-out",
        _COPIER,
        """
        return offset // self.cluster_size_bytes, (offset + length - 1) // self.cluster_size_bytes + 1
""",
        """
        first = offset // self.cluster_size_bytes
        return first, max(first + 1, (offset + length) // self.cluster_size_bytes)
""",
        "a change is aligned outward: every cluster it touches is preserved",
    ),
    Mutant(
        "reads-of-the-broken-go-on",
        _COPIER,
        """
        if self.broken is not None:
            raise SnapshotBroken(self.name, self.broken.cause)
        if not self.living:
""",
        """
        if not self.living:
""",
        "a broken snapshot answers no read",
    ),
    Mutant(
        "zeroes-not-preserved",
        _FILTER,
        """
        if self.copier.must_preserve(offset, length):
            await self.copier.preserve(offset, length)
        await self.child.zero(offset, length, unmap, serialising=serialising)
""",
        """
        await self.child.zero(offset, length, unmap, serialising=serialising)
""",
        "writing zeroes is a change",
    ),
    Mutant(
        "discards-not-preserved",
        _FILTER,
        """
        if self.copier.must_preserve(offset, length):
            await self.copier.preserve(offset, length)
        await self.child.discard(offset, length)
""",
        """
        await self.child.discard(offset, length)
""",
        "a discard is a change",
    ),
    Mutant(
        "freeze-after-an-await",
        _ACCESS,
        """
            claim = self._copier.freeze(self.snapshot, offset, length)
""",
        """
            await __import__("asyncio").sleep(0)
            claim = self._copier.freeze(self.snapshot, offset, length)
""",
        "choosing the disk and freezing it are one step",
    ),
    Mutant(
        "all-runs-chosen-at-once",
        _ACCESS,
        """
        while position < length:
            holder, run = self._locate(offset + position, length - position)
            data[position : position + run] = await self._read_run(holder, offset + position, run)
            if ends_piece(position, run):
                await asyncio.sleep(0)
            position += run
        return data
""",
        """
        runs = []
        while position < length:
            holder, run = self._locate(offset + position, length - position)
            runs.append((holder, position, run))
            position += run
        for holder, position, run in runs:
            data[position : position + run] = await self._read_run(holder, offset + position, run)
        return data
""",
        "each run's side is chosen just before it is read",
    ),
    Mutant(
        "thawed-before-read",
        _ACCESS,
        """
            try:
                data = await self._copier.source.pread(offset, length)
            finally:
                self._copier.thaw(self.snapshot, claim)
""",
        """
            self._copier.thaw(self.snapshot, claim)
            data = await self._copier.source.pread(offset, length)
""",
        "the disk stays frozen until it has been read",
    ),
    Mutant(
        "status-not-frozen",
        _ACCESS,
        """
        claim = self._copier.freeze(self.snapshot, start, end - start)
        try:
            found = await self._copier.source.block_status(start, end - start)
        finally:
            self._copier.thaw(self.snapshot, claim)
""",
        """
        found = await self._copier.source.block_status(start, end - start)
""",
        "block status freezes what it asks the disk about",
    ),
    Mutant(
        "no-check-after-the-read",
        _ACCESS,
        """
        self.snapshot.check()
        return data
""",
        """
        return data
""",
        "breakage is looked at after a read, before its data is used",
    ),
    Mutant(
        "no-check-after-the-status",
        _ACCESS,
        """
        self.snapshot.check()
        return merge_extents(_status_of(runs, start, found))
""",
        """
        return merge_extents(_status_of(runs, start, found))
""",
        "breakage is looked at after a status, before it is used",
    ),
    Mutant(
        "slow-scratch-breaks-the-older-too",
        _COPIER,
        "        return slow.readable and not (slow in late and self._reads_disk(slow, copy.start, copy.end))",
        "        return True",
        "a scratch that hangs breaks its own snapshot and no older one",
    ),
    Mutant(
        "slow-scratch-waited-for-all-the-same",
        _COPIER,
        "            if copy.is_read and not copy.snapshot.readable:",
        "            if False:",
        "a copy to the scratch of a snapshot that broke is made anew for those that need it",
    ),
    Mutant(
        "no-time-for-the-second-scratch",
        _COPIER,
        "                copy.over_at_s = now_s",
        "                pass",
        "a snapshot has all its time for its own scratch once another's was given up",
    ),
    Mutant(
        "backup-waits-for-one-copy-only",
        _COPIER,
        """
        while under_way := self._under_way(first, end):
""",
        """
        if under_way := self._under_way(first, end):
""",
        "a full backup has ended when every copy of its range has",
    ),
    Mutant(
        "copy-that-fails-at-once-counts",
        _COPIER,
        """
                except FleecerError:
                    return False  # `preserve` meets it again, and knows what is to be done
""",
        """
                except FleecerError:
                    pass  # `preserve` meets it again, and knows what is to be done
""",
        "a copy that failed at once is not settled",
    ),
    Mutant(
        "used-target-taken-for-zero",
        _COPIER,
        """
            if not settled and self._newest is not None and self._newest.fresh:
""",
        """
            if not settled and self._newest is not None:
""",
        "where the disk is zero, a target that was used before must be zeroed",
    ),
    Mutant(
        "one-late-reader-stands-for-all",
        _COPIER,
        """
                self._reader_timed_out(snapshot, offset, length)
""",
        """
                self._reader_timed_out(snapshot, offset, length)
                return
""",
        "after one snapshot's reader was given up, those of the others are waited for all the same",
    ),
    Mutant(
        "retired-scratch-never-given-back",
        _COPIER,
        """
        return [old.scratch for old in dropped]
""",
        """
        return [old.scratch for old in dropped if old is snapshot]
""",
        "a scratch that was kept for an older snapshot goes with that",
    ),
    Mutant(
        "busy-with-the-newest-ones-readers-only",
        _COPIER,
        """
        for snapshot in self._snapshots:
            if len(snapshot.frozen):
""",
        """
        for snapshot in self._snapshots[-1:]:
            if len(snapshot.frozen):
""",
        "a change of what is settled waits for the frozen reads of every snapshot",
    ),
    Mutant(
        "ended-snapshot-fails-the-change",
        _COPIER,
        """
        concerned = [snapshot for snapshot in concerned if snapshot.readable]
""",
        "",
        "a scratch that fails for a snapshot that has ended fails no guest's change",
        tests=(
            "tests/unit/block/test_copier.py::test_a_scratch_that_fails_when_its_snapshot_has_ended_fails_no_change",
        ),
    ),
    Mutant(
        "end-of-a-copy-is-no-progress",
        _COPIER,
        """
                copy.over_at_s = asyncio.get_running_loop().time()
                copy.snapshot.hold(""",
        """
                copy.snapshot.hold(""",
        "a change waits as long as copies for it go on to end well",
        tests=(
            "tests/unit/block/test_copier.py::test_a_change_of_much_may_take_long_as_long_as_copies_for_it_end_well",
        ),
    ),
    Mutant(
        "gives-way-in-the-wrong-order",
        _COPIER,
        """
    return snapshot.on_error == "break-snapshot"
""",
        """
    return snapshot.on_error != "break-snapshot"
""",
        "no snapshot breaks for a change that fails for another's sake",
        tests=(
            "tests/unit/block/test_copier.py::test_of_those_that_wait_equally_long_the_one_that_fails_the_change_keeps_the_others_whole",
        ),
    ),
    Mutant(
        "revoked-scratch-freed-though-read",
        _COPIER,
        """
            if holder is not None and not any(self._reads_from(s, holder, first, stop) for s in self._readable()):
""",
        """
            if holder is not None:
""",
        "what a reader gave back is freed only when no other snapshot reads it",
        tests=("tests/unit/block/test_copier.py::test_a_discard_frees_the_scratch_unless_another_snapshot_reads_it",),
    ),
    Mutant(
        "copied-buffer-given-back-too-soon",
        _COPIER,
        """
                await scratch.pwrite(start, data, serialising=copy.snapshot.serialising)
                spares.give(data)
""",
        """
                spares.give(data)
                await scratch.pwrite(start, data, serialising=copy.snapshot.serialising)
""",
        "old data on its way to a scratch is nobody else's buffer",
    ),
    Mutant(
        "shared-bits-changed",
        "block/bitmap.py",
        """
        elif key in self._shared:
            chunk = self._chunks[key] = chunk.copy()
            self._shared.remove(key)
""",
        """
""",
        "bits that another bitmap may have too are copied before they are changed",
        tests=("tests/unit/block/test_bitmap.py::test_bitmaps_are_sets_of_numbers_however_they_share",),
    ),
]
